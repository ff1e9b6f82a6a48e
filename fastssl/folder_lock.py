"""Let one process at a time write to a folder."""

import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastssl.files import make_folder, naming, remove_stale

logger = logging.getLogger(__name__)

#: Name of the file whose lock stands for the whole folder; it exists only while a process holds or wants the lock.
LOCK_FILE = ".lock"
#: Errors of file systems that have no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

# A lock of `flock` ends with its process, however that ends, and also keeps out the same process. A lock of `lockf`
# would end as soon as anything in the process closed the file. But a forked process, such as one that loads data,
# inherits a lock of `flock`, and would keep it for a while after its parent was killed. So it closes its copy at once.
_held: set[int] = set()


def _close_in_child() -> None:
    for number in _held:
        os.close(number)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def folder_lock(folder: Path, *, option: str, wait: bool = False) -> Iterator[None]:
    """Return a context manager that keeps other processes from a folder until it ends, or this process does.

    A file system that has no locks gets a warning. What killed processes left in the folder is removed.

    Args:
        folder: Folder to lock; it is created if missing, and removed again if it stays empty.
        option: Option of the command line that named the folder, for error messages.
        wait: Wait until the other process ends, instead of raising an error.

    Raises:
        ValueError: Another process holds the lock; the message names it.
        WriteError: The folder cannot be written.
    """
    created = not folder.exists()
    with naming(folder, option=option):
        number = _acquire(folder, option=option, wait=wait)
    _held.add(number)
    try:
        remove_stale(folder)
        yield
    finally:
        if number in _held:  # not in a forked process
            with suppress(OSError):
                (folder / LOCK_FILE).unlink(missing_ok=True)
            _held.remove(number)
            os.close(number)
            if created:
                with suppress(OSError):
                    folder.rmdir()  # fails if anything was written


def _acquire(folder: Path, *, option: str, wait: bool) -> int:
    """Return the descriptor of the folder's lock file, locked unless the file system has no locks."""
    path = folder / LOCK_FILE
    while True:
        make_folder(folder)  # a process that had the lock removes the folder if it stays empty
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _lock(number, folder, option=option, wait=wait)
            # The process that held the lock has removed the file: lock its successor.
            if not _is_same(number, path):
                os.close(number)
                continue
        except BaseException:
            os.close(number)
            raise
        with suppress(OSError):  # only for messages to other processes
            os.ftruncate(number, 0)
            os.pwrite(number, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        return number


def _lock(number: int, folder: Path, *, option: str, wait: bool) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(number)
        if not wait:
            raise ValueError(
                f"{option}: {folder} is in use by {holder}; wait for it, or choose another folder"
            ) from None
        logger.info("%s is in use by %s; waiting for it", folder, holder)
        fcntl.flock(number, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: %s is on a file system without locks (%s); make sure that only one process writes to it",
            option,
            folder,
            error.strerror,
        )


def _is_same(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.lstat())
    except FileNotFoundError:
        return False


def _holder(number: int) -> str:
    """Describe the process that holds a lock; it may not yet have written who it is."""
    found = re.fullmatch(r"(\d+) (\S+)\n", os.pread(number, 300, 0).decode(errors="replace"))
    return f"process {found[1]} on host {found[2]}" if found else "another process"
