"""Load files of `torch.save` that others wrote: no code in them runs, and they cost no more than their size.

PyTorch's restricted unpickler runs no code, but the archive and the pickle in it may still be made to fill the memory
or to take for ever. This module checks both first.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from fastssl.models.skeleton import physical_memory
from fastssl.names import plain_path
from fastssl.reading import check_file

#: Largest part of a file, in bytes, besides the numbers of its tensors.
_MOST_BYTES = 1 << 26
#: Most opcodes in a pickle: a model with an optimiser's state has about 100,000.
_MOST_OPCODES = 2_000_000
#: Most values in a tuple, with those of the tuples inside it. Hashing a tuple takes that many steps, and a small pickle
#: can make the number huge: a tuple that contains another one twice, and so on.
_MOST_VALUES = 1024
_MARK = -1


def load_pickled(path: Path) -> Any:
    """Load a file of `torch.save` onto the CPU, its tensors mapped from disk where the format allows it.

    Args:
        path: Archive, or a file of PyTorch before 1.6.

    Returns:
        What the file contains.

    Raises:
        ValueError: The file is not a regular file, is compressed, is built to be far larger than it looks, or contains
            more than tensors and plain values.
        Exception: Any other error of PyTorch about the file's content.
    """
    _check(path)
    try:
        with plain_path(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Leave out PyTorch's advice to load the file without `weights_only`, which would run what it names.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"it names {refused[1]}, which is not run") from None
        if "weights_only" in str(error):
            raise ValueError("its pickle is damaged, or has more than tensors and plain values; restore it") from None
        raise


def globals_in(path: Path) -> set[str]:
    """Return the classes and functions that a file's pickles name; reads their opcodes without executing them.

    Args:
        path: As in `load_pickled`.

    Raises:
        ValueError: As in `load_pickled`.
    """
    return _check(path)


def _check(path: Path) -> set[str]:
    size, found = check_file(path), set()
    archive = zipfile.is_zipfile(path)
    if not archive and _begins_an_archive(path):
        raise ValueError("its end is missing; restore the file")
    if not archive and size > physical_memory():
        raise ValueError(f"it has {size / 1e9:.3g} GB in a format that must be read whole, more than the memory")
    for stream in _archived(path, size) if archive else _bare(path):
        found |= _globals(stream)
    return found


def _begins_an_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _archived(path: Path, size: int) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is None or end[zipfile._ECD_SIZE] > _MOST_BYTES:  # type: ignore[attr-defined]
            raise ValueError("its archive lists too many files; expected a file of torch.save")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("its archive is compressed; save the file again with torch.save")
            if sum(member.file_size for member in members) > size:
                raise ValueError("its archive lists more bytes than the file has; restore the file")
            if any(member.file_size > _MOST_BYTES and "/data/" not in member.filename for member in members):
                raise ValueError(f"it has more than {_MOST_BYTES >> 20} MB besides the tensors; restore the file")
            for member in members:
                if member.filename.endswith("/data.pkl"):
                    with archive.open(member) as stream:
                        yield stream


def _bare(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(_MOST_BYTES))
    for _ in range(5):  # magic number, version, system, object and the keys of its tensors, then raw data
        yield stream


def _globals(stream: IO[bytes]) -> set[str]:
    """Follow a pickle's opcodes: return the names in it, and refuse it if it is too long or nests tuples too often.

    Of each value, `stack` and `memo` have the number of values that hashing it would visit.
    """
    found = set()
    stack: list[int] = []
    memo: dict[Any, int] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        name = operation.name
        if count > _MOST_OPCODES:
            raise ValueError(f"its pickle has more than {_MOST_OPCODES} opcodes; restore the file")
        if name == "GLOBAL":
            found.add(str(argument).replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1))
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else 1
            continue
        values = 1
        for kind in reversed(operation.stack_before):
            if kind is pickletools.stackslice:
                while stack and stack[-1] != _MARK:
                    values += stack.pop()
            elif stack and (top := stack.pop()) != _MARK:
                values += top
        if name in ("BINGET", "LONG_BINGET"):
            values = memo.get(argument, 1)
        elif not name.startswith("TUPLE"):
            values = 1
        if values > _MOST_VALUES:
            raise ValueError(f"its pickle has a tuple of more than {_MOST_VALUES} values; restore the file")
        stack += [_MARK if kind is pickletools.markobject else values for kind in operation.stack_after]
    return found
