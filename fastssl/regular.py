"""Look at a file before it is opened: opening a pipe may block for ever, and so may a decoder in a file of holes."""

import errno
import os
import stat
from pathlib import Path

# In these formats, a header says where the samples are. In the others (Ogg, FLAC, MP3), decoders look for the next
# frame, or for the last page, byte by byte: an hour for each terabyte.
_NOT_SEARCHED = (b".snd", b"FORM", b"NIST", b"RF64", b"RIFF", b"RIFX", b"caff", b"dns.", b"riff")
# Compressed audio does not contain so many zeros, and a decoder passes them in a second.
_MOST_HOLES = 2**28  # bytes


class UnusableFileError(Exception):
    """The path does not name a regular file that can be read.

    The message is a predicate ("does not exist"); callers put the path in front of it.
    """


def size_of(path: str | Path) -> int:
    """Return the size in bytes of a regular file, without opening it.

    Args:
        path: Path of the file; links are followed.

    Raises:
        UnusableFileError: The file does not exist, its status cannot be read, or it is a folder, a FIFO, a socket or a
            device.
    """
    return _regular(path).st_size


def check_audio(path: str | Path) -> int:
    """Return the size of an audio file in bytes; refuse one that a decoder cannot open, or would search for hours.

    Costs no more than `size_of` unless the file takes up much less space than its size.

    Args:
        path: Path of an audio file; links are followed.

    Raises:
        UnusableFileError: As in `size_of`; or the file is compressed audio with holes of more than 256 MB.
    """
    status = _regular(path)
    if status.st_size - 512 * status.st_blocks <= _MOST_HOLES:
        return status.st_size
    try:
        with Path(path).open("rb") as file:
            if file.read(4) not in _NOT_SEARCHED:
                _check_holes(file.fileno(), 0, status.st_size)
    except OSError as error:
        raise UnusableFileError(f"cannot be read: {error.strerror}") from None
    return status.st_size


def check_part(file: int, first: int, size: int) -> None:
    """Refuse a part of a file, to be read into memory, if it was never written: it takes up more memory than space.

    Args:
        file: Descriptor of the open file; its position changes.
        first: First byte of the part.
        size: Bytes of the part.

    Raises:
        UnusableFileError: The part has holes of more than 256 MB.
    """
    if size > _MOST_HOLES:
        _check_holes(file, first, first + size)


def _check_holes(file: int, at: int, end: int) -> None:
    """Refuse holes, which a file system reports, but not zeros that were written and take up space or compress."""
    holes = 0
    while at < end:
        try:
            data = os.lseek(file, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a file system that does not say
                return
            if error.errno != errno.ENXIO:
                raise
            data = end  # a hole up to the end
        holes += min(data, end) - at
        if holes > _MOST_HOLES:
            raise UnusableFileError(
                f"has holes of more than {_MOST_HOLES >> 20} MB, which were never written; copy or download it again"
            )
        at = os.lseek(file, data, os.SEEK_HOLE) if data < end else end


def is_folder(path: str | Path) -> bool:
    """Return whether a path is that of a folder, or of something else that exists.

    Args:
        path: Path of a file or folder; links are followed.

    Raises:
        UnusableFileError: The path does not exist, or its status cannot be read.
    """
    return stat.S_ISDIR(_status(path).st_mode)


def _regular(path: str | Path) -> os.stat_result:
    status = _status(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFileError("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
    return status


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116  (a string costs less, and a corpus has a million)
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableFileError("does not exist") from None
    except OSError as error:
        raise UnusableFileError(f"cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a null character, or one that no file name can contain
        raise UnusableFileError(f"is not the name of a file: {error}") from None
