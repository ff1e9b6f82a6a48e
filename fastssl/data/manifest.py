"""Lines of Lhotse manifests as objects, with nothing in them run or fetched.

A Lhotse audio source may be a shell command or a URL. A manifest is data that a stranger may have written, so every
source in it has to be a file or bytes, at any depth: behind other sources, in the impulse response of a transform, in
a custom field, in the track of a mixed cut.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import Recording
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item, load_jsonl

#: "shar" is a placeholder for audio that is in the tar file beside the cuts; Lhotse cannot read it.
_SOURCE_TYPES = ("file", "memory", "shar")


class ForbiddenSourceError(ValueError):
    """A manifest holds an audio source that would be run or fetched; the message does not name the manifest."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `.jsonl` or `.jsonl.gz` file.

    The path is made absolute, because Lhotse takes a name that begins with "pipe:" for a command.
    """
    yield from load_jsonl(path.absolute())


def deserialize(line: dict[str, Any]) -> Cut | Recording:
    """The cut or recording that a line describes.

    Raises:
        ForbiddenSourceError: It has an audio source that is neither a file nor bytes.
        TypeError: It describes something else.
    """
    check_sources(line)
    item = deserialize_item(line)
    if not isinstance(item, Cut | Recording):
        raise TypeError(f"expected a cut or a recording, got a {type(item).__name__}")
    return item


def check_sources(value: object) -> None:
    """Refuse an audio source that is neither a file nor bytes, anywhere in a serialised manifest item.

    Raises:
        ForbiddenSourceError: There is one; the message gives its type.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            # What lhotse.AudioSource cannot be built without.
            is_source = item.keys() >= {"type", "channels", "source"}
            if is_source and item["type"] not in _SOURCE_TYPES:
                raise ForbiddenSourceError(
                    f"has an audio source of type {item['type']!r}; only files and bytes are read, commands are never "
                    "run and URLs are never fetched"
                )
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
