"""The command line. Each command imports what it needs when it runs, so that `--help` and `info` answer at once."""

import argparse
import dataclasses
import glob
import importlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_RECIPES = Path(__file__).resolve().parent / "recipes"
_DEFAULT_RECIPE = "wav2vec2-base"
#: What the commands other than `info` import.
_TRAIN_EXTRA = ("jsonargparse", "lhotse", "lightning", "matplotlib", "rich", "sklearn", "soundfile", "tensorboard")
_AUDIO_HELP = (
    "Folder of recordings (WAV, FLAC, OGG, MP3; any sample rate, any number of channels; subfolders too), "
    "Lhotse manifest (.jsonl.gz), or Lhotse shar directory."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    commands: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
        "pretrain": (_pretrain, "train an encoder on a folder of audio"),
        "extract": (_extract, "write the features of every recording"),
        "label": (_label, "cluster the frames of every recording, for HuBERT to learn from"),
        "quality": (_quality, "measure how good each layer of an encoder is, without labels"),
        "probe": (_probe, "compare what linear heads read from frozen encoders"),
        "prepare": (_prepare, "look through a folder once and write a manifest (optional)"),
        "info": (_info, "show the kernels of each op, and why one is missing"),
    }
    width = max(len(name) for name in commands)
    parser = argparse.ArgumentParser(
        prog="fastssl",
        description="Self-supervised speech encoders that never compute padding.",
        epilog="commands:\n"
        + "".join(f"  {name:{width}}  {summary}\n" for name, (_, summary) in commands.items())
        + "\n`fastssl COMMAND --help` explains a command. To begin:\n"
        "  fastssl pretrain FOLDER --recipe wav2vec2-tiny --output runs/first",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help=", ".join(commands))
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    if command != "info":
        missing = [name for name in _TRAIN_EXTRA if util.find_spec(name) is None]
        if missing:
            print(f"fastssl {command} needs {', '.join(missing)}: pip install 'fastssl[train]'", file=sys.stderr)
            return 1
    run = commands[command][0]
    try:
        run(given[1:])
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        print(f"fastssl {command}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from fastssl.train.module import TrainingError

        if not isinstance(error, TrainingError):
            raise
        # The log has said it, once for all processes.
        return 1
    return 0


def _is_for_the_user(error: ValueError) -> bool:
    """Whether the package itself refused something; what other packages raise is a defect, and keeps its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def recipes() -> dict[str, Path]:
    """The recipes of the package by name."""
    return {path.stem: path for path in sorted(_RECIPES.glob("*.yaml"))}


def _pretrain(arguments: Sequence[str]) -> None:
    from fastssl.train.config import PretrainConfig, TemperatureConfig

    parser = _pretrain_parser(arguments)
    settings = parser.instantiate(parser.parse_args(list(arguments)))
    if settings.get("audio") is None:
        parser.error("AUDIO is missing: the folder, manifest or shar directory to train on")
    # Relative paths in RUN/config.yaml would mean something else elsewhere.
    data = settings.data
    if isinstance(data.valid, str):
        data = dataclasses.replace(data, valid=str(Path(data.valid).absolute()))
    if data.labels is not None:
        data = dataclasses.replace(data, labels=str(Path(data.labels).absolute()))
    recipe = settings.recipe
    if recipe is None and not settings.resume and settings.config is None:
        recipe = _DEFAULT_RECIPE
    config = PretrainConfig(
        audio=str(Path(settings.audio).absolute()),
        output=settings.output,
        seed=settings.seed,
        init=None if settings.init is None else str(Path(settings.init).absolute()),
        recipe=recipe,
        system=settings.system,
        model=settings.model,
        data=data,
        optimizer=settings.optimizer,
        temperature=settings.get("temperature") or TemperatureConfig(),
        trainer=settings.trainer,
        quality=settings.quality,
    )
    # Lightning takes seconds to import, which a wrong option should not.
    from fastssl.train.pretrain import is_first_process, pretrain

    _log_to_console(logging.INFO if is_first_process() else logging.WARNING)
    pretrain(config, resume=settings.resume)


def _pretrain_parser(arguments: Sequence[str]) -> "ArgumentParser":
    """The parser, its defaults already those of recipe, config, or the run to resume, so that `--help` shows them.

    What stands on the command line then wins, wherever it stands.
    """
    from fastssl.train.config import DataConfig, OptimizerConfig, QualityConfig, TemperatureConfig, TrainerConfig
    from fastssl.train.systems import SYSTEMS

    defaults = _pretrain_defaults(arguments)
    system = _system_of(defaults)
    parser = _parser(
        "pretrain",
        f"Train an encoder by {SYSTEMS[system].title}'s objective. RUN gets config.yaml, checkpoints/, logs/ "
        "(TensorBoard), metrics.csv, report.png and encoder/, which load_encoder and, where it has such models, "
        "Transformers open. "
        "`--config RUN/config.yaml --output OTHER` repeats a run.",
        defaults=defaults,
    )
    # A default of None would replace what --config says.
    parser.add_argument("audio", nargs="?", default=argparse.SUPPRESS, metavar="AUDIO", help=_AUDIO_HELP)
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        type=str | None,
        help=f"Where the settings below start from: {', '.join(recipes())}, or a YAML file; if not given, "
        f"{_DEFAULT_RECIPE}.",
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
    parser.add_argument("--seed", type=int, default=0, help="All randomness of the run derives from it.")
    parser.add_argument(
        "--system", default="wav2vec2", help=f"The objective, which the recipe decides: {', '.join(SYSTEMS)}."
    )
    config = SYSTEMS[system].config
    parser.add_argument("--model", type=config, default=config())
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    parser.add_argument("--optimizer", type=OptimizerConfig, default=OptimizerConfig())
    if system == "wav2vec2":
        parser.add_argument("--temperature", type=TemperatureConfig, default=TemperatureConfig())
    parser.add_argument("--trainer", type=TrainerConfig, default=TrainerConfig())
    parser.add_argument("--quality", type=QualityConfig, default=QualityConfig())
    return parser


def _pretrain_defaults(arguments: Sequence[str]) -> list[Path]:
    """The files that settings start from, later ones over earlier ones: a recipe or the run to resume, and --config.

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
    config_file = None if peeked.config is None else Path(peeked.config)
    if config_file is not None and not config_file.is_file():
        raise ValueError(f"--config: there is no file {config_file}")
    recipe = peeked.recipe
    if recipe is None:
        recipe = _DEFAULT_RECIPE if config_file is None else f"{_system_of([config_file])}-base"
    defaults = [_recipe_path(recipe)]
    if peeked.resume and peeked.output is not None:
        defaults = [Path(peeked.output) / "config.yaml"]
        if not defaults[0].is_file():
            raise ValueError(f"--resume: there is no run in {peeked.output} (looked for {defaults[0]})")
    if config_file is not None:
        defaults.append(config_file)

    system = _system_of(defaults)
    if peeked.system not in (None, system):
        raise ValueError(
            f"--system: {peeked.system}, but {defaults[-1]} has settings of {system}; "
            f"the recipe decides: {', '.join(recipes())}"
        )
    return defaults


def _system_of(files: Sequence[Path]) -> str:
    """The system that settings are of, wav2vec 2.0 where none of them says so; the settings of `model` follow from it.

    Raises:
        ValueError: A file is no YAML, names a system that there is not, or another one than the file before it.
    """
    import yaml

    from fastssl.train.systems import SYSTEMS

    found: dict[str, Path] = {}
    for path in files:
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: is no YAML: {error}") from None
        system = values.get("system") if isinstance(values, dict) else None
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


def _extract(arguments: Sequence[str]) -> None:
    parser = _parser(
        "extract",
        "Write the features of every recording: safetensors shards, and index.jsonl with file, shard, key, layer, "
        "frames and frame period. Started again with the same arguments, it goes on where it was.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="A run of `fastssl pretrain`, a Transformers folder, a name on the Hub, or a checkpoint of fairseq.",
    )
    parser.add_argument("audio", metavar="AUDIO", help=_AUDIO_HELP)
    parser.add_argument("--output", required=True, metavar="FEATURES", help="Folder for shards and index.")
    parser.add_argument(
        "--layer", type=int | None, help="0 is the input of the first layer; null is the output of the last."
    )
    parser.add_argument("--chunk_s", type=float, default=60.0, help="Longer recordings are encoded in chunks, seconds.")
    parser.add_argument("--overlap_s", type=float, default=6.0, help="What neighbouring chunks share, seconds.")
    parser.add_argument("--channel", type=int | None, help="The channel to read; null averages all of them.")
    parser.add_argument("--shard_mb", type=float, default=512.0, help="Size of a shard, megabytes.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    settings = parser.parse_args(list(arguments))
    from fastssl.train.extract import extract

    _log_to_console()
    extract(
        settings.model,
        settings.audio,
        settings.output,
        layer=settings.layer,
        chunk_s=settings.chunk_s,
        overlap_s=settings.overlap_s,
        channel=settings.channel,
        shard_mb=settings.shard_mb,
        device=settings.device,
    )


def _label(arguments: Sequence[str]) -> None:
    from fastssl.train.label import LabelSettings, label

    parser = _parser(
        "label",
        "Cluster frames by k-means and write the class of each, a table beside the audio that Lhotse reads too. "
        "Without --model the frames are MFCC, as for HuBERT's first iteration. `fastssl pretrain AUDIO --recipe "
        "hubert-base --data.labels LABELS` learns from them. Started again with the same arguments, it goes on where "
        "it was, and adds new recordings.",
    )
    parser.add_argument("audio", metavar="AUDIO", help=_AUDIO_HELP)
    parser.add_argument("--output", required=True, metavar="LABELS", help="Folder for the labels.")
    parser.add_class_arguments(LabelSettings)
    parser.add_argument(
        "--kmeans",
        type=str | None,
        metavar="LABELS",
        help="Take features and k-means model of these labels, so that held-out audio has the same classes.",
    )
    parser.add_argument("--num_workers", type=int | None, help="Processes that decode; null chooses by the cores.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    settings = parser.parse_args(list(arguments))
    model = settings.model
    if model is not None and Path(model).exists():
        model = str(Path(model).absolute())
    _log_to_console()
    label(
        settings.audio,
        settings.output,
        LabelSettings(
            model=model,
            layer=settings.layer,
            clusters=settings.clusters,
            fit_frames=settings.fit_frames,
            seed=settings.seed,
            channel=settings.channel,
        ),
        kmeans=settings.kmeans,
        num_workers=settings.num_workers,
        device=settings.device,
    )


def _quality(arguments: Sequence[str]) -> None:
    parser = _parser(
        "quality",
        "Measure each layer of an encoder on audio without labels: effective rank of all frames, RankMe, inertia of "
        "k-means, Davies-Bouldin. Prints a table, writes it as JSON, and draws a plot beside it. Compare only what was "
        "measured on the same audio with the same settings, layer by layer.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="A run of `fastssl pretrain`, a Transformers folder, a name on the Hub, or a checkpoint of fairseq.",
    )
    parser.add_argument("audio", metavar="AUDIO", help=_AUDIO_HELP)
    parser.add_argument("--output", default="quality.json", metavar="FILE", help="Ends with .json; replaced if there.")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="Of AUDIO, always the same ones, whatever their order."
    )
    parser.add_argument("--layers", type=list[int] | None, help="Such as [0,6,12]; null measures all.")
    parser.add_argument("--max_frames", type=int, default=102_400, help="Frames for k-means, drawn from all.")
    parser.add_argument("--seed", type=int, default=0, help="Of the frames drawn, and of k-means.")
    parser.add_argument("--channel", type=int | None, help="The channel to read; null averages all of them.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    settings = parser.parse_args(list(arguments))
    from fastssl.train.quality_command import quality

    _log_to_console()
    quality(
        settings.model,
        settings.audio,
        settings.output,
        minutes=settings.minutes,
        layers=settings.layers,
        max_frames=settings.max_frames,
        seed=settings.seed,
        channel=settings.channel,
        device=settings.device,
    )


def _probe(arguments: Sequence[str]) -> None:
    parser = _parser(
        "probe",
        "Train linear heads on the frozen, weighted layers of encoders, beside log-mel and random initialisation: a "
        "miniature of SUPERB's protocol. A table is tab-separated (.csv: comma-separated) with a header; column `path` "
        "names recordings from the table's folder, the others are labels.",
    )
    parser.add_argument("model", metavar="MODEL", help="What to probe, as for `fastssl extract`.")
    parser.add_argument("table", metavar="TABLE", help="The training part; without --dev and --test, divided 70:15:15.")
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="More encoders for the table.")
    parser.add_argument("--dev", type=str | None, metavar="TABLE", help="Chooses learning rate (verification: layer).")
    parser.add_argument("--test", type=str | None, metavar="TABLE", help="Is looked at once.")
    parser.add_argument("--target", required=True, metavar="COLUMN", help="The label; phones follow from digits.")
    parser.add_argument(
        "--task",
        type=str | None,
        help="classification, ctc or verification; null is ctc for digits, phones, phonemes and text (symbols are "
        "characters, or what blanks separate where there are any, but for text), classification for all others.",
    )
    parser.add_argument("--segment_s", type=float | None, help="Examples of this length; null is whole recordings.")
    parser.add_argument("--folds", type=str | None, metavar="COLUMN", help="Hold out its values in turn for testing.")
    parser.add_argument("--fold_size", type=int, default=1, help="Values held out together; verification needs two.")
    parser.add_argument("--seeds", type=int | None, help="Orders of the examples; null is 3, or 1 for each fold.")
    parser.add_argument("--steps", type=int, default=500, help="Of each head.")
    parser.add_argument("--batch_s", type=float, default=50.0, help="Audio of a step, seconds.")
    parser.add_argument(
        "--learning_rates",
        type=tuple[float, ...] | None,
        help="To choose from; null is 0.002, 0.004 and 0.008 for ctc, 0.003, 0.01 and 0.03 for classification.",
    )
    parser.add_argument("--context_s", type=float, default=0.1, help="What ctc sees beside a frame, seconds each side.")
    parser.add_argument("--output", type=str | None, metavar="JSON", help="Everything that was measured.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    given = parser.parse_args(list(arguments))
    from fastssl.train.probe import ProbeSettings
    from fastssl.train.probing.command import probe

    if given.seeds is None:
        given.seeds = 3 if given.folds is None else 1
    names = [field.name for field in dataclasses.fields(ProbeSettings)]
    settings = ProbeSettings(**{name: given[name] for name in names})
    _log_to_console()
    models = [given.model, *given.compare]
    probe(models, given.table, settings, dev=given.dev, test=given.test, output=given.output, device=given.device)


def _prepare(arguments: Sequence[str]) -> None:
    from fastssl.data.corpus import open_corpus, write_manifest

    parser = _parser(
        "prepare",
        "Read the headers of all recordings once and write a Lhotse manifest, which pretrain and extract take in "
        "place of the folder. Worth it for large folders on slow disks.",
    )
    parser.add_argument("audio", metavar="AUDIO", help=_AUDIO_HELP)
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="File to write, NAME.jsonl.gz.")
    parser.add_argument("--min_duration_s", type=float, default=2.0, help="Shorter recordings are left out.")
    parser.add_argument("--window_s", type=float, default=60.0, help="Longer recordings become windows of this length.")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.05, help="It is an error when more than this fraction is unusable."
    )
    settings = parser.parse_args(list(arguments))
    corpus = open_corpus(
        settings.audio,
        min_duration_s=settings.min_duration_s,
        window_s=settings.window_s,
        max_bad_fraction=settings.max_bad_fraction,
    )
    write_manifest(corpus, Path(settings.output))
    for problem in corpus.problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(
        f"{settings.output}: {corpus.num_recordings} recordings, {corpus.duration_s / 3600:.2f} hours, "
        f"{len(corpus.problems)} left out"
    )


def _info(arguments: Sequence[str]) -> None:
    """Print what there is; nothing but the core dependencies is needed."""
    argparse.ArgumentParser(
        prog="fastssl info", description="Show the kernels of each op per device, and why one is missing."
    ).parse_args(list(arguments))
    import platform

    import torch

    from fastssl import ops

    versions = [f"{name} {_version(name)}" for name in ("fastssl", "torch", "triton", "numpy", "safetensors")]
    print(", ".join([f"python {platform.python_version()}", *versions]))
    print(f"CPU: {_cpu_name()}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        print(f"GPU: {', '.join(names)} (CUDA {torch.version.cuda})")
    else:
        print(f"GPU: none that torch can use (torch is built for {_torch_build()})")
    if ops._dispatch.DEFAULT_BACKEND is not None:
        print(f"FASTSSL_BACKEND={ops._dispatch.DEFAULT_BACKEND}")
    for device, reason in ops._dispatch.COMPILED_MODULES.items():
        print(f"compiled module for {device}: {reason or 'loaded'}")
    print(f"compiled module for data workers: {_why_no_host_module() or 'loaded'}")
    for op, devices in ops._dispatch.BACKENDS.items():
        print(f"\n{op}")
        for device, backends in devices.items():
            print(f"  {device}: {', '.join(backends)}")
            for (backend, place), reason in ops._dispatch.MISSING[op].items():
                if place == device:
                    print(f"    no {backend}: {reason}")


def _why_no_host_module() -> str:
    """Why numpy does what `fastssl._host` would do; empty where it is loaded."""
    try:
        importlib.import_module("fastssl._host")
    except ModuleNotFoundError:
        report = Path(__file__).resolve().parent / "_build_report.json"  # what the installation left out, and why
        left_out = json.loads(report.read_text()) if report.exists() else {}
        return f"compiled module _host was not built: {left_out.get('host', 'pip install fastssl')}"
    except ImportError as error:
        return f"_host does not load: {error}"
    return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    import platform

    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _torch_build() -> str:
    import torch

    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"


def _parser(command: str, description: str, *, defaults: Sequence[Path] = ()) -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"fastssl {command}",
        description=description,
        allow_abbrev=False,
        default_config_files=[glob.escape(str(path)) for path in defaults],
    )


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar; errors go to the error output."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich import get_console

        if record.levelno >= logging.ERROR:
            print(f"fastssl: {self.format(record)}", file=sys.stderr)
            return
        get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def _log_to_console(level: int = logging.INFO) -> None:
    package = logging.getLogger("fastssl")
    package.handlers = [_ConsoleHandler()]
    package.setLevel(level)
