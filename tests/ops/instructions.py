"""Count the machine instructions of Triton kernels, loop by loop, without a GPU.

A loop ends with a branch back to its start. What a kernel spends its time on is its longest loop that contains no other
loop, or all of it if it has none.

    python -m tests.ops.instructions varlen_attention "bfloat16, E=64" --architecture 90    # prints each kernel's loops
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.ops.ahead_of_time import cuobjdump, in_compiling_process, launches_of, prepare


class Instruction(NamedTuple):
    """One machine instruction: address in bytes, and text without the predicate, such as "FADD R1, R2, R3"."""

    address: int
    text: str

    @property
    def name(self) -> str:
        """The operation without its modifiers, such as "FADD"."""
        return re.split(r"[. ]", self.text, maxsplit=1)[0]

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to; None for all other instructions."""
        found = re.match(r"BRA\b.*?(0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


class Section(NamedTuple):
    """A loop, or a whole kernel without loops.

    Attributes:
        instructions: Number of instructions per iteration and warp.
        products: How many of them start a product of a warp group (HGMMA).
        waits: How many of them wait for such products. With as many waits as products, ptxas has found a reason to run
            the products one after the other.
        names: Number of instructions by name.
    """

    instructions: int
    products: int
    waits: int
    names: dict[str, int]

    @property
    def is_serialised(self) -> bool:
        """Whether each product of a warp group is waited for before the next one starts."""
        return self.products > 1 and self.waits >= self.products


def parse(sass: str) -> list[Instruction]:
    """Return the instructions in the output of `cuobjdump -sass`."""
    lines = re.finditer(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;", sass, re.MULTILINE)
    return [Instruction(int(line[1], 16), line[2]) for line in lines]


def loops(instructions: Sequence[Instruction]) -> list[Section]:
    """Return the loops that contain no other loop, in the order of their ends."""
    spans = [
        (instruction.target, instruction.address)
        for instruction in instructions
        # A kernel ends with a branch to itself, which is never reached.
        if instruction.target is not None and instruction.target < instruction.address
    ]
    innermost = [
        (first, last)
        for first, last in spans
        if not any(first <= other[0] and other[1] <= last for other in spans if other != (first, last))
    ]
    return [
        _section([instruction for instruction in instructions if first <= instruction.address <= last])
        for first, last in innermost
    ]


def main_section(instructions: Sequence[Instruction]) -> Section:
    """Return the longest loop, or the whole kernel if it has none."""
    return max(loops(instructions), default=_section(instructions), key=lambda section: section.instructions)


def _section(instructions: Sequence[Instruction]) -> Section:
    names = Counter(instruction.name for instruction in instructions)
    waits = sum(instruction.text.startswith("WARPGROUP.DEPBAR") for instruction in instructions)
    return Section(len(instructions), names["HGMMA"], waits, dict(names.most_common()))


def kernels_of(op: str, label: str, architecture: int) -> Iterator[tuple[str, list[Instruction]]]:
    """Compile the kernels of one case; yield the name and the instructions of the first launch of each."""
    seen = set()
    for launched_by, launch in launches_of(op):
        name = launch.kernel.__name__
        if launched_by == label and name not in seen:
            seen.add(name)
            yield name, parse(cuobjdump(prepare(launch, architecture).compile().asm["cubin"], "-sass"))


def counted(op: str, label: str, architecture: int) -> dict[str, Section]:
    """Compile a case in a separate process; return the main section of each kernel by the kernel's name."""
    command = ["tests.ops.instructions", op, label, "--json", "--architecture", str(architecture)]
    return {name: Section(*section) for name, section in json.loads(in_compiling_process(command)).items()}


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("case", help="label of a case of the op's `ahead_of_time_cases`")
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--json", action="store_true", help="print only the main section of each kernel")
    options = parser.parse_args(arguments)
    kernels = kernels_of(options.op, options.case, options.architecture)
    if options.json:
        print(json.dumps({name: main_section(instructions) for name, instructions in kernels}))
        return
    for name, instructions in kernels:
        print(f"{name}: {len(instructions)} instructions")
        for loop in loops(instructions):
            print(f"    loop of {loop.instructions}{', serialised products' * loop.is_serialised}: {loop.names}")


if __name__ == "__main__":
    _main()
