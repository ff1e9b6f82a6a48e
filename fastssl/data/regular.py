"""Check that a path is a regular file before it is opened, because opening a pipe or a device may block for ever."""

import os
import stat
from pathlib import Path


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
    status = _status(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFileError("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
    return status.st_size


def is_folder(path: str | Path) -> bool:
    """Return whether a path is that of a folder, or of something else that exists.

    Args:
        path: Path of a file or folder; links are followed.

    Raises:
        UnusableFileError: The path does not exist, or its status cannot be read.
    """
    return stat.S_ISDIR(_status(path).st_mode)


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116  (a string costs less, and a corpus has a million)
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableFileError("does not exist") from None
    except OSError as error:
        raise UnusableFileError(f"cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a null character, or one that no file name can contain
        raise UnusableFileError(f"is not the name of a file: {error}") from None
