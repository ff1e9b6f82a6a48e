"""Read files that others wrote: only regular files of bounded size, with errors that stay on one short line."""

import json
import reprlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from fastssl.names import shown
from fastssl.regular import UnusableFileError, size_of

#: Largest file of settings that is read. The settings of a run take about 3 kB, the index of a large model 200 kB.
MOST_BYTES = 1 << 22
#: Deepest nesting of lists and objects in a file of settings; the deepest that is used is 3.
MOST_LEVELS = 32
_LONGEST_LINE = 1 << 26  # bytes; the labels of a recording of ten hours take about 8 MB
_LONGEST = 200  # characters of a name in a message


def check_file(path: Path) -> int:
    """Check that a path is a regular file or a link to one; to read anything else may block, or never end.

    Args:
        path: File to read.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: The file is missing, cannot be reached, or is a folder, a pipe, a socket or a device.
    """
    try:
        return size_of(path)
    except UnusableFileError as error:
        raise ValueError(f"{path}: {error}; check the path and its permissions, or restore the file") from None


def read_text(path: Path) -> str:
    """Read a file of settings.

    Args:
        path: Text file in UTF-8 of at most `MOST_BYTES`.

    Raises:
        ValueError: The path is not a regular file, or the file is too large, unreadable, or not in UTF-8.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: is larger than {MOST_BYTES >> 20} MB, so it is not a file of settings; restore it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start}); restore it") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: File as for `read_text`, nested at most `MOST_LEVELS` deep.

    Returns:
        Values by name.

    Raises:
        ValueError: As in `read_text`, or the file is not valid JSON, has a name twice in an object, is not an object,
            or is nested too deeply.
    """
    text = read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}; restore the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain a JSON object, got a {type(values).__name__}")
    if too_deep(values):
        raise ValueError(f"{path}: is nested more than {MOST_LEVELS} levels deep; restore the file")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, whose last value for a name would silently hide the others."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{brief(name)} occurs twice in an object")
        values[name] = value
    return values


def complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, but not an unfinished last line, which a killed process leaves.

    Args:
        path: Text file, each line at most 64 MB.

    Raises:
        ValueError: A line is longer.
    """
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(_LONGEST_LINE + 1)
            if len(line) > _LONGEST_LINE:
                raise ValueError(f"{path}: line {number} is longer than {_LONGEST_LINE >> 20} MB; restore the file")
            if not line.endswith(b"\n"):
                return
            yield number, line


def too_deep(value: Any, levels: int = MOST_LEVELS) -> bool:
    """Return whether lists and dictionaries are nested more than `levels` deep."""
    if not isinstance(value, (dict, list)):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(too_deep(part, levels - 1) for part in parts)


def brief(value: object) -> str:
    """Describe a value from a file in an error message: as `repr` does, but short and on one line.

    Args:
        value: Any value; `repr` escapes the control characters of a text.
    """
    try:
        shown = _BRIEF.repr(value)
        return shown if len(shown) <= 2 * _LONGEST else shown[: 2 * _LONGEST] + "..."
    except ValueError:  # an integer of more digits than Python converts to decimal
        return "a number that is too long to show"


def printable(text: object) -> str:
    r"""Show a name from a file in a message: control characters are escaped as in `\x1b`, and a long name is cut.

    Otherwise, a name could move the cursor, change colours or fake another line.

    Args:
        text: Name, such as a key of config.json or the name of a tensor.
    """
    name = str(text)
    cut = name if len(name) <= _LONGEST else name[:_LONGEST] + "..."
    return shown(cut)


def one_line(error: BaseException) -> str:
    """Return the first line of another package's error, which may quote a file, as `printable` shows it."""
    return printable(str(error).strip().partition("\n")[0] or type(error).__name__)


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _LONGEST
_BRIEF.maxlong = 40
_BRIEF.maxlist = _BRIEF.maxtuple = 8
