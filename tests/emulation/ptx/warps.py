"""Instructions for which the threads of a warp, or of a program, work together."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulation.ptx.lanes import Action, Lanes, executes, reader
from tests.emulation.ptx.memory import MemoryAccessError
from tests.emulation.ptx.parser import Immediate, Instruction, Operand, Vector
from tests.emulation.ptx.values import Array, Kind, integer_type

WARP = 32
_BITS = Kind("b", 32)
#: How shuffles find the lane that they read from: function of the lane and the operand.
_SOURCES: dict[str, Callable[[Array, Array], Array]] = {
    "bfly": np.bitwise_xor,
    "idx": lambda lane, number: np.broadcast_to(number, lane.shape),
    "up": lambda lane, number: lane - number,
    "down": lambda lane, number: lane + number,
}


def _check_members(instruction: Instruction, operand: Operand) -> None:
    """Check that all 32 threads of a warp take part, if the member mask is a constant."""
    if isinstance(operand, Immediate) and operand.bits not in (-1, 0xFFFFFFFF):
        raise instruction.unknown()


@executes("shfl")
def _shuffle(instruction: Instruction) -> Action:
    target, source, number, limits, members = instruction.operands
    mode = _SOURCES.get(instruction.parts[2])
    whole_warp = isinstance(limits, Immediate) and limits.bits == (0 if instruction.parts[2] == "up" else 31)
    if instruction.parts[1] != "sync" or mode is None or not whole_warp or isinstance(target, Vector):
        raise instruction.unknown()
    _check_members(instruction, members)
    read, read_number = reader(source, _BITS), reader(number, Kind("s", 32))

    def act(lanes: Lanes, mask: Array | None) -> None:
        lane = np.broadcast_to(np.arange(WARP), (lanes.count // WARP, WARP))
        numbers = np.broadcast_to(read_number(lanes), lanes.count).reshape(-1, WARP)
        chosen = mode(lane, numbers)
        chosen = np.where((chosen >= 0) & (chosen < WARP), chosen, lane)
        values = np.broadcast_to(read(lanes), lanes.count).reshape(-1, WARP)
        lanes.write_bits(target, np.take_along_axis(values, chosen, 1).reshape(-1), _BITS, mask)

    return act


_REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@executes("redux")
def _reduce(instruction: Instruction) -> Action:
    """Reduce an integer over a warp."""
    target, source, members = instruction.operands
    kind, function = instruction.kinds[-1], _REDUCTIONS.get(instruction.parts[2])
    if function is None or kind.is_float:
        raise instruction.unknown()
    _check_members(instruction, members)
    read = reader(source, kind)
    dtype: Any = integer_type(kind)

    def act(lanes: Lanes, mask: Array | None) -> None:
        values = np.broadcast_to(read(lanes), lanes.count).reshape(-1, WARP)
        lanes.write(target, np.repeat(function.reduce(values, axis=1, dtype=dtype), WARP), kind, mask)

    return act


@executes("bar")
def _barrier(instruction: Instruction) -> Action:
    if instruction.parts[1:] == ("warp", "sync"):
        return lambda lanes, mask: None  # threads of a warp see each other's writes at once
    if instruction.parts[1:] != ("sync",) or len(instruction.operands) != 1:
        raise instruction.unknown()
    return lambda lanes, mask: lanes.shared.barrier(lanes.chosen(mask))


@executes("trap")
def _trap(instruction: Instruction) -> Action:
    def act(lanes: Lanes, mask: Array | None) -> None:
        raise MemoryAccessError(f"{lanes.kernel.name} stops itself: {instruction.text}")

    return act
