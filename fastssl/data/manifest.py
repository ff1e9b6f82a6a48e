"""Read Lhotse manifests without running or fetching anything that they name.

A Lhotse audio source may be a shell command or a URL, and a manifest may be an untrusted file. So every source must
be a file or bytes, wherever it occurs: among a recording's sources, in the impulse response of a transform, in a custom
field or in a track of a mixed cut.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import Recording
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item, load_jsonl

#: "shar" is a placeholder for audio in the tar file of the same shard; Lhotse cannot read it by itself.
_SOURCE_TYPES = ("file", "memory", "shar")


class ForbiddenSourceError(ValueError):
    """A manifest contains an audio source that would be run or fetched.

    The message is a predicate ("has an audio source of type ..."); callers put the name of the manifest in front of it.
    """


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a `.jsonl` or `.jsonl.gz` file as dictionaries.

    The path is made absolute, because Lhotse would run a name that begins with "pipe:" as a command.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is not valid JSON.
    """
    yield from load_jsonl(path.absolute())


def deserialize(line: dict[str, Any]) -> Cut | Recording:
    """Build the cut or recording that a line of a manifest describes.

    Args:
        line: The decoded JSON of the line.

    Raises:
        ForbiddenSourceError: The line has an audio source that is neither a file nor bytes.
        TypeError: The line describes something else, such as a supervision.
    """
    check_sources(line)
    item = deserialize_item(line)
    if not isinstance(item, Cut | Recording):
        raise TypeError(f"expected a line with a cut or a recording, got a {type(item).__name__}")
    return item


def check_sources(value: object) -> None:
    """Refuse an audio source that is neither a file nor bytes, anywhere in a serialised manifest item.

    Args:
        value: Any nesting of dictionaries, lists and tuples.

    Raises:
        ForbiddenSourceError: `value` contains such a source; the message names its type.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            # lhotse.AudioSource cannot be built without these keys.
            is_source = item.keys() >= {"type", "channels", "source"}
            if is_source and item["type"] not in _SOURCE_TYPES:
                raise ForbiddenSourceError(
                    f"has an audio source of type {item['type']!r}; expected a file or bytes, because commands are "
                    "never run and URLs are never fetched. Save the audio as a file first"
                )
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
