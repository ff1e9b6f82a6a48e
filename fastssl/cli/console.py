"""Print a command's messages on the console, whatever characters they contain."""

import io
import logging
import sys
from collections.abc import Sequence

from fastssl.names import ShownFormatter, shown, shown_lines


class _ConsoleHandler(logging.Handler):
    """Prints messages above the progress bar, and errors to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(ShownFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        from rich import get_console
        from rich.text import Text

        if record.levelno >= logging.ERROR:
            print(f"fastssl: {self.format(record)}", file=sys.stderr)
            return
        # A plain string would be searched for markup and for emoji codes such as ":car:".
        get_console().print(Text(self.format(record)), soft_wrap=True)


def log_to_console(level: int = logging.INFO) -> None:
    """Print the package's log messages.

    Args:
        level: Lowest level to print, as in `logging`.
    """
    package = logging.getLogger("fastssl")
    package.handlers = [_ConsoleHandler()]
    package.setLevel(level)


def print_error(command: str, error: Exception, arguments: Sequence[str]) -> None:
    """Print why a command failed to standard error.

    Args:
        command: Name of the command.
        error: The exception; its message may have several lines.
        arguments: The command's arguments, as typed; a line break in them, unlike one in the message, is an escape.
    """
    text = str(error)
    for argument in arguments:
        if "\n" in argument:
            name = argument.partition("=")[2] if argument.startswith("--") else argument
            text = text.replace(name, shown(name))
    print(f"fastssl {command}: {shown_lines(text)}", file=sys.stderr)


def accept_any_character() -> None:
    """Let standard output and standard error print escapes for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
