"""Instructions of the tensor cores: products of small matrices that are spread over a warp.

The places of the elements are those of PTX's documentation, "Matrix Fragments for mma.m16n8k8 / m16n8k16".
"""

from typing import NamedTuple

import numpy as np

from tests.emulation.ptx.lanes import Action, Lanes, executes, reader
from tests.emulation.ptx.parser import Address, Instruction, Vector
from tests.emulation.ptx.values import Array, Kind, decode
from tests.emulation.ptx.warps import WARP

_LANE = np.arange(WARP)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4  # a warp is eight groups of four lanes
_BITS = Kind("b", 32)
_TF32_BITS = np.uint32(0xFFFFE000)  # the hardware ignores the lowest 13 bits of an fp32 number


class _Shape(NamedTuple):
    """Depth of a product of (16, depth) and (depth, 8), and how many numbers a register contains."""

    depth: int
    per_register: int


_SHAPES = {
    ("m16n8k16", "bf"): _Shape(16, 2),
    ("m16n8k16", "f"): _Shape(16, 2),
    ("m16n8k8", "bf"): _Shape(8, 2),
    ("m16n8k8", "f"): _Shape(8, 2),
    ("m16n8k8", "tf32"): _Shape(8, 1),
}


@executes("mma")
def _multiply(instruction: Instruction) -> Action:
    """Compute D = A B + C, exactly but for one rounding to fp32."""
    parts, (target, *sources) = instruction.parts, instruction.operands
    known = parts[:3] == ("mma", "sync", "aligned") and parts[4:7] == ("row", "col", "f32") and parts[9:] == ("f32",)
    kind = instruction.kinds[1] if known else _BITS
    tf32 = "tf32" in parts
    shape = _SHAPES.get((parts[3], "tf32" if tf32 else kind.letter))
    if not known or shape is None or parts[7] != parts[8] or not isinstance(target, Vector):
        raise instruction.unknown()
    registers = []
    for source, each in zip(sources, (_BITS, _BITS, Kind("f", 32)), strict=True):
        assert isinstance(source, Vector)
        registers.append([reader(item, each) for item in source.items])
    rows_of_a, columns_of_a = _places_of_a(shape)
    rows_of_b = _places_of_b(shape)
    first, second, third = registers
    if len(first) * shape.per_register * WARP != 16 * shape.depth:
        raise instruction.unknown()

    def act(lanes: Lanes, mask: Array | None) -> None:
        warps = lanes.count // WARP
        a, b = np.zeros((warps, 16, shape.depth), np.float32), np.zeros((warps, shape.depth, 8), np.float32)
        for register, rows, columns in zip(first, rows_of_a, columns_of_a, strict=True):
            for half, values in enumerate(_numbers(register(lanes), kind, lanes.count, tf32)):
                a[:, rows, columns + half] = values
        for register, rows in zip(second, rows_of_b, strict=True):
            for half, values in enumerate(_numbers(register(lanes), kind, lanes.count, tf32)):
                b[:, rows + half, _GROUP] = values
        product = a.astype(np.float64) @ b
        for index, item in enumerate(target.items):
            rows, columns = _GROUP + index // 2 * 8, _IN_GROUP * 2 + index % 2
            addend = np.broadcast_to(third[index](lanes), lanes.count)
            lanes.write(item, product[:, rows, columns].reshape(-1) + addend, Kind("f", 32), mask)

    return act


def _places_of_a(shape: _Shape) -> tuple[list[Array], list[Array]]:
    """Return for each register of A the row, and the column of its first number, by lane."""
    count = 16 * shape.depth // (WARP * shape.per_register)
    rows = [_GROUP + index % 2 * 8 for index in range(count)]
    columns = [_IN_GROUP * shape.per_register + index // 2 * 4 * shape.per_register for index in range(count)]
    return rows, columns


def _places_of_b(shape: _Shape) -> list[Array]:
    """Return for each register of B the row of its first number, by lane; the column is the lane's group."""
    count = 8 * shape.depth // (WARP * shape.per_register)
    return [_IN_GROUP * shape.per_register + index * 4 * shape.per_register for index in range(count)]


def _numbers(bits: Array, kind: Kind, count: int, tf32: bool) -> list[Array]:
    """Return the numbers of a register, each as (warps, 32) fp32."""
    bits = np.broadcast_to(bits, count).reshape(-1, WARP)
    if tf32:
        return [(bits & _TF32_BITS).view(np.float32)]
    return [decode(bits >> np.uint32(shift), kind).astype(np.float32) for shift in (0, 16)]


@executes("ldmatrix")
def _load_matrices(instruction: Instruction) -> Action:
    """Load 8 by 8 matrices of 16-bit numbers; lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i."""
    parts, (target, source) = instruction.parts, instruction.operands
    transposed = "trans" in parts
    if parts[1:4] != ("sync", "aligned", "m8n8") or parts[-2:] != ("shared", "b16") or not isinstance(source, Address):
        raise instruction.unknown()
    items = target.items if isinstance(target, Vector) else (target,)
    if parts[4] != f"x{len(items)}":
        raise instruction.unknown()
    pointer, offset = reader(source.base, Kind("s", 32)), np.int32(source.offset)

    def act(lanes: Lanes, mask: Array | None) -> None:
        whole = np.full(lanes.count, True) if mask is None else mask
        addresses = (np.broadcast_to(pointer(lanes), lanes.count) + offset).reshape(-1, WARP)
        warps = np.nonzero(whole.reshape(-1, WARP).any(1))[0]
        for index, item in enumerate(items):
            rows = addresses[warps, 8 * index : 8 * index + 8]
            owners = np.repeat(warps * WARP, 8)
            words = lanes.shared.load(owners, rows.reshape(-1), 32, 4, instruction.text)
            matrices = np.ascontiguousarray(words.T).view(np.uint16).reshape(-1, 8, 8)
            if transposed:
                matrices = matrices.transpose(0, 2, 1)
            low, high = (matrices[:, _GROUP, 2 * _IN_GROUP + half].astype(np.uint32) for half in (0, 1))
            result = np.zeros((lanes.count // WARP, WARP), np.uint32)
            result[warps] = low | (high << np.uint32(16))
            lanes.write_bits(item, result.reshape(-1), _BITS, mask)

    return act
