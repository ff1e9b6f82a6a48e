"""The command line; a module per command.

Each command imports what it needs when it runs, so that `--help` and `info` answer at once.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from fastssl import __version__
from fastssl.cli.installation import stranger_of_the_same_name

_COMMANDS = {
    "pretrain": "train an encoder on a folder of audio",
    "distill": "train a small encoder to be like a large one",
    "extract": "write the features of every recording",
    "label": "cluster the frames of every recording, for HuBERT or a compressor to learn from",
    "quality": "measure how good each layer of an encoder is, without labels",
    "probe": "compare what linear heads read from frozen encoders",
    "prepare": "look through a folder once and write a manifest (optional)",
    "info": "show the kernels of each op, and why one is missing",
}
#: What the commands other than `info` import.
_TRAIN_EXTRA = ("jsonargparse", "lhotse", "lightning", "matplotlib", "rich", "sklearn", "soundfile", "tensorboard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    width = max(len(name) for name in _COMMANDS)
    parser = argparse.ArgumentParser(
        prog="fastssl",
        description="Self-supervised speech encoders that never compute padding.",
        epilog="commands:\n"
        + "".join(f"  {name:{width}}  {summary}\n" for name, summary in _COMMANDS.items())
        + "\n`fastssl COMMAND --help` explains a command. To begin:\n"
        "  fastssl pretrain FOLDER --recipe wav2vec2-tiny --output runs/first",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastssl {__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help=", ".join(_COMMANDS))
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    if command != "info":
        missing = [name for name in _TRAIN_EXTRA if util.find_spec(name) is None]
        if missing:
            print(
                f"fastssl {command} needs {', '.join(missing)}: run `pip install '.[train]'` in a clone of the "
                "project, or install its wheel with [train] after the file name",
                file=sys.stderr,
            )
            if (warning := stranger_of_the_same_name()) is not None:
                print(warning, file=sys.stderr)
            return 1
    try:
        importlib.import_module(f"fastssl.cli.{command}").run(given[1:])
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
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent.parent)
