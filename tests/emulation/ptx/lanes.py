"""The state of the threads that run together, and how instructions read and write their registers."""

from collections.abc import Callable

import numpy as np

from tests.emulation.ptx.memory import GlobalMemory, MemoryAccessError, SharedMemory
from tests.emulation.ptx.parser import Immediate, Instruction, Kernel, Operand, Register, Special, Symbol
from tests.emulation.ptx.values import UNSIGNED, Array, Kind, decode, encode, extend

Grid = tuple[int, int, int]


class Lanes:
    """All threads of some programs of a launch: lane p * threads + t is thread t of the p-th of these programs.

    Attributes:
        kernel: The kernel that they run.
        parameters: Name of a parameter -> its bits.
        memory: The tensors of the launch.
        shared: Shared memory of each program.
        count: Number of lanes.
        registers: Name -> the bits of each lane, or bool for a predicate. Arrays are replaced, never changed.
        special: Name of a register that the hardware sets -> its values.
    """

    def __init__(
        self,
        kernel: Kernel,
        parameters: dict[str, Array],
        memory: GlobalMemory,
        grid: Grid,
        programs: Array,
        shared_size: int,
    ) -> None:
        self.kernel, self.parameters, self.memory = kernel, parameters, memory
        self.count = len(programs) * kernel.threads
        self.shared = SharedMemory(len(programs), shared_size, kernel.threads)
        self.copies: list[tuple[Array, Array, Array, Array, str]] = []  # see movement.py
        self.committed = np.zeros(self.count, np.int64)  # groups of asynchronous copies that each lane has made
        self.registers: dict[str, Array] = {}
        program, thread = np.repeat(programs, kernel.threads), np.tile(np.arange(kernel.threads), len(programs))
        places = (program % grid[0], program // grid[0] % grid[1], program // (grid[0] * grid[1]))
        values = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32}
        for axis in "yz":
            values |= {f"%tid.{axis}": np.zeros_like(thread), f"%ntid.{axis}": np.ones_like(thread)}
        values["%ntid.x"] = np.full_like(thread, kernel.threads)
        for axis, place, size in zip("xyz", places, grid, strict=True):
            values |= {f"%ctaid.{axis}": place, f"%nctaid.{axis}": np.full(self.count, size)}
        self.special = {name: value.astype(np.uint32) for name, value in values.items()}

    def register(self, name: str) -> Array:
        """Return the bits of a register; all bits are set before it is first written, which is NaN."""
        found = self.registers.get(name)
        if found is None:
            width = self.kernel.registers[name]
            if width == 1:
                raise MemoryAccessError(f"predicate {name} of {self.kernel.name} is read before it is written")
            found = self.registers[name] = np.full(self.count, (1 << width) - 1, UNSIGNED[width])
        return found

    def write_bits(self, operand: Operand, bits: Array, kind: Kind, mask: Array | None) -> None:
        """Write the bits of numbers of a type to a register of the lanes in `mask`, or of all."""
        assert isinstance(operand, Register)
        if operand.name == "_":
            return
        width = self.kernel.registers[operand.name]
        bits = extend(bits, kind, width)
        if mask is None:
            self.registers[operand.name] = np.broadcast_to(bits, self.count)
            return
        if width == 1 and operand.name not in self.registers:
            self.registers[operand.name] = np.zeros(self.count, np.bool_)
        self.registers[operand.name] = np.where(mask, bits, self.register(operand.name))

    def write(self, operand: Operand, values: Array, kind: Kind, mask: Array | None) -> None:
        """Write numbers to a register of the lanes in `mask`, or of all; floats are rounded to the type."""
        self.write_bits(operand, encode(values, kind), kind, mask)

    def chosen(self, mask: Array | None) -> Array:
        """Return the numbers of the lanes in a mask."""
        return np.arange(self.count) if mask is None else np.nonzero(mask)[0]


#: Executes one instruction on the lanes in a mask, or on all.
Action = Callable[[Lanes, Array | None], None]
Reader = Callable[[Lanes], Array]

#: Opcode -> function that turns an instruction into an action.
BUILDERS: dict[str, Callable[[Instruction], Action]] = {}


def executes(*opcodes: str) -> Callable[[Callable[[Instruction], Action]], Callable[[Instruction], Action]]:
    """Register a function that turns instructions with these opcodes into actions."""

    def register(build: Callable[[Instruction], Action]) -> Callable[[Instruction], Action]:
        BUILDERS.update(dict.fromkeys(opcodes, build))
        return build

    return register


def reader(operand: Operand, kind: Kind) -> Reader:
    """Return a function that reads an operand as numbers of a type: an array, or one number for all lanes."""
    if isinstance(operand, Register):
        name = operand.name
        return lambda lanes: decode(lanes.register(name), kind)
    if isinstance(operand, Special):
        name = operand.name
        return lambda lanes: decode(lanes.special[name], kind)
    if isinstance(operand, Immediate):
        if kind.letter == "pred":
            constant: Array = np.asarray(bool(operand.bits))
        else:
            width = 32 if kind.packed else kind.bits
            constant = decode(np.asarray(operand.bits & ((1 << width) - 1), UNSIGNED[width]), kind)
        return lambda lanes: constant
    assert isinstance(operand, Symbol), operand
    zero = np.asarray(0, UNSIGNED[kind.bits])  # the address of shared memory
    return lambda lanes: zero
