"""The log of a run: RUN/logs/pretrain.log, without Lightning's messages."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastssl.files import WriteError, append_text
from fastssl.names import ShownFormatter


class _LogFile(logging.Handler):
    """Handler that appends each message to a file at once, and never through a symbolic link."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        append_text(path, "")  # raises an error if the file cannot be written

    def emit(self, record: logging.LogRecord) -> None:
        # On a full disk the message is still on the console, and the next row of metrics.csv stops the run.
        with suppress(WriteError):
            append_text(self.path, f"{self.format(record)}\n")


@contextmanager
def log_to(path: Path, *, enabled: bool) -> Iterator[None]:
    """Append the package's log messages to a file.

    Raises:
        WriteError: The file cannot be written.
    """
    if not enabled:
        yield
        return
    package = logging.getLogger("fastssl")
    handler = _LogFile(path)
    handler.setFormatter(ShownFormatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages and warnings, except errors."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [lightning.level for lightning in loggers]
    for lightning in loggers:
        lightning.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        for lightning, level in zip(loggers, levels, strict=True):
            lightning.setLevel(level)
