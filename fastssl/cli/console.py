"""What a command prints while it works."""

import logging
import sys


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar; errors go to the error output."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich import get_console

        if record.levelno >= logging.ERROR:
            print(f"fastssl: {self.format(record)}", file=sys.stderr)
            return
        get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def log_to_console(level: int = logging.INFO) -> None:
    """Print what the package logs."""
    package = logging.getLogger("fastssl")
    package.handlers = [_ConsoleHandler()]
    package.setLevel(level)
