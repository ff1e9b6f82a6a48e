"""Write files such that neither a kill, nor a full disk, nor a symbolic link damages what exists.

Everything that the package writes to a user's folder goes through this module. A file is replaced as a whole: it is
written under a temporary name in the same folder, forced to the disk, and renamed. Lines are appended as a whole, too.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# `_commit`, `_link`, `_write` and `_make` make all changes of what a folder contains; tests let them fail in turn.

#: A file that is being written lies in a folder with this prefix, beside its final place.
_PARTIAL = ".partial-"
#: Older files of this prefix were left by a killed process; a younger one may be in use by another process.
_STALE_S = 60.0
_ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ELOOP: "files are not written through links, so delete the link",
}


class WriteError(OSError):
    """The system refuses to write a file, for example because the disk is full. The message names the file."""

    #: Option of the command line that named the file or its folder; by default --output.
    option: str | None = None

    def __str__(self) -> str:
        """Return the message: which file, why, and what to do."""
        advice = _ADVICE.get(self.errno or 0, "choose another place")
        return f"{self.filename} cannot be written: {self.strerror}; {advice}"


@contextmanager
def naming(path: Path, *, option: str | None = None) -> Iterator[None]:
    """Return a context manager that turns an error of the system, raised inside it, into a `WriteError`.

    Args:
        path: File or folder that is being written.
        option: Option of the command line that named it, for the message.

    Raises:
        WriteError: The system refused to write.
    """
    try:
        yield
    except WriteError as error:
        error.option = error.option or option
        # A file inside a folder that is being written; say where it will be.
        error.filename = re.sub(rf"{re.escape(_PARTIAL)}[0-9a-f]+/", "", str(error.filename))
        raise
    except Exception as error:
        cause = _system_error(error)
        if cause is None or not _concerns(cause, path):
            raise
        found = WriteError(cause.errno, cause.strerror or str(cause), str(path))
        found.option = option
        raise found from error


def _system_error(error: Exception) -> OSError | None:
    """Return an error of the system, also if torch or safetensors replaced it by one of their own."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    if code := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(code[1]), os.strerror(int(code[1])))
    return error if isinstance(error, OSError) else None


def _concerns(error: OSError, path: Path) -> bool:
    """Return whether an error is about writing a path, not about reading another file for its content."""
    if error.filename is None:
        return True
    other = Path(os.fsdecode(error.filename))
    return other.is_relative_to(path.parent) or path.is_relative_to(other)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Return a context manager that gives a temporary path, and replaces `path` by what was written there.

    Readers see the old content or the new one, never a part, also after a kill or a loss of power. After an error the
    old content stays. The new file has the permissions of any new file, whatever the library that wrote it does.

    Args:
        path: File or folder to write; its folder must exist. A symbolic link is replaced, not followed. If a folder
            exists, its files are replaced one by one, after all of them were written; it keeps its other files.

    Yields:
        Path of the same name in a folder of its own; write a file or make a folder there.

    Raises:
        WriteError: The system refused to write.
    """
    room = path.with_name(f"{_PARTIAL}{secrets.token_hex(4)}")
    with naming(path):
        room.mkdir()
        try:
            partial = room / path.name
            yield partial
            if not partial.is_dir():
                probe = room / "new"
                probe.touch()
                partial.chmod(stat.S_IMODE(probe.stat().st_mode))  # safetensors makes files that only the owner reads
                _sync(partial)
            _commit(partial, path)
        finally:
            with suppress(OSError):
                shutil.rmtree(room)


def _commit(partial: Path, path: Path) -> None:
    """Give a complete file or folder its final name."""
    try:
        partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # A folder cannot take the place of one that has content, but each of its files can.
        for file in sorted(partial.iterdir()):
            file.replace(path / file.name)
        _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Force a file or a folder to the disk, where the file system can do so."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `replacing` does.

    Args:
        path: File to write; its folder must exist.
        text: Content.

    Raises:
        WriteError: The system refused to write.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as `replacing` does.

    Args:
        path: File to write; its folder must exist.
        values: Content, serialisable as JSON.

    Raises:
        WriteError: The system refused to write.
    """
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_first(path: Path, text: str) -> bool:
    """Write a text file in UTF-8, complete from the beginning, unless it exists.

    Args:
        path: File to write; its folder must exist.
        text: Content.

    Returns:
        Whether this call wrote the file; if several processes try at the same time, only one does.

    Raises:
        WriteError: The system refused to write.
    """
    room = path.with_name(f"{_PARTIAL}{secrets.token_hex(4)}")
    with naming(path):
        room.mkdir()
        try:
            (room / path.name).write_text(text, encoding="utf-8")
            _sync(room / path.name)
            return _link(room / path.name, path)
        finally:
            with suppress(OSError):
                shutil.rmtree(room)


def _link(partial: Path, path: Path) -> bool:
    try:
        os.link(partial, path)  # unlike a rename, it fails if the name is taken
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # This file system has no links. Two processes that begin at the same moment may then both think to be first.
        if os.path.lexists(path):
            return False
        partial.replace(path)
    _sync(path.parent)
    return True


def append(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Append to a file, which is created if missing; after an error the old content stays.

    Args:
        path: File to append to; its folder must exist. It must be a regular file, not a symbolic link.
        content: What to append.
        sync: Force the file to the disk before returning.

    Raises:
        WriteError: The system refused to write, or the file is a link.
    """
    # A pipe without a reader would block without O_NONBLOCK; for regular files the flag does nothing.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with naming(path):
        number = os.open(path, flags, 0o666)
        try:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            try:
                _write(number, content)
                if sync:
                    os.fsync(number)
            except BaseException:
                os.ftruncate(number, status.st_size)
                raise
        finally:
            os.close(number)


def _write(number: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(number, rest) :]


def append_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Append text in UTF-8, as `append` does.

    Args:
        path: File to append to; its folder must exist. It must be a regular file, not a symbolic link.
        text: What to append.
        sync: Force the file to the disk before returning.

    Raises:
        WriteError: The system refused to write, or the file is a link.
    """
    append(path, text.encode(), sync=sync)


def rename(path: Path, new: Path) -> None:
    """Rename a file, which replaces another, and force this to the disk.

    Args:
        path: File to rename.
        new: Its new path, in a folder of the same file system.

    Raises:
        WriteError: The system refused.
    """
    with naming(new):
        _commit(path, new)


def remove(path: Path) -> None:
    """Remove a file if it exists; a symbolic link is removed itself.

    Args:
        path: File to remove.

    Raises:
        WriteError: The system refused.
    """
    with naming(path):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, if they are missing.

    Args:
        path: Folder to create.

    Raises:
        WriteError: The system refused, or a file of this name exists.
    """
    with naming(path):
        _make(path)


def _make(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def check_no_links(folder: Path, names: Iterable[str]) -> None:
    """Check that folders inside one of somebody else's do not lead out of it.

    Args:
        folder: Folder to check.
        names: Names of the folders inside it that will be written to.

    Raises:
        WriteError: One of them is a symbolic link.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise WriteError(errno.ELOOP, "it is a symbolic link", str(folder / name))


def is_partial(path: Path) -> bool:
    """Return whether a path is what a killed process left while it wrote a file, or what another is writing now.

    Args:
        path: Any path.
    """
    return path.name.startswith(_PARTIAL) or path.suffix == ".partial"  # the suffix is that of earlier versions


def remove_stale(folder: Path) -> None:
    """Remove what killed processes left in a folder and in the folders inside it, some time after the kill.

    Args:
        folder: An existing folder that no other process writes to.
    """
    for path in (*folder.glob(f"{_PARTIAL}*"), *folder.glob(f"*/{_PARTIAL}*")):
        with suppress(OSError):
            if (
                not path.is_symlink()
                and (path.parent == folder or not path.parent.is_symlink())
                and time.time() - path.stat().st_mtime > _STALE_S
            ):
                shutil.rmtree(path)
