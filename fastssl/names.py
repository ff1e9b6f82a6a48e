r"""File names of any bytes: how to hash, store, open and show them.

Linux allows every byte but "/" and NUL in a name. Python gives a byte that is not UTF-8 as a lone surrogate
(`os.fsdecode(b"\xf1") == "\udcf1"`), which UTF-8 cannot encode. A name may also contain line breaks and the escape
sequences of a terminal. A name that is valid UTF-8 keeps its bytes in every hash and in every file. Other names:

- in a hash: `encoded`;
- in JSON: the escapes of `json.dumps` (`json_line` for whole lines), which `json.loads` reads back;
- as a safetensors key or a YAML value: `stored`, and `restored` to read it back;
- opened by a library that takes only short UTF-8 paths: `plain_path`;
- in messages, logs and tables: `shown` (one line) or `shown_lines`.
"""

import copy
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

#: libsndfile refuses paths of 1024 bytes or more; Linux allows 4096.
_LONGEST_PLAIN_PATH = 1000
#: Control characters, surrogates, line and paragraph separators, and characters that only change their neighbours.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
#: Zero-width joiner and non-joiner, which many scripts and emoji need.
_JOINERS = "\u200c\u200d"


def encoded(name: str) -> bytes:
    """Return the bytes of a name for a hash: its UTF-8, in which a lone surrogate has three bytes of its own.

    Different names have different bytes. They are not the bytes of the file name on disk; `os.fsencode` returns those.

    Args:
        name: Any text.
    """
    return name.encode("utf-8", "surrogatepass")


def is_utf8(name: str) -> bool:
    """Return whether a name can be encoded as UTF-8.

    Args:
        name: Any text.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def stored(name: str) -> str:
    """Return a name in a form that safetensors and every YAML parser accept; `restored` is the inverse.

    Args:
        name: Any text.

    Returns:
        The name itself if it is ordinary. A name that is not valid UTF-8 becomes its JSON string, in quotes and with
        escapes; so does a name in quotes (`restored` would remove them) and safetensors' own key `__metadata__`.
    """
    quoted = len(name) > 1 and name[0] == name[-1] == '"'
    return json.dumps(name) if quoted or name == "__metadata__" or not is_utf8(name) else name


def restored(text: str) -> str:
    """Return the name that `stored` turned into a text.

    Args:
        text: Result of `stored`.
    """
    if len(text) < 2 or not text[0] == text[-1] == '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:  # written by hand
        return text


def json_line(values: Any) -> str:
    """Format values as one line of JSON, newline included; UTF-8 can encode it, whatever names the values contain.

    Args:
        values: Values that JSON can represent.
    """
    line = json.dumps(values, ensure_ascii=False)
    return (line if is_utf8(line) else json.dumps(values)) + "\n"


@contextmanager
def plain_path(path: str | PurePath) -> Iterator[str]:
    """Let a library open a file or folder whose path it would refuse, because it is not UTF-8 or is very long.

    Args:
        path: An existing file or folder.

    Yields:
        The path itself if it is plain. Otherwise a path in /proc, valid only inside the `with` block; what is opened
        there stays open.

    Raises:
        OSError: The path is not plain, and it does not exist or cannot be read.
    """
    text = str(path)
    if is_utf8(text) and len(os.fsencode(text)) <= _LONGEST_PLAIN_PATH:
        yield text
        return
    file = os.open(text, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def named_again(text: str, path: object) -> str:
    """Return a library's message about a file with its path in place of the one that `plain_path` gave.

    Args:
        text: The message.
        path: Path of the file.
    """
    return re.sub(r"/proc/self/fd/\d+", lambda _: str(path), text)


def shown(name: object) -> str:
    r"""Return a name as people may read it: on one line, without characters that a terminal would obey.

    Such characters become escapes, which bash understands in `$'...'`: `\n`, `\x1b`, and `\xf1` for a byte that is
    not UTF-8. All others, such as brackets and accents, stay as they are.

    Args:
        name: A name, or an object to show as `str` formats it.
    """
    text = str(name)
    return text if text.isprintable() else "".join(map(_shown_character, text))


def shown_lines(text: str) -> str:
    """Return a message of one or more lines with each line as `shown` returns it.

    Args:
        text: The message.
    """
    return "\n".join(map(shown, text.split("\n")))


def _shown_character(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class ShownFormatter(logging.Formatter):
    """Formats log messages so that a name in them takes one line and does nothing to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; texts and paths among its arguments are names.

        Args:
            record: Record to format; it stays as it is.
        """
        record = copy.copy(record)
        if isinstance(record.args, tuple):
            record.args = tuple(shown(one) if isinstance(one, str | PurePath) else one for one in record.args)
        return shown_lines(super().format(record))
