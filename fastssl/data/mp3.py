"""Find the true length of an MP3, and let libsndfile read it whole.

An MP3 is a sequence of frames without a length. Encoders put it into the first frame ("Xing" or "Info"). Streamed,
piped and cut files have none, so libsndfile guesses one from the size of the file and the bit rate of the first frame.
Joined files (`cat a.mp3 b.mp3`) have that of their first part. In both cases libsndfile stops there. So the frames are
counted, and libsndfile gets the file without that first frame, and with a size from which it guesses a length that is
certainly too large. It then reads up to the true end.
"""

import io
import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

#: Differences up to this between a counted and a guessed length, in seconds, are not worth correcting.
TOLERANCE_S = 0.1
#: The decoder gives up when more bytes than this are not MP3 between two frames.
_LONGEST_GAP = 1024
#: Largest distance from the end of the ID3 tags to the first frame.
_SEARCHED_BYTES = 1 << 16
_BLOCK_BYTES, _LARGEST_FRAME = 1 << 20, 1 << 13

# In kbit/s, by (MPEG-1 or not, layer).
_KBPS = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


class Mp3Error(Exception):
    """An MP3 cannot be read whole; the message is a predicate, like that of an `AudioError`."""


class _Kind(NamedTuple):
    """What all frames of a recording have in common."""

    version: int  # 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    layer: int
    rate_hz: int
    mono: bool

    @property
    def samples(self) -> int:
        """Samples of a frame."""
        return 384 if self.layer == 1 else 576 if self.layer == 3 and self.version != 3 else 1152


class _Header(NamedTuple):
    kind: _Kind
    size: int  # bytes of the frame; 0 if the header does not say (free format)
    padding: int  # bytes of padding


class _Start(NamedTuple):
    """The first frame of a file."""

    at: int
    size: int
    kind: _Kind
    free_size: int  # bytes of an unpadded frame of free format; 0 for any other
    announces: bool  # whether this frame contains a length instead of audio
    length: int  # bytes of the recording from `at` on that it announces; 0 if libsndfile finds no length in it

    @property
    def after(self) -> int:
        """Where audio begins."""
        return self.at + self.size if self.announces else self.at


@lru_cache(maxsize=4096)
def _header(second: int, third: int, fourth: int) -> _Header | None:
    """Read a frame's header from its second to fourth byte; None if it is not one. The first byte is always 0xFF."""
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    bits, rate = third >> 4, third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or bits == 15 or rate == 3 or fourth & 3 == 2:
        return None
    rate_hz = _RATES_HZ[version][rate]
    kind = _Kind(version, layer, rate_hz, fourth >> 6 == 3)
    bytes_per_second = _KBPS[version == 3, layer][bits] * 125
    padding = third >> 1 & 1
    if layer == 1:
        return _Header(kind, 4 * (96 * bytes_per_second // rate_hz + padding) if bits else 0, 4 * padding)
    size = kind.samples * bytes_per_second // rate_hz + padding if bits else 0
    return _Header(kind, size, padding)


def _header_at(data: bytes, at: int) -> _Header | None:
    if at + 4 > len(data) or data[at] != 0xFF:
        return None
    return _header(data[at + 1], data[at + 2], data[at + 3])


def _free_size(data: bytes, at: int) -> int:
    """Return the bytes of an unpadded frame of free format: up to the next frame with the same header; 0 if none."""
    begin = at + 4
    while (begin := data.find(data[at : at + 2], begin, at + _LARGEST_FRAME)) > 0:
        if begin + 2 < len(data) and (data[begin + 2] ^ data[at + 2]) & 0xFD == 0:
            return begin - at - (data[at + 2] >> 1 & 1)
        begin += 1
    return 0


def _tag_size(data: bytes, at: int) -> int:
    """Return the size in bytes of a tag (ID3 or APE) that begins here; 0 if none does."""
    head = data[at : at + 32]
    if head[:3] == b"ID3" and len(head) >= 10:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return 10 + size + (10 if head[5] & 0x10 else 0)
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size, flags = struct.unpack_from("<I4xI", head, 12)
        return 32 + int(size) if flags & 1 << 29 else 32
    return 128 if head[:3] == b"TAG" else 0


def _start(file: BinaryIO, at: int = 0) -> _Start | None:
    """Find the first frame after the tags at a place: a header with another of the same kind where its frame ends."""
    while True:
        file.seek(at)
        data = file.read(_SEARCHED_BYTES)
        if (size := _tag_size(data, 0)) == 0:
            break
        at += size
    begin = 0
    while (begin := data.find(b"\xff", begin)) >= 0:
        header = _header_at(data, begin)
        if header is not None:
            free = 0 if header.size else _free_size(data, begin)
            size = header.size or free + header.padding
            following = _header_at(data, begin + size)
            if following is not None and following.kind == header.kind and size > 4:
                return _Start(at + begin, size, header.kind, free, *_announced(data[begin : begin + size]))
        begin += 1
    return None


def _announced(frame: bytes) -> tuple[bool, int]:
    """Return the fields `announces` and `length` of a `_Start`."""
    if frame.find(b"VBRI", 4, 48) > 0:
        return True, 0  # libsndfile does not read this kind
    at = max(frame.find(b"Xing", 4, 48), frame.find(b"Info", 4, 48))
    if at < 0 or len(frame) < at + 16:
        return False, 0
    flags, frames, length = struct.unpack_from(">III", frame, at + 4)
    return True, int(length) if flags & 3 == 3 and frames else 0


def count_samples(path: Path, guess: int) -> int:
    """Return the number of samples of an MP3, counted if its header cannot be believed.

    A header is believed if it gives the size of the file, apart from tags. Only the first frame is then read, and a few
    bytes from where the recording should end. Otherwise all frames are counted.

    Args:
        path: Path of the file.
        guess: Number of samples according to libsndfile.

    Returns:
        The guess if it is right to 0.1 s, else the counted number.

    Raises:
        Mp3Error: Frames of another kind follow, or bytes that are not MP3 and that the decoder does not skip.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        start = _start(file)
        if start is None or (start.length > 0 and _start(file, start.at + start.length) is None):
            return guess
        counted = _count(file, start) * start.kind.samples
    return guess if abs(counted - guess) <= TOLERANCE_S * start.kind.rate_hz else counted


def _count(file: BinaryIO, start: _Start) -> int:
    """Count the frames from the first one with audio to the end of the file."""
    base, at, frames, skipped = start.after, 0, 0, 0
    file.seek(base)
    data = file.read(_BLOCK_BYTES)
    while len(data) >= 4:
        last = len(data) < _BLOCK_BYTES
        end = len(data) - (4 if last else _LARGEST_FRAME)
        while at <= end:
            header = _header_at(data, at)
            size = 0 if header is None else header.size or start.free_size + header.padding
            if header is not None and header.kind == start.kind and 4 < size <= len(data) - at:
                following = _header_at(data, at + size) if skipped else header
                if following is not None and following.kind == start.kind:
                    if skipped > _LONGEST_GAP:
                        raise Mp3Error(
                            f"has {skipped} bytes that are not MP3 before byte {base + at}, where the decoder stops; "
                            "remove them, or convert the file, for example to FLAC"
                        )
                    frames, skipped, at = frames + 1, 0, at + size
                    continue
            elif (tag := _tag_size(data, at)) > 0:
                at += tag
                continue
            elif header is not None and not skipped:
                following = _header_at(data, at + size)
                if following is not None and following.kind == header.kind != start.kind:
                    raise Mp3Error(f"changes {_change(start.kind, header.kind)} at byte {base + at}; divide it there")
            begin = data.find(b"\xff", at + 1)
            begin = begin if begin > 0 else len(data)
            skipped, at = skipped + begin - at, begin
        if last and at <= len(data):
            break
        base, at = base + at, 0  # the place may lie beyond the block, after a tag
        file.seek(base)
        data = file.read(_BLOCK_BYTES)
    return frames


def _change(old: _Kind, new: _Kind) -> str:
    if old.rate_hz != new.rate_hz:
        return f"from {old.rate_hz} to {new.rate_hz} Hz"
    if old.mono != new.mono:
        return "from one channel to two" if old.mono else "from two channels to one"
    return f"from MPEG layer {old.layer} to {new.layer}"


def whole(file: BinaryIO) -> BinaryIO:
    """Return an MP3 that libsndfile reads up to its end, whatever its header says and its first frame suggests.

    Samples are those of the frames as they are. A length header also gives the delay of its encoder, which libsndfile
    removes together with its own; without the header, samples are that much later (1105 for most files by LAME).
    """
    start = _start(file)
    return io.BufferedReader(_Endless(file, 0 if start is None else start.after), 1 << 16)


class _Endless(io.RawIOBase):
    """A file from an offset on, which claims to be much larger than it is."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self.file, self.offset, self.at = file, offset, 0
        # No frame is 64 times as large as another of the same kind.
        self.size = 64 * (file.seek(0, io.SEEK_END) - offset) + (1 << 20)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        if self.at >= self.size - 128:
            data = bytes(min(len(buffer), self.size - self.at))  # the decoder looks for a tag at the end
        else:
            self.file.seek(self.offset + self.at)
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()
