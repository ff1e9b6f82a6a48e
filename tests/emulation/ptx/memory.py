"""The memory that kernels see: tensors, and one block of shared memory per program. Every access is checked."""

import ctypes
from typing import NamedTuple

import numpy as np
import torch

from tests.emulation.ptx.values import UNSIGNED, Array

#: Each tensor has an address space of its own, so that no wrong address of one can lie in another.
_SPACE_BITS = 44
_WIDEST = 16  # bytes of the widest access
#: A warp number that means several warps.
_SEVERAL, _WARPS = 63, 64


class MemoryAccessError(RuntimeError):
    """An access that would be an error, or undefined, on a GPU."""


class _Extent(NamedTuple):
    """A tensor that was passed to a kernel: where it begins, its size in bytes, and its memory."""

    name: str
    address: int
    size: int
    memory: Array  # uint8, from the last multiple of 16 at or before the tensor to the first one after it
    skipped: int  # bytes of `memory` before the tensor
    elements: Array | None  # which bytes belong to elements; None for all
    tensor: torch.Tensor  # keeps the memory alive


class GlobalMemory:
    """The tensors of one launch."""

    def __init__(self) -> None:
        self._extents: list[_Extent] = []

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Add a tensor on the CPU and return its address, which is as aligned as the tensor is."""
        assert tensor.device.type == "cpu"
        pointer, size = tensor.data_ptr(), _span(tensor)
        skipped = pointer % _WIDEST
        # Half of the space is before the tensor, so that wrong addresses before it lie in this space too.
        address = (len(self._extents) << _SPACE_BITS) + (1 << (_SPACE_BITS - 1)) + pointer % 4096
        whole = -(-(skipped + size) // _WIDEST) * _WIDEST
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * whole).from_address(pointer - skipped))
        self._extents.append(_Extent(name, address, size, memory, skipped, _element_bytes(tensor, size), tensor))
        return address

    def load(self, addresses: Array, bits: int, count: int, text: str) -> Array:
        """Load `count` neighbouring numbers of `bits` bits from each address: (count, addresses)."""
        values = np.empty((count, len(addresses)), UNSIGNED[bits])
        for chosen, memory, index in self._checked(addresses, bits // 8, count, text):
            for item in range(count):
                values[item, chosen] = memory[index + item]
        return values

    def store(self, addresses: Array, values: Array, text: str) -> None:
        """Store numbers (count, addresses), neighbouring ones at each address."""
        size = values.dtype.itemsize
        for chosen, memory, index in self._checked(addresses, size, len(values), text):
            for item, numbers in enumerate(values):
                memory[index + item] = numbers[chosen]
                if (memory[index + item] != numbers[chosen]).any():
                    raise MemoryAccessError(f"threads store different numbers at the same address: {text}")

    def _checked(self, addresses: Array, size: int, count: int, text: str) -> list[tuple[Array | slice, Array, Array]]:
        """Check an access; return for each tensor the accesses to it, its memory as numbers, and their places."""
        if len(addresses) == 0:
            return []
        spaces = (addresses >> np.uint64(_SPACE_BITS)).astype(np.int64)
        if (spaces == spaces[0]).all():
            return [(slice(None), *self._places(int(spaces[0]), addresses, size, count, text))]
        found: list[tuple[Array | slice, Array, Array]] = []
        for space in np.unique(spaces):
            chosen = np.nonzero(spaces == space)[0]
            found.append((chosen, *self._places(int(space), addresses[chosen], size, count, text)))
        return found

    def _places(self, space: int, addresses: Array, size: int, count: int, text: str) -> tuple[Array, Array]:
        """Return a tensor's memory as numbers of `size` bytes, and the places of some addresses in it."""
        if not 0 <= space < len(self._extents):
            raise MemoryAccessError(f"{len(addresses)} threads use an address that comes from no tensor: {text}")
        extent = self._extents[space]
        offsets = addresses.astype(np.int64) - extent.address
        outside = (offsets < 0) | (offsets + size * count > extent.size)
        if outside.any():
            raise MemoryAccessError(
                f"{outside.sum()} threads leave {extent.name}, which has {extent.size} bytes, at byte"
                f" {offsets[outside][0]}: {text}"
            )
        if (addresses % np.uint64(size * count)).any():
            raise MemoryAccessError(f"an access to {extent.name} is not aligned to {size * count} bytes: {text}")
        if extent.elements is not None and not extent.elements[offsets[:, None] + np.arange(size * count)].all():
            raise MemoryAccessError(f"an access to {extent.name} reaches bytes between its elements: {text}")
        return extent.memory.view(UNSIGNED[8 * size]), (offsets + extent.skipped) // size


def _span(tensor: torch.Tensor) -> int:
    """Return the number of bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _element_bytes(tensor: torch.Tensor, span: int) -> Array | None:
    """Return which bytes of a tensor's span belong to its elements; None if all do."""
    if span == tensor.numel() * tensor.element_size():
        return None
    inside = torch.zeros(span // tensor.element_size(), dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return np.repeat(inside.numpy(), tensor.element_size())


class SharedMemory:
    """The shared memory of several programs, each with its own addresses from 0.

    It begins as NaN. A thread may read what its own warp wrote, or what any warp wrote before the program's last
    barrier. In the same way, it may not overwrite what another warp has read or written since that barrier.
    """

    def __init__(self, programs: int, size: int, threads: int) -> None:
        """Make the memory of programs with `size` bytes and `threads` threads each."""
        self._size = -(-max(size, 1) // _WIDEST) * _WIDEST
        lanes = np.arange(programs * threads)
        self._program = lanes // threads
        self._warp = (lanes % threads // 32).astype(np.int32)
        self._bytes = np.full(programs * self._size, 0xFF, np.uint8)
        self._written = np.zeros(programs * self._size, np.bool_)
        self._barriers = np.ones(programs, np.int32)
        #: For each byte, the barriers before its last access, times 64, plus the warp.
        self._writer, self._reader = (np.zeros(programs * self._size, np.int32) for _ in range(2))

    def barrier(self, lanes: Array) -> None:
        """Let all threads of the programs of some lanes see what has been written."""
        self._barriers[np.unique(self._program[lanes])] += 1

    def load(self, lanes: Array, addresses: Array, bits: int, count: int, text: str) -> Array:
        """Load `count` neighbouring numbers of `bits` bits for each lane: (count, lanes)."""
        size = bits // 8
        begin = self._places(lanes, addresses, size * count, text)
        values = np.empty((count, len(lanes)), UNSIGNED[bits])
        for item in range(count):
            index = begin // size + item
            if not self._written.reshape(-1, size)[index].all():
                raise MemoryAccessError(f"shared memory is read before it is written: {text}")
            self._read(lanes, index * size, text)
            values[item] = self._bytes.view(UNSIGNED[bits])[index]
        return values

    def store(self, lanes: Array, addresses: Array, values: Array, text: str) -> None:
        """Store numbers (count, lanes), neighbouring ones at each address."""
        size = values.dtype.itemsize
        begin = self._places(lanes, addresses, size * len(values), text)
        memory = self._bytes.view(values.dtype)
        for item, numbers in enumerate(values):
            index = begin // size + item
            stamp = self._stamp(lanes)
            for before, what in ((self._reader, "read"), (self._writer, "written")):
                conflict = _by_another_warp(before[index * size], stamp)
                # Warps with copies of the same number may all store it.
                if (conflict & (memory[index] != numbers)).any():
                    raise MemoryAccessError(f"shared memory is overwritten that another warp has just {what}: {text}")
            memory[index] = numbers
            self._written.reshape(-1, size)[index] = True
            self._writer.reshape(-1, size)[index] = stamp[:, None]
            # Lanes of one warp may: Triton lets each store a sum whose last bit depends on the order of the summands.
            if ((memory[index] != numbers) & (self._writer[index * size] != stamp)).any():
                raise MemoryAccessError(f"warps store different numbers at the same address: {text}")

    def reserve(self, lanes: Array, addresses: Array, size: int, text: str) -> None:
        """Begin asynchronous copies of `size` bytes: until they are stored, the old bytes may not be read."""
        index = self._places(lanes, addresses, size, text) // size
        stamp = self._stamp(lanes)
        if _by_another_warp(self._reader.reshape(-1, size)[index].max(1), stamp).any():
            raise MemoryAccessError(f"an asynchronous copy overwrites what another warp has just read: {text}")
        self._written.reshape(-1, size)[index] = False

    def _stamp(self, lanes: Array) -> Array:
        stamp: Array = self._barriers[self._program[lanes]] * _WARPS + self._warp[lanes]
        return stamp

    def _read(self, lanes: Array, places: Array, text: str) -> None:
        stamp = self._stamp(lanes)
        if _by_another_warp(self._writer[places], stamp).any():
            raise MemoryAccessError(f"shared memory is read that another warp has just written: {text}")
        several = _by_another_warp(self._reader[places], stamp)
        self._reader[places] = np.where(several, stamp | _SEVERAL, stamp)
        lost = self._reader[places] != stamp  # several lanes of this instruction read the same place
        self._reader[places[lost]] |= _SEVERAL

    def _places(self, lanes: Array, addresses: Array, size: int, text: str) -> Array:
        """Check an access of `size` bytes; return its places in the memory of all programs."""
        addresses = addresses.astype(np.int64)
        if ((addresses < 0) | (addresses + size > self._size)).any():
            raise MemoryAccessError(f"an access leaves shared memory, which has {self._size} bytes per program: {text}")
        if (addresses % size).any():
            raise MemoryAccessError(f"an access to shared memory is not aligned to {size} bytes: {text}")
        places: Array = self._program[lanes] * self._size + addresses
        return places


def _by_another_warp(before: Array, stamp: Array) -> Array:
    """Return whether an earlier access was since the last barrier and by another warp than the present one."""
    conflict: Array = (before // _WARPS == stamp // _WARPS) & (before != stamp)
    return conflict
