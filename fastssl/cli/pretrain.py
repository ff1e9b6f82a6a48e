"""`fastssl pretrain` and `fastssl distill`: train an encoder on a folder of audio."""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.cli.console import log_to_console
from fastssl.cli.settings_file import check_arguments, check_settings, groups_inside
from fastssl.reading import brief

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_RECIPES = Path(__file__).resolve().parent.parent / "recipes"
#: Recipe that each command starts from by default.
_DEFAULT_RECIPES = {"pretrain": "wav2vec2-base", "distill": "distilhubert"}


def distill(arguments: Sequence[str]) -> None:
    """Parse the options (those of `fastssl pretrain`, and a teacher) and train.

    Args:
        arguments: The command's arguments, as typed.
    """
    pretrain(arguments, command="distill")


def pretrain(arguments: Sequence[str], *, command: str = "pretrain") -> None:
    """Parse the options and train.

    Args:
        arguments: The command's arguments, as typed.
        command: "pretrain" or "distill"; each has its own systems.
    """
    from fastssl.models.config import CompressorConfig
    from fastssl.train.checkpoint_file import has_checkpoint
    from fastssl.train.config import PretrainConfig
    from fastssl.train.systems import SYSTEMS

    parser = _parser_of(arguments, command)
    # A model's config, and the groups of options inside it.
    kinds = [CompressorConfig, *(kind for one in SYSTEMS.values() for kind in groups_inside(one.config_class).values())]
    given = parser.parse_args(list(arguments))
    values = vars(parser.instantiate(given, instantiators=[(_make_model_config, kind, True) for kind in kinds]))
    if values.get("audio") is None:
        parser.error("AUDIO: is missing; give the folder, manifest or shar directory to train on")
    config_file, resume = values.pop("config"), values.pop("resume")
    if values["recipe"] is None and config_file is None and not resume:
        values["recipe"] = _DEFAULT_RECIPES[command]
    _check_typed("teacher", values, arguments)
    if not (resume and has_checkpoint(Path(values["output"]))):  # a run that continues has its weights
        _check_typed("init", values, arguments)
    config = PretrainConfig(**_absolute_paths(values))
    # Imported only now: Lightning takes seconds to import, and a wrong option should be reported at once.
    from fastssl.train import pretrain as training

    log_to_console(logging.INFO if training.is_first_process() else logging.WARNING)
    training.pretrain(config, resume=resume)


def _check_typed(name: str, values: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Check that a model which would be downloaded was typed as an option.

    Raises:
        ValueError: The model is not on this machine, and only a file of settings names it.
    """
    model = values.get(name)
    typed = any(argument.partition("=")[0] == f"--{name}" for argument in arguments)
    if model is not None and not Path(model).exists() and not typed:
        raise ValueError(
            f"{name}: no such file or folder: {model}; a model that a settings file names is not downloaded; if it is "
            f"a model on the Hub that you trust, add --{name} {model}"
        )


def _make_model_config(config: type[Any], **values: Any) -> Any:
    """Make a part of the model's config; error messages get the prefix that options have on the command line.

    Raises:
        ValueError: A value is invalid; the message names the option.
    """
    try:
        return config(**values)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def _absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with absolute paths, because RUN/config.yaml stores them and may be read from elsewhere."""
    from fastssl.interop.hub import may_be_id

    def absolute(path: str) -> str:
        return str(Path(path).absolute())

    data = values["data"]
    paths = {name: getattr(data, name) for name in ("valid", "labels", "segments", "noise", "teacher_cache")}
    paths = {name: absolute(path) for name, path in paths.items() if isinstance(path, str)}
    changed = {"data": dataclasses.replace(data, **paths)}
    changed["audio"] = absolute(values["audio"])
    for name in ("init", "teacher"):
        model = values.get(name)
        if model is not None and (Path(model).exists() or not may_be_id(model)):  # otherwise, it is a name on the Hub
            changed[name] = absolute(model)
    return values | changed


def _parser_of(arguments: Sequence[str], command: str) -> "ArgumentParser":
    """Make the parser, with the defaults of the recipe, of --config, or of the run to resume, so `--help` shows them.

    Options on the command line override these defaults, whatever their order.
    """
    from fastssl.cli.signature import documented, new_parser
    from fastssl.train.config import PretrainConfig
    from fastssl.train.systems import SYSTEMS

    defaults = _defaults_of(arguments, command)
    system = SYSTEMS[_system_of(defaults)]
    model = system.config_class
    groups = groups_inside(PretrainConfig) | {"model": model}
    check_arguments(arguments, groups)
    for path, values in defaults.items():
        check_settings(path, values, groups)
    what = "Train a small encoder to predict the layers of a large one"
    if command == "pretrain":
        what = f"Train an encoder with {system.title}'s objective"
    parser = new_parser(
        command,
        f"{what}. The run's folder gets config.yaml, checkpoints/, logs/ (TensorBoard), metrics.csv, report.png and "
        "encoder/, which load_encoder opens, as does Transformers if it has this architecture. "
        "`--config RUN/config.yaml --output OTHER` repeats a run.",
    )
    helps = documented(PretrainConfig)[1]
    # A default of None would override --config.
    parser.add_argument("audio", nargs="?", default=argparse.SUPPRESS, metavar="AUDIO", help=helps["audio"])
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        type=str | None,
        help=f"Recipe that gives the options below their defaults: {', '.join(recipes(command))}, or a YAML file; by "
        f"default {_DEFAULT_RECIPES[command]}.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with further settings, such as RUN/config.yaml.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue the run in the folder of --output, with its settings, as if it had never stopped.",
    )
    parser.add_argument("--model", type=model, default=model())
    others = {"audio", "recipe", "model"} | ({"teacher"} if command == "pretrain" else set())
    parser.add_class_arguments(PretrainConfig, as_group=False, skip=others)
    for values in defaults.values():
        parser.parse_object(values | {"output": ""})  # raises an error for values that `set_defaults` would accept
        parser.set_defaults(values)
    return parser


def _defaults_of(arguments: Sequence[str], command: str) -> dict[Path, dict[str, Any]]:
    """Return the initial settings by file: the recipe or the run to resume, then the --config file, which overrides it.

    Raises:
        ValueError: The recipe, file or run does not exist; or its system is unknown, differs between the files or from
            --system, or belongs to another command.
    """
    from fastssl.train.systems import SYSTEMS

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--recipe", "--config", "--output", "--system"):
        peek.add_argument(option)
    peek.add_argument("--resume", action="store_true")
    peeked, _ = peek.parse_known_args(list(arguments))
    config_file = None if peeked.config is None else Path(peeked.config)
    if config_file is not None and not config_file.is_file():
        raise ValueError(f"--config: no such file: {config_file}")
    given = {} if config_file is None else {config_file: _read_yaml(config_file)}
    recipe = peeked.recipe
    if recipe is None:
        recipe = _DEFAULT_RECIPES[command]
        if config_file is not None and command == "pretrain":
            system = _system_of(given)
            recipe = f"{system}-base" if SYSTEMS[system].command == command else str(config_file)
    begin = _recipe_path(recipe)
    if peeked.resume and peeked.output is not None:
        begin = Path(peeked.output) / "config.yaml"
        if not begin.is_file():
            raise ValueError(f"--resume: {peeked.output} contains no run to continue (looked for {begin})")
    defaults = given if begin in given else {begin: _read_yaml(begin)} | given
    if peeked.resume and peeked.output is not None and "audio" not in defaults[begin]:
        raise ValueError(f"--resume: {begin} does not have the settings of a run; restore it, or start a new run")

    system, last = _system_of(defaults), list(defaults)[-1]
    if peeked.system not in (None, system):
        raise ValueError(
            f"--system: got {peeked.system}, but {last} has settings for {system}; "
            f"choose the system with --recipe: {', '.join(recipes(command))}"
        )
    if (wanted := SYSTEMS[system].command) != command:
        raise ValueError(f"{last.stem} is for `fastssl {wanted}`; {command} accepts {', '.join(recipes(command))}")
    return defaults


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a file; numbers are parsed as on the command line ("1e-5" is a number)."""
    from jsonargparse import get_loader

    from fastssl.train.config import renamed
    from fastssl.train.yaml_file import read_yaml

    return renamed(read_yaml(path, parse=get_loader("yaml")))


def _system_of(files: Mapping[Path, Mapping[str, Any]]) -> str:
    """Return the system that settings are for, by default `DEFAULT_SYSTEM`; it determines the options of `model`.

    Raises:
        ValueError: A file names an unknown system, or two files name different ones.
    """
    from fastssl.train.systems import DEFAULT_SYSTEM, SYSTEMS

    found: dict[str, Path] = {}
    for path, values in files.items():
        system = values.get("system")
        if system is None:
            continue
        if system not in list(SYSTEMS):
            raise ValueError(f"{path}: unknown system {brief(system)}; choose one of {', '.join(SYSTEMS)}")
        found.setdefault(system, path)
        if len(found) > 1:
            raise ValueError("; ".join(f"{file} has settings for {name}" for name, file in found.items()))
    return next(iter(found), DEFAULT_SYSTEM)


def _recipe_path(name: str) -> Path:
    known = recipes()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    raise ValueError(f"--recipe: unknown recipe {name!r}; choose one of {', '.join(known)}, or give a YAML file")


def recipes(command: str | None = None) -> dict[str, Path]:
    """Return the files of the package's recipes, by name.

    Args:
        command: Command whose recipes to return; None returns all.
    """
    found = {path.stem: path for path in sorted(_RECIPES.glob("*.yaml"))}
    commands = {name: "distill" if name.startswith("distil") else "pretrain" for name in found}
    return {name: path for name, path in found.items() if command in (None, commands[name])}
