"""The `fastssl` command line: a table of commands, each the function of the same name in a module.

A command imports only its own module, so `info` and `--help` answer at once.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import NamedTuple

from fastssl import __version__
from fastssl.cli.console import accept_any_character, print_error
from fastssl.cli.installation import stranger_of_the_same_name
from fastssl.files import WriteError


class _Command(NamedTuple):
    summary: str
    module: str
    positionals: tuple[str, ...] | None = None  # parameters given by position; if None, the function parses everything


_COMMANDS = {
    "pretrain": _Command("train an encoder on a folder of audio", "cli.pretrain"),
    "distill": _Command("train a small encoder to imitate a large one", "cli.pretrain"),
    "report": _Command("draw the figure of a run, also while it trains", "cli.report", ("run",)),
    "extract": _Command("write the features of every recording", "eval.extract", ("model", "audio")),
    "label": _Command(
        "cluster the frames of every recording, for HuBERT or a compressor to learn from",
        "eval.label.command",
        ("audio",),
    ),
    "quality": _Command(
        "measure how good each layer of an encoder is, without labels", "eval.quality.command", ("model", "audio")
    ),
    "probe": _Command("compare frozen encoders by training linear heads", "eval.probe.command", ("model", "table")),
    "prepare": _Command("scan a folder once and write a manifest (optional)", "cli.prepare", ("audio",)),
    "info": _Command("show which kernels each op has, and why any is missing", "cli.info"),
    "check": _Command("run every kernel here, beside the reference and beside PyTorch", "cli.check.command"),
}
#: Commands that need only what `import fastssl` needs, and the packages that all others need.
_CORE_COMMANDS = ("info", "check")
_TRAIN_EXTRA = ("jsonargparse", "lhotse", "lightning", "matplotlib", "rich", "sklearn", "soundfile", "tensorboard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its arguments; None takes those of this process.

    Returns:
        The exit status: 0, 1 after an error, or 130 after Ctrl-C.

    Raises:
        SystemExit: A signal has ended a training run after a checkpoint, with status 130 or 143; or options are wrong.
    """
    accept_any_character()
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = _parser().parse_args(given[:1]).command
    command = _COMMANDS[name]
    missing = [] if name in _CORE_COMMANDS else [package for package in _TRAIN_EXTRA if util.find_spec(package) is None]
    if missing:
        print(
            f"fastssl {name} needs {', '.join(missing)}: run `pip install '.[train]'` in a clone of the project, or "
            "install its wheel with [train] after the file name",
            file=sys.stderr,
        )
        if (warning := stranger_of_the_same_name()) is not None:
            print(warning, file=sys.stderr)
        return 1
    try:
        function = getattr(importlib.import_module(f"fastssl.{command.module}"), name)
        if command.positionals is None:
            function(given[1:])
        else:
            from fastssl.cli.signature import call

            call(name, function, command.positionals, given[1:])
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        print_error(name, error, given[1:])
        return 1
    except WriteError as error:
        again = "again, with --resume if the run had begun" if name in ("pretrain", "distill") else "again"
        print(f"fastssl {name}: {error.option or '--output'}: {error}; then run the command {again}", file=sys.stderr)
        return 1
    except (ConnectionError, EOFError) as error:
        if not _is_of_a_process(error):
            raise
        print_error(name, _worker_ended(name), given[1:])
        return 1
    except OSError as error:
        # Whatever a file of the user's refuses, and nobody has turned into a better message.
        if error.filename is None:
            raise
        reason = ValueError(f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and its permissions")
        print_error(name, reason, given[1:])
        return 1
    except RuntimeError as error:
        from fastssl.train.module import TrainingError

        if isinstance(error, TrainingError):
            return 1  # the message is already in the log, once for all processes
        if not str(error).startswith("DataLoader worker"):
            raise
        print_error(name, _worker_ended(name), given[1:])
        return 1
    except KeyboardInterrupt:
        print(f"fastssl {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _is_of_a_process(error: Exception) -> bool:
    """Return whether an error arose while a batch was taken from another process, which must have ended."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("multiprocessing.") for frame, _ in frames)


def _worker_ended(command: str) -> ValueError:
    options = {"pretrain": "--data.num_workers", "distill": "--data.num_workers", "label": "--num_workers"}
    # The other commands have no such option.
    without = f", or read without such processes ({options[command]} 0)" if command in options else ""
    return ValueError(
        f"a process that reads audio ended early; if the shared memory (/dev/shm) is full, make it larger{without}"
    )


def _parser() -> argparse.ArgumentParser:
    """Make the parser of the first argument, which names the command."""
    width = max(len(name) for name in _COMMANDS)
    parser = argparse.ArgumentParser(
        prog="fastssl",
        description="Self-supervised speech encoders that never compute padding.",
        epilog="commands:\n"
        + "".join(f"  {name:{width}}  {command.summary}\n" for name, command in _COMMANDS.items())
        + "\n`fastssl COMMAND --help` explains a command. To begin:\n"
        "  fastssl pretrain FOLDER --recipe wav2vec2-tiny --output runs/first",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastssl {__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help=", ".join(_COMMANDS))
    return parser


def _is_for_the_user(error: ValueError) -> bool:
    """Return whether fastssl itself raised the error; one from another package is a bug and keeps its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent.parent)
