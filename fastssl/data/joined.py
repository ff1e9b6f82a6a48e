"""Recognise joined files (`cat a.flac b.flac`), of which libsndfile reads only the first, or the next header as audio.

WAV and AIFF need no check, because libsndfile refuses them. Ogg and MP3 have their own (`ogg.py`, `mp3.py`).
"""

import math
import re
from pathlib import Path
from typing import BinaryIO, Literal

#: Formats of libsndfile that this module knows.
JOINABLE = {"AU", "CAF", "FLAC", "NIST", "RF64", "W64"}
_HEAD_BYTES = 4096
_PADDING = 16  # most bytes between one part and the next
_TAIL_BYTES = 1 << 12  # of a FLAC, after its last frame: tags
_BLOCK_BYTES = 1 << 20
_MOST_CHUNKS = 1000
_MOST_SEARCHED = 1 << 30  # bytes: about an hour in the largest FLAC; a sparse file may have a thousand times as many
#: The marker of a FLAC, and the header of its first block, which has 34 bytes.
_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")


def is_joined(path: Path, kind: str) -> bool:
    """Return whether another file of the same format follows in the file.

    Reads a few kB, and a FLAC whose last frame is not in its place once. Does not notice two FLACs of exactly the same
    number of samples, nor one that begins after 1 GB.

    Args:
        path: Path of an audio file.
        kind: Its format, one of `JOINABLE`.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if kind == "FLAC":
            return not _ends_as_said(file, head) and _contains_another(file)
        end = _end(file, head, kind)
        if end is None or end >= file.seek(0, 2):
            return False
        file.seek(end)
        marker = head[:6] if kind == "NIST" else head[:4]
        return marker in file.read(_PADDING + len(marker))


def _ends_as_said(file: BinaryIO, head: bytes) -> bool:
    """Return whether the last frame that the header of a FLAC promises is at the end; True if this cannot be known."""
    if not _FLAC.match(head) or len(head) < 42:
        return True
    least, most = int.from_bytes(head[8:10], "big"), int.from_bytes(head[10:12], "big")
    samples = int.from_bytes(head[21:26], "big") & (1 << 36) - 1
    if least != most or least == 0 or samples == 0:
        return True  # frames are not counted, but carry the number of their first sample
    number = (samples - 1) // least
    left = samples - number * least  # samples of the last frame; its header says how many if they are unusual
    largest = int.from_bytes(head[15:18], "big") or 8 * most
    size = file.seek(0, 2)
    file.seek(max(1, size - _TAIL_BYTES - largest))
    tail = file.read()
    sizes = rb"\xff\xf8(?:[\x60-\x6f].%b%b|[\x70-\x7f].%b%b|[^\x60-\x7f].%b)"
    coded = re.escape(_utf8(number))
    short, long = (re.escape((left - 1).to_bytes(count, "big")) if left <= 256**count else b"(?!)" for count in (1, 2))
    return _FLAC.search(tail) is None and re.search(sizes % (coded, short, coded, long, coded), tail, re.S) is not None


def _utf8(number: int) -> bytes:
    """Encode a frame's number as FLAC does, by the rule of UTF-8 for up to 31 bits."""
    if number < 0x80:
        return bytes([number])
    parts: list[int] = []
    while number >= 1 << 6 - len(parts):
        parts.append(0x80 | number & 0x3F)
        number >>= 6
    return bytes([0xFF00 >> len(parts) + 1 & 0xFF | number, *reversed(parts)])


def _contains_another(file: BinaryIO) -> bool:
    file.seek(1)
    before = b""
    while file.tell() < _MOST_SEARCHED and (block := file.read(_BLOCK_BYTES)):
        if _FLAC.search(before + block):
            return True
        before = block[-8:]
    return False


def _end(file: BinaryIO, head: bytes, kind: str) -> int | None:
    """Return where the header says that the file ends, or None if it does not say."""
    if kind == "AU":
        order: Literal["big", "little"] = "big" if head.startswith(b".snd") else "little"
        offset, size = (int.from_bytes(head[at : at + 4], order) for at in (4, 8))
        return offset + size if size < 2**32 - 1 else None
    if kind == "RF64":
        return int.from_bytes(head[20:28], "little") + 8 if head[12:16] == b"ds64" else None
    if kind == "W64":
        return int.from_bytes(head[16:24], "little")
    if kind == "NIST":
        fields = dict(re.findall(rb"(sample_count|sample_n_bytes|channel_count) -i (\d{1,15})", head))
        first = re.match(rb"NIST_1A\s+(\d{1,9})", head)
        size = math.prod(int(value) for value in fields.values())
        return int(first[1]) + size if first and len(fields) == 3 else None
    return _end_of_chunks(file)


def _end_of_chunks(file: BinaryIO) -> int | None:
    """Return where the chunks of a CAF end: where another file begins, or what follows cannot be a chunk."""
    end, size = 8, file.seek(0, 2)
    for _ in range(_MOST_CHUNKS):
        file.seek(end)
        header = file.read(12)
        length = int.from_bytes(header[4:], "big", signed=True)
        if len(header) < 12 or header.startswith(b"caff") or not 0 <= length <= size:
            return end
        end += 12 + length
    return None
