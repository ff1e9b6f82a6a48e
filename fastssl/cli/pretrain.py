"""`fastssl pretrain`: train an encoder on a folder of audio."""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.cli.console import log_to_console
from fastssl.cli.options import AUDIO_HELP, MODEL_HELP, command_parser
from fastssl.cli.settings_file import check_arguments, check_settings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_RECIPES = Path(__file__).resolve().parent.parent / "recipes"
#: By command.
_DEFAULT_RECIPES = {"pretrain": "wav2vec2-base", "distill": "distilhubert"}


def run(arguments: Sequence[str], *, command: str = "pretrain") -> None:
    """Parse the options and train.

    Args:
        arguments: Behind the command.
        command: "pretrain" or "distill", which have systems of their own.
    """
    from fastssl.models.config import CompressorConfig
    from fastssl.models.wav2vec2 import GumbelTemperature
    from fastssl.train.config import PretrainConfig

    parser = _parser_of(arguments, command)
    kinds = (CompressorConfig, GumbelTemperature)
    given = parser.parse_args(list(arguments))
    settings = parser.instantiate(given, instantiators=[(_make_model_config, kind, True) for kind in kinds])
    if settings.get("audio") is None:
        parser.error("AUDIO is missing: the folder, manifest or shar directory to train on")
    # Relative paths in RUN/config.yaml would mean something else elsewhere.
    data = settings.data
    if isinstance(data.valid, str):
        data = dataclasses.replace(data, valid=str(Path(data.valid).absolute()))
    folders = {name: getattr(data, name) for name in ("labels", "segments", "noise", "teacher_cache")}
    absolute = {name: str(Path(folder).absolute()) for name, folder in folders.items() if folder is not None}
    data = dataclasses.replace(data, **absolute)
    teacher = settings.get("teacher")
    if teacher is not None and Path(teacher).exists():
        teacher = str(Path(teacher).absolute())
    elif teacher is not None and not any(argument.partition("=")[0] == "--teacher" for argument in arguments):
        raise ValueError(
            f"teacher: there is no {teacher}, and a name in a file of settings is not downloaded; if it is a model of "
            f"the Hub that you trust, add --teacher {teacher}"
        )
    recipe = settings.recipe
    if recipe is None and not settings.resume and settings.config is None:
        recipe = _DEFAULT_RECIPES[command]
    config = PretrainConfig(
        audio=str(Path(settings.audio).absolute()),
        output=settings.output,
        seed=settings.seed,
        init=None if settings.init is None else str(Path(settings.init).absolute()),
        recipe=recipe,
        system=settings.system,
        teacher=teacher,
        model=settings.model,
        data=data,
        optimizer=settings.optimizer,
        trainer=settings.trainer,
        quality=settings.quality,
    )
    # Lightning takes seconds to import, which a wrong option should not.
    from fastssl.train.pretrain import is_first_process, pretrain

    log_to_console(logging.INFO if is_first_process() else logging.WARNING)
    pretrain(config, resume=settings.resume)


def _make_model_config(config: type[Any], **values: Any) -> Any:
    """The settings of a model, which does not know by which name its options go on the command line.

    Raises:
        ValueError: They make no sense; names the option.
    """
    try:
        return config(**values)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def _parser_of(arguments: Sequence[str], command: str) -> "ArgumentParser":
    """The parser, its defaults already those of recipe, config, or the run to resume, so that `--help` shows them.

    What stands on the command line then wins, wherever it stands.
    """
    from fastssl.train.config import DataConfig, OptimizerConfig, QualityConfig, TrainerConfig
    from fastssl.train.systems import SYSTEMS

    defaults = _defaults_of(arguments, command)
    system = _system_of(defaults)
    groups: dict[str, type[Any]] = {
        "model": SYSTEMS[system].config_class,
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "trainer": TrainerConfig,
        "quality": QualityConfig,
    }
    check_arguments(arguments, groups)
    for path, values in defaults.items():
        check_settings(path, values, groups)
    what = "Train a small encoder to predict the layers of a large one"
    if command == "pretrain":
        what = f"Train an encoder by {SYSTEMS[system].title}'s objective"
    parser = command_parser(
        command,
        f"{what}. RUN gets config.yaml, checkpoints/, logs/ "
        "(TensorBoard), metrics.csv, report.png and encoder/, which load_encoder and, where it has such models, "
        "Transformers open. "
        "`--config RUN/config.yaml --output OTHER` repeats a run.",
    )
    # A default of None would replace what --config says.
    parser.add_argument("audio", nargs="?", default=argparse.SUPPRESS, metavar="AUDIO", help=AUDIO_HELP)
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        type=str | None,
        help=f"Where the settings below start from: {', '.join(recipes(command))}, or a YAML file; if not given, "
        f"{_DEFAULT_RECIPES[command]}.",
    )
    parser.add_argument("--config", metavar="FILE", help="More settings from a YAML file, such as RUN/config.yaml.")
    parser.add_argument("--output", required=True, metavar="RUN", help="Folder of the run; must not exist yet.")
    parser.add_argument(
        "--resume", action="store_true", help="Continue the run in RUN, with its settings, as if it had never stopped."
    )
    parser.add_argument(
        "--init",
        type=str | None,
        metavar="MODEL",
        help="Start from these weights, with a new optimiser: a Transformers folder, or an earlier run.",
    )
    if command == "distill":
        parser.add_argument("--teacher", type=str | None, help=f"What to distil. {MODEL_HELP}")
    parser.add_argument("--seed", type=int, default=0, help="All randomness of the run derives from it.")
    parser.add_argument(
        "--system", default="wav2vec2", help=f"The objective, which the recipe decides: {', '.join(SYSTEMS)}."
    )
    for name, config in groups.items():
        parser.add_argument(f"--{name}", type=config, default=config())
    for values in defaults.values():
        parser.parse_object(values | {"output": ""})  # refuses what `set_defaults` would take
        parser.set_defaults(values)
    return parser


def _defaults_of(arguments: Sequence[str], command: str) -> dict[Path, dict[str, Any]]:
    """The settings to start from, by file, later ones over earlier ones: a recipe or the run to resume, and --config.

    Raises:
        ValueError: There is no such recipe, file or run, or they are of several systems.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--recipe")
    peek.add_argument("--config")
    peek.add_argument("--output")
    peek.add_argument("--system")
    peek.add_argument("--resume", action="store_true")
    peeked, _ = peek.parse_known_args(list(arguments))
    from fastssl.train.systems import SYSTEMS

    config_file = None if peeked.config is None else Path(peeked.config)
    if config_file is not None and not config_file.is_file():
        raise ValueError(f"--config: there is no file {config_file}")
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
            raise ValueError(f"--resume: there is no run in {peeked.output} (looked for {begin})")
    defaults = given if begin in given else {begin: _read_yaml(begin)} | given

    system, last = _system_of(defaults), list(defaults)[-1]
    if peeked.system not in (None, system):
        raise ValueError(
            f"--system: {peeked.system}, but {last} has settings of {system}; "
            f"the recipe decides: {', '.join(recipes(command))}"
        )
    if (wanted := SYSTEMS[system].command) != command:
        raise ValueError(f"{last.stem} is for `fastssl {wanted}`; {command} takes {', '.join(recipes(command))}")
    return defaults


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file, its numbers read as the command line reads them ("1e-5" is one)."""
    import yaml
    from jsonargparse import get_loader

    from fastssl.train.config import renamed

    try:
        values = get_loader("yaml")(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings by name, got a {type(values).__name__}")
    return renamed(values)


def _system_of(files: Mapping[Path, Mapping[str, Any]]) -> str:
    """The system that settings are of, wav2vec 2.0 where none of them says so; the settings of `model` follow from it.

    Raises:
        ValueError: A file names a system that does not exist, or another one than the file before it.
    """
    from fastssl.train.systems import SYSTEMS

    found: dict[str, Path] = {}
    for path, values in files.items():
        system = values.get("system")
        if system is None:
            continue
        if system not in list(SYSTEMS):
            raise ValueError(f"{path}: system is {system!r}, and there are {', '.join(SYSTEMS)}")
        found.setdefault(system, path)
        if len(found) > 1:
            raise ValueError("; ".join(f"{file} has settings of {name}" for name, file in found.items()))
    return next(iter(found), "wav2vec2")


def _recipe_path(name: str) -> Path:
    known = recipes()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    raise ValueError(f"--recipe: there is no {name!r}; there are {', '.join(known)}, and any YAML file")


def recipes(command: str | None = None) -> dict[str, Path]:
    """The recipes of the package by name: all, or those of a command."""
    found = {path.stem: path for path in sorted(_RECIPES.glob("*.yaml"))}
    commands = {name: "distill" if name.startswith("distil") else "pretrain" for name in found}
    return {name: path for name, path in found.items() if command in (None, commands[name])}
