"""Read Lhotse manifests without running or fetching anything that they name.

A Lhotse audio source may be a shell command or a URL, and a manifest may be an untrusted file. So every source must
be a file or bytes, wherever it occurs: among a recording's sources, in the impulse response of a transform, in a custom
field or in a track of a mixed cut.

A manifest may also be damaged. A line that cannot be used is reported by its number, and the others are still used. A
file that breaks off is refused, because nobody knows what is missing.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import Recording
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from fastssl.regular import UnusableFileError, size_of

#: "shar" is a placeholder for audio in the tar file of the same shard; Lhotse cannot read it by itself.
_SOURCE_TYPES = ("file", "memory", "shar")
_LONGEST_LINE = 2**24  # bytes
# A manifest shrinks to a tenth of its size; one of windows whose names are long, to a hundredth. What unpacks to more
# bytes than both of these was made to take up time.
_LARGEST_GROWTH, _SMALLEST_SUSPECT = 500, 2**26  # the second in bytes
_MOST_BLANK = 100_000  # lines, besides half of all
# Lhotse's fields are nested 10 deep at most. Python could parse deeper values than it can copy or write.
_DEEPEST = 100


class BadLineError(ValueError):
    """A line of a manifest, or the recording that it describes, cannot be used.

    The message is a predicate ("is not valid JSON: ..."); callers put the manifest and the line number in front of it.
    """


class ForbiddenSourceError(BadLineError):
    """A manifest contains an audio source that would be run or fetched."""


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadLineError]]:
    """Yield the lines of a `.jsonl` or `.jsonl.gz` file, without the blank ones.

    Args:
        path: Path of the manifest.

    Yields:
        (number of the line, from 1 on; its decoded JSON, or what is wrong with it).

    Raises:
        ValueError: The file cannot be read to its end, or is not a regular file.
    """
    not_one = f"source: {path} is not a Lhotse manifest of cuts or recordings"
    number = blank = 0
    try:
        most = max(_SMALLEST_SUSPECT, _LARGEST_GROWTH * size_of(path))
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                most -= len(line)
                if most < 0:
                    raise ValueError(f"{not_one}: it unpacks to more than {_LARGEST_GROWTH} times its size")
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"{not_one}: line {number} is longer than {_LONGEST_LINE // 2**20} MB")
                if line.isspace():
                    blank += 1
                    if blank > number // 2 + _MOST_BLANK:
                        raise ValueError(f"{not_one}: {blank} of its first {number} lines are blank")
                    continue
                value = parse(line)
                if isinstance(value, BadLineError) and number > 1 and not line.endswith(b"\n"):
                    number -= 1
                    raise EOFError("the next line is cut off")
                yield number, value
    except UnusableFileError as error:
        raise ValueError(f"{not_one}: it {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        if number == 0:
            raise ValueError(f"{not_one}: {error}") from error
        raise ValueError(
            f"source: {path} is damaged after line {number}, and what follows is lost: {error}; copy or make it again"
        ) from error


def parse(line: bytes) -> dict[str, Any] | BadLineError:
    """Decode the JSON of a line, or return what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8-sig"))  # Windows begins a file with a mark
    except json.JSONDecodeError as error:
        return BadLineError(f"is not valid JSON: {error.msg} at character {error.pos + 1}")
    # `RecursionError`: nested too deeply. `ValueError`: not UTF-8, or an integer of 5,000 digits.
    except (ValueError, RecursionError) as error:
        return BadLineError(f"is not valid JSON: {shortened(error)}")
    if not isinstance(value, dict):
        return BadLineError("is not a cut or a recording, although it is valid JSON")
    return value


def deserialize(line: dict[str, Any]) -> Cut:
    """Build the cut that a line of a manifest describes; a recording becomes a cut of all of it.

    Its fields may still have any type and value: `checks.py` looks at those that are used.

    Args:
        line: The decoded JSON of the line.

    Raises:
        BadLineError: The line describes something else, such as a supervision, or is nested more than 100 deep.
        ForbiddenSourceError: The line has an audio source that is neither a file nor bytes.
    """
    check_sources(line)
    try:
        expected = count_transforms(line)
        item = deserialize_item(line)
        cut = item.to_cut() if isinstance(item, Recording) else item
        complete = count_transforms(cut) == expected
    # Lhotse checks no types, so any exception is possible. Every one means that the line is bad.
    except Exception as error:
        raise BadLineError(f"is not a cut or a recording: {type(error).__name__}: {shortened(error)}") from error
    if not isinstance(cut, Cut):
        raise BadLineError(f"is not a cut or a recording, but a {type(cut).__name__}")
    if not complete:  # Lhotse leaves out all transforms of a recording if one of them lacks a field
        raise BadLineError("has a transform, or an impulse response, that lacks a field such as name or kwargs")
    return cut


def count_transforms(item: object) -> int:
    """Return the number of transforms of a recording, including those of its impulse responses.

    Args:
        item: A cut or a recording, or the JSON of one. Anything else has no transforms.
    """
    recording = _field(item, "recording") or item
    transforms = _field(recording, "transforms")
    if not isinstance(transforms, list):
        return 0
    options = [_field(one, "kwargs") if isinstance(one, dict) else one for one in transforms]
    return len(transforms) + sum(count_transforms(_field(one, "rir")) for one in options)


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else getattr(item, name, None)


def shortened(value: object) -> str:
    """Return the text of a value from a manifest for a message, at most 100 characters of it on one line."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # an integer of 5,000 digits
        text = "a huge number"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_sources(value: object) -> None:
    """Refuse an audio source that is neither a file nor bytes, anywhere in a serialised manifest item.

    Args:
        value: Any nesting of dictionaries, lists and tuples.

    Raises:
        ForbiddenSourceError: `value` contains such a source; the message names its type.
        BadLineError: `value` is nested more than 100 deep.
    """
    level, depth = [value], 0
    while level:
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                # lhotse.AudioSource cannot be built without these keys.
                is_source = item.keys() >= {"type", "channels", "source"}
                if is_source and item["type"] not in _SOURCE_TYPES:
                    raise ForbiddenSourceError(
                        f"has an audio source of type {shortened(item['type'])!r}; expected a file or bytes, because "
                        "commands are never run and URLs are never fetched. Save the audio as a file first"
                    )
                below += item.values()
            elif isinstance(item, list | tuple):
                below += item
        level, depth = below, depth + 1
        if depth > _DEEPEST:
            raise BadLineError(f"is nested more than {_DEEPEST} deep")
