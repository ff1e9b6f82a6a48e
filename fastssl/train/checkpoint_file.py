"""The checkpoint files of a run: written with a checksum, kept in pairs, and checked before anything is loaded."""

import logging
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from fastssl.files import make_folder, rename, replacing
from fastssl.models.pickled import globals_in, load_pickled

logger = logging.getLogger(__name__)

#: The last checkpoint of a run, the one before, and one that was found damaged.
LAST, PREVIOUS, DAMAGED = "last.ckpt", "previous.ckpt", "damaged.ckpt"
#: torch.save writes a zip archive. Its last record, of `_END_BYTES`, ends with the length of a comment, which is 0. The
#: checksum is added as the comment, so it is inside the file, and every reader of zip archives still opens it.
_END, _END_BYTES = b"PK\5\6", 22
_MARK = b"fastssl crc32 "
_COMMENT_BYTES = len(_MARK) + 8
_BLOCK_BYTES = 1 << 22
_MOST_UPDATES = 2**53


class DamagedCheckpointError(ValueError):
    """A checkpoint was damaged after it was written, or is incomplete. The message names the file."""


class Checkpoint(NamedTuple):
    """A checkpoint that was checked."""

    path: Path
    update: int  # number of finished updates
    damage: str | None  # what is wrong with the last checkpoint, if this is an earlier one


class _Summed:
    """A file to write to that computes the CRC-32 of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.checksum = file, 0

    def write(self, content: bytes) -> int:
        self.checksum = zlib.crc32(content, self.checksum)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with a checksum; it gets its name only when it is complete on the disk.

    `last.ckpt` becomes `previous.ckpt` first, so after a kill at any moment at least one of them is complete.

    Args:
        content: What to write with `torch.save`.
        path: File to write; its folder is created if missing.

    Raises:
        WriteError: The system refused to write; the earlier checkpoints stay.
    """
    make_folder(path.parent)
    with replacing(path) as partial:
        with partial.open("w+b") as file:
            summed = _Summed(file)
            torch.save(content, summed)  # type: ignore[arg-type]  # a file of fewer methods serves
            file.seek(-2, 2)
            assert file.read(2) == b"\0\0"
            file.seek(-2, 2)
            file.write(struct.pack("<H", _COMMENT_BYTES) + _comment(summed.checksum))
            file.flush()
            os.fsync(file.fileno())  # a disk may turn out to be full only here, before the names change
        if path.name == LAST and path.exists():
            rename(path, path.with_name(PREVIOUS))


def _comment(checksum: int) -> bytes:
    return _MARK + b"%08x" % checksum


def check_checkpoint(path: Path) -> int:
    """Read a whole checkpoint and compare it with its checksum.

    Those of earlier versions have none; for them, the checksums inside the zip archive are compared.

    Args:
        path: A `.ckpt` file of a run.

    Returns:
        The number of finished updates.

    Raises:
        DamagedCheckpointError: The file is damaged or incomplete.
    """
    try:
        with path.open("rb") as file:
            problem = _problem(path, file)
        if problem is None:
            update = load_pickled(path).get("global_step")
            if type(update) is int and 0 <= update < _MOST_UPDATES:
                return update
            problem = "does not say how many updates it has"
    except Exception as error:  # errors of torch, zipfile and pickle have no common class
        problem = f"cannot be read ({str(error).partition(chr(10))[0]})"
    raise DamagedCheckpointError(f"{path} {problem}")


def _problem(path: Path, file: IO[bytes]) -> str | None:
    """Say what is wrong with a checkpoint; None if nothing is."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _END_BYTES))
    end = file.read()
    if end.startswith(_END) and end.endswith(b"\0\0"):  # no comment: an earlier version wrote it
        globals_in(path)  # refuses an archive that is larger than it looks
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()
        return None if part is None else f"is damaged (the checksum of {part} differs)"
    body = size - _COMMENT_BYTES
    file.seek(max(0, body - _END_BYTES))
    end, comment = file.read(_END_BYTES), file.read()
    if not (end.startswith(_END) and end.endswith(struct.pack("<H", _COMMENT_BYTES)) and comment.startswith(_MARK)):
        return f"is incomplete or damaged (its {size} bytes end without a checksum)"
    file.seek(0)
    found, left = 0, body - 2
    block = bytearray(_BLOCK_BYTES)
    while left:
        number = file.readinto(memoryview(block)[: min(left, _BLOCK_BYTES)])  # type: ignore[attr-defined]
        if not number:
            break
        found, left = zlib.crc32(memoryview(block)[:number], found), left - number
    found = zlib.crc32(b"\0\0", found)  # the length of the comment was added after the checksum was computed
    return None if comment == _comment(found) else "is damaged (its checksum differs)"


def has_checkpoint(run: Path) -> bool:
    """Return whether a run has a checkpoint, complete or not.

    Args:
        run: Folder of the run.
    """
    return bool(_candidates(run))


def _candidates(run: Path) -> list[Path]:
    """Return a run's checkpoints: last, previous, then those that `trainer.keep_every` has kept, newest first."""
    folder = run / "checkpoints"
    kept = sorted((path for path in folder.glob("*.ckpt") if path.stem.isdecimal()), key=lambda path: -int(path.stem))
    return [path for path in (folder / LAST, folder / PREVIOUS, *kept) if path.is_file()]


def find_checkpoint(run: Path, *, name: str) -> Checkpoint | None:
    """Find the checkpoint to load from a run: the last one or, if that is damaged, the newest before it.

    Args:
        run: Folder of the run.
        name: Option and value that named the run, for the error message.

    Returns:
        The checkpoint; None if the run has none.

    Raises:
        ValueError: All checkpoints are damaged.
    """
    problems: list[str] = []
    for path in _candidates(run):
        try:
            return Checkpoint(path, check_checkpoint(path), problems[0] if problems else None)
        except DamagedCheckpointError as error:
            problems.append(str(error))
    if not problems:
        return None
    raise ValueError(f"{name}: no usable checkpoint: {'; '.join(problems)}; restore one, or start a new run")


def set_aside(damaged: Path) -> None:
    """Rename a damaged checkpoint, so that it does not replace the complete one before it at the next save.

    Args:
        damaged: The run's `last.ckpt`; nothing is done if it is missing.

    Raises:
        WriteError: The system refused.
    """
    if damaged.exists():
        rename(damaged, damaged.with_name(DAMAGED))
