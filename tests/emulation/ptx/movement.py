"""Instructions that move numbers: between registers, and between registers and memory."""

from collections.abc import Sequence

import numpy as np

from tests.emulation.ptx.lanes import Action, Lanes, Reader, executes, reader
from tests.emulation.ptx.memory import MemoryAccessError
from tests.emulation.ptx.parser import Address, Immediate, Instruction, Operand, Symbol, Vector
from tests.emulation.ptx.values import PREDICATE, UNSIGNED, Array, Kind, kind_of

_POINTER, _SHARED_POINTER = Kind("u", 64), Kind("s", 32)
#: Modifiers of loads, stores and copies that do not change what is moved: caching, and when others see it.
_HINTS = {"ca", "cg", "cs", "cv", "wb", "wt", "lu", "L1", "L2", "evict_first", "evict_last", "evict_normal", "cta",
          "no_allocate", "128B", "nc", "relaxed", "acquire", "release", "gpu", "sys"}  # fmt: skip


@executes("mov")
def _move(instruction: Instruction) -> Action:
    kind, (target, source) = instruction.kinds[-1], instruction.operands
    if isinstance(target, Vector):
        return _unpack(instruction, target, source, kind.bits // len(target.items))
    if isinstance(source, Vector):
        return _join(instruction, target, source, kind.bits // len(source.items))
    bits = kind if kind == PREDICATE else Kind("b", kind.bits)
    read = reader(source, bits)
    return lambda lanes, mask: lanes.write_bits(target, read(lanes), bits, mask)


def _unpack(instruction: Instruction, target: Vector, source: Operand, width: int) -> Action:
    """Split a register into several, the lowest bits first."""
    read, part = reader(source, Kind("b", width * len(target.items))), Kind("b", width)

    def act(lanes: Lanes, mask: Array | None) -> None:
        bits = read(lanes)
        for index, item in enumerate(target.items):
            lanes.write(item, bits >> bits.dtype.type(index * width), part, mask)

    return act


def _join(instruction: Instruction, target: Operand, source: Vector, width: int) -> Action:
    """Join several registers in one, the lowest bits first."""
    read, whole = [reader(item, Kind("b", width)) for item in source.items], width * len(source.items)
    dtype = UNSIGNED[whole]

    def act(lanes: Lanes, mask: Array | None) -> None:
        result = np.zeros(lanes.count, dtype)
        for index, each in enumerate(read):
            result |= each(lanes).astype(dtype) << dtype(index * width)
        lanes.write_bits(target, result, Kind("b", whole), mask)

    return act


def _items(operand: Operand) -> Sequence[Operand]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _space(instruction: Instruction) -> str:
    """Return which memory a load or a store uses, after checking that nothing else about it is unknown."""
    space, *rest = instruction.parts[1:]
    if any(part not in _HINTS | {"v2", "v4"} and kind_of(part) is None for part in rest):
        raise instruction.unknown()
    return space


@executes("ld")
def _load(instruction: Instruction) -> Action:
    space, kind, (target, source) = _space(instruction), instruction.kinds[-1], instruction.operands
    assert isinstance(source, Address)
    if space == "param":
        assert isinstance(source.base, Symbol)
        name = source.base.name
        return lambda lanes, mask: lanes.write_bits(target, lanes.parameters[name], kind, mask)
    if space not in ("global", "shared"):
        raise instruction.unknown()
    targets, text = _items(target), instruction.text
    pointer = _addresses(source, space)

    def act(lanes: Lanes, mask: Array | None) -> None:
        chosen = lanes.chosen(mask)
        addresses = np.broadcast_to(pointer(lanes), lanes.count)[chosen]
        if space == "shared":
            loaded = lanes.shared.load(chosen, addresses, kind.bits, len(targets), text)
        else:
            loaded = lanes.memory.load(addresses, kind.bits, len(targets), text)
        for item, values in zip(targets, loaded, strict=True):
            lanes.write_bits(item, _spread(values, chosen, lanes.count), kind, mask)

    return act


def _spread(values: Array, chosen: Array, count: int) -> Array:
    """Return an array for all lanes from the values of the chosen ones."""
    if len(values) == count:
        return values
    everywhere = np.zeros(count, values.dtype)
    everywhere[chosen] = values
    return everywhere


@executes("st")
def _store(instruction: Instruction) -> Action:
    space, kind, (target, source) = _space(instruction), instruction.kinds[-1], instruction.operands
    assert isinstance(target, Address)
    if space not in ("global", "shared"):
        raise instruction.unknown()
    bits, text = Kind("b", kind.bits), instruction.text
    read, pointer = [reader(item, bits) for item in _items(source)], _addresses(target, space)

    def act(lanes: Lanes, mask: Array | None) -> None:
        chosen = lanes.chosen(mask)
        addresses = np.broadcast_to(pointer(lanes), lanes.count)[chosen]
        values = np.stack([np.broadcast_to(each(lanes), lanes.count)[chosen] for each in read])
        if space == "shared":
            lanes.shared.store(chosen, addresses, values, text)
        else:
            lanes.memory.store(addresses, values, text)

    return act


def _addresses(operand: Address, space: str) -> Reader:
    """Return a function that computes the addresses of all lanes."""
    kind = _POINTER if space == "global" else _SHARED_POINTER
    read = reader(operand.base, kind)
    offset = np.asarray(operand.offset, np.int64).astype(UNSIGNED[64] if space == "global" else np.int32)
    return lambda lanes: read(lanes) + offset


@executes("cp")
def _asynchronous_copy(instruction: Instruction) -> Action:
    """Copy from global to shared memory. The bytes arrive when the thread waits for its group of copies, not before."""
    if instruction.parts[:2] != ("cp", "async"):
        raise instruction.unknown()
    if instruction.parts[2] == "commit_group":
        return _commit
    if instruction.parts[2] in ("wait_group", "wait_all"):
        limit = instruction.operands[0] if instruction.operands else Immediate(0)
        assert isinstance(limit, Immediate)
        return lambda lanes, mask: _wait(lanes, mask, limit.bits)
    if not {"shared", "global"} <= set(instruction.parts) <= _HINTS | {"cp", "async", "shared", "global"}:
        raise instruction.unknown()
    return _begin_copy(instruction)


def _begin_copy(instruction: Instruction) -> Action:
    target, source, size, *rest = instruction.operands
    assert isinstance(target, Address)
    assert isinstance(source, Address)
    assert isinstance(size, Immediate)
    to, origin, text = _addresses(target, "shared"), _addresses(source, "global"), instruction.text
    given = reader(rest[0], Kind("u", 32)) if rest else None
    words, bits = max(size.bits // 8, 1), 8 * min(size.bits, 8)

    def act(lanes: Lanes, mask: Array | None) -> None:
        chosen = lanes.chosen(mask)
        if not len(chosen):
            return
        places, addresses = (np.broadcast_to(each(lanes), lanes.count)[chosen] for each in (to, origin))
        values = np.zeros((words, len(chosen)), UNSIGNED[bits])  # bytes beyond the given number become zero
        copied = np.full(len(chosen), True)
        if given is not None:
            numbers = np.broadcast_to(given(lanes), lanes.count)[chosen]
            if ((numbers != 0) & (numbers != size.bits)).any():
                raise MemoryAccessError(f"a copy of a part of {size.bits} bytes: {text}")
            copied = numbers != 0
        values[:, copied] = lanes.memory.load(addresses[copied], bits, words, text)
        lanes.shared.reserve(chosen, places, size.bits, text)
        lanes.copies.append((chosen, places, values, lanes.committed[chosen], text))

    return act


def _commit(lanes: Lanes, mask: Array | None) -> None:
    """End a group of copies."""
    lanes.committed = lanes.committed + (1 if mask is None else mask)


def _wait(lanes: Lanes, mask: Array | None, limit: int) -> None:
    """Store the copies of all but the last `limit` groups."""
    left = []
    for chosen, places, values, groups, text in lanes.copies:
        done = groups < lanes.committed[chosen] - limit
        if mask is not None:
            done &= mask[chosen]
        if done.any():
            lanes.shared.store(chosen[done], places[done], values[:, done], text)
        if not done.all():
            left.append((chosen[~done], places[~done], values[:, ~done], groups[~done], text))
    lanes.copies = left
