"""Run a kernel: which threads execute which instruction, and when they wait for each other."""

from collections.abc import Iterable

import numpy as np

from tests.emulation.ptx import arithmetic, movement, tensor_cores, warps
from tests.emulation.ptx.lanes import BUILDERS, Action, Grid, Lanes
from tests.emulation.ptx.memory import GlobalMemory
from tests.emulation.ptx.parser import Guard, Instruction, Kernel, Symbol
from tests.emulation.ptx.values import Array

#: The modules that say what instructions do.
FAMILIES = arithmetic, movement, tensor_cores, warps
_BRANCHES = {"bra", "ret", "exit"}
_OF_A_WARP = {"shfl", "mma", "ldmatrix", "redux"}


class DeadlockError(RuntimeError):
    """Threads wait for others that never come."""


class Program:
    """A kernel whose instructions have become actions.

    Attributes:
        kernel: The parsed kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._actions: dict[int, Action] = {}

    def run(
        self,
        parameters: dict[str, Array],
        memory: GlobalMemory,
        grid: Grid,
        shared_size: int,
        *,
        programs: Iterable[int] | None = None,
        most_lanes: int = 8192,
    ) -> None:
        """Run the programs of a launch, as many at once as have `most_lanes` threads.

        Args:
            parameters: Name of each parameter -> its bits.
            memory: The tensors that the parameters point to.
            grid: Number of programs along each axis.
            shared_size: Bytes of shared memory of a program.
            programs: Numbers of the programs to run, the first axis fastest; None runs all.
            most_lanes: Largest number of threads to run at once.
        """
        numbers = np.arange(grid[0] * grid[1] * grid[2]) if programs is None else np.asarray(list(programs))
        at_once = max(1, most_lanes // self.kernel.threads)
        for first in range(0, len(numbers), at_once):
            chunk = numbers[first : first + at_once]
            with np.errstate(all="ignore"):
                _Execution(self, Lanes(self.kernel, parameters, memory, grid, chunk, shared_size)).run()

    def action(self, place: int) -> Action:
        """Return the action of an instruction."""
        if place not in self._actions:
            instruction = self.kernel.instructions[place]
            build = BUILDERS.get(instruction.opcode)
            if build is None:
                raise instruction.unknown()
            self._actions[place] = build(instruction)
        return self._actions[place]


class _Execution:
    """One run of a program on some lanes.

    Threads that are at the same instruction form a group, and the group that is farthest behind runs first. So groups
    meet again where their paths join. A group at a barrier, or at an instruction of whole warps, waits for the others.
    """

    def __init__(self, program: Program, lanes: Lanes) -> None:
        self._program, self._lanes = program, lanes
        self._alive = np.full(lanes.count, True)
        self._groups: dict[int, Array] = {0: self._alive.copy()}
        self._waiting: set[int] = set()

    def run(self) -> None:
        while self._groups:
            ready = self._groups.keys() - self._waiting
            place = min(ready) if ready else self._released()
            self._waiting.discard(place)
            self._run_group(place, self._groups.pop(place))

    def _released(self) -> int:
        """Return where a group may go on although all wait, because those that it waits for have ended."""
        instructions = self._program.kernel.instructions
        for place, group in sorted(self._groups.items()):
            if self._complete(instructions[place], group):
                return place
        text = instructions[min(self._groups)].text
        raise DeadlockError(f"some threads of {self._program.kernel.name} wait at {text!r}, where others never come")

    def _run_group(self, place: int, group: Array) -> None:
        """Run a group until it ends, waits, or is no longer the one that is farthest behind."""
        instructions, end = self._program.kernel.instructions, len(self._program.kernel.instructions)
        mask = None if group.all() else group
        while place < end:
            if self._groups:
                if place in self._groups or any(other < place for other in self._groups.keys() - self._waiting):
                    self._join(place, group)
                    return
                if not self._complete(instructions[place], group):
                    self._join(place, group)
                    self._waiting.add(place)
                    return
            instruction = instructions[place]
            if instruction.opcode in _BRANCHES:
                staying, place = self._branch(instruction, group, place)
                if staying is not group:
                    group = mask = staying
                continue
            active = mask
            if instruction.guard is not None:
                allowed = self._allowed(instruction.guard)
                active = allowed if mask is None else mask & allowed
                if not active.any():
                    place += 1
                    continue
                if active.all():
                    active = None
            self._program.action(place)(self._lanes, active)
            place += 1
        self._alive &= ~group

    def _join(self, place: int, group: Array) -> None:
        """Add threads to those at an instruction."""
        others = self._groups.get(place)
        self._groups[place] = group if others is None else group | others
        self._waiting.discard(place)

    def _allowed(self, guard: Guard) -> Array:
        predicate = self._lanes.register(guard.register)
        return ~predicate if guard.negated else predicate

    def _branch(self, instruction: Instruction, group: Array, place: int) -> tuple[Array, int]:
        """Execute a branch; return the threads of the group that go on, and where."""
        if instruction.opcode == "bra":
            label = instruction.operands[0]
            assert isinstance(label, Symbol)
            target = self._program.kernel.labels[label.name]
        else:
            target = len(self._program.kernel.instructions)
        taken = group if instruction.guard is None else group & self._allowed(instruction.guard)
        if not taken.any():
            return group, place + 1
        left = group & ~taken
        if not left.any():
            return group, target
        if target == len(self._program.kernel.instructions):
            self._alive &= ~taken
        else:
            self._join(target, taken)
        return left, place + 1

    def _complete(self, instruction: Instruction, group: Array) -> bool:
        """Return whether all living threads are here that an instruction needs: of each warp, or of each program."""
        if instruction.opcode in _OF_A_WARP or instruction.parts[:2] == ("bar", "warp"):
            size = warps.WARP
        elif instruction.opcode == "bar":
            size = self._program.kernel.threads
        else:
            return True
        here, alive = group.reshape(-1, size), self._alive.reshape(-1, size)
        return bool(((here == alive).all(1) | ~here.any(1)).all())
