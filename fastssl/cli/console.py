"""Print a command's log messages on the console."""

import logging
import sys


class _ConsoleHandler(logging.Handler):
    """Prints messages above the progress bar, and errors to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich import get_console

        if record.levelno >= logging.ERROR:
            print(f"fastssl: {self.format(record)}", file=sys.stderr)
            return
        get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def log_to_console(level: int = logging.INFO) -> None:
    """Print the package's log messages.

    Args:
        level: Lowest level to print, as in `logging`.
    """
    package = logging.getLogger("fastssl")
    package.handlers = [_ConsoleHandler()]
    package.setLevel(level)
