"""Conversion between the bits in a register and numbers, for each type of PTX."""

import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
_NAME = re.compile(r"(bf|[busf])(8|16|32|64)(x2)?")


class Kind(NamedTuple):
    """A type of PTX.

    Attributes:
        letter: "b" bits, "u" unsigned, "s" signed, "f" IEEE float, "bf" bfloat16 or "pred".
        bits: Number of bits of one number.
        packed: Whether a register contains two numbers, the first in its low half.
    """

    letter: str
    bits: int
    packed: bool = False

    @property
    def is_float(self) -> bool:
        return self.letter in ("f", "bf")


PREDICATE = Kind("pred", 1)


def kind_of(name: str) -> Kind | None:
    """Return the type that a part of an opcode names, such as "s32"; None if it names no type."""
    if name == "pred":
        return PREDICATE
    if name == "tf32":
        return Kind("f", 32)
    if match := _NAME.fullmatch(name):
        return Kind(match[1], int(match[2]), packed=match[3] is not None)
    return None


def widen_bfloat16(bits: Array) -> Array:
    """Return bfloat16 numbers, given as uint16, in fp32."""
    wide: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def round_to_bfloat16(values: Array) -> Array:
    """Round fp32 to the nearest bfloat16, ties to even, as uint16; NaN becomes 0x7FFF as on a GPU."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    result: Array = np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
    return result


def decode(bits: Array, kind: Kind) -> Array:
    """Return the numbers of a type that the low bits of registers represent; bfloat16 is widened to fp32."""
    if kind.letter == "pred":
        return bits
    bits = bits.astype(UNSIGNED[kind.bits], copy=False)
    if kind.letter == "bf":
        return widen_bfloat16(bits)
    if kind.letter in ("b", "u"):
        return bits
    numbers: Array = bits.view((_SIGNED if kind.letter == "s" else _FLOAT)[kind.bits])
    return numbers


def encode(values: Array, kind: Kind) -> Array:
    """Return the bits of numbers of a type. Floats are rounded to the type; integers wrap."""
    if kind.letter == "pred":
        return np.asarray(values, np.bool_)
    if kind.letter == "bf":
        return round_to_bfloat16(values)
    table = _SIGNED if kind.letter == "s" else _FLOAT if kind.letter == "f" else UNSIGNED
    return np.asarray(values).astype(table[kind.bits], copy=False).view(UNSIGNED[kind.bits])


def extend(bits: Array, kind: Kind, width: int) -> Array:
    """Widen the bits of a type to a register of `width` bits, with copies of the sign for a signed type."""
    if kind.letter == "pred" or kind.bits == width:
        return bits
    if kind.letter == "s":
        return bits.view(_SIGNED[kind.bits]).astype(_SIGNED[width]).view(UNSIGNED[width])
    return bits.astype(UNSIGNED[width])


def integer_type(kind: Kind) -> type[np.integer[Any]]:
    """Return NumPy's type for an integer type of PTX."""
    return (_SIGNED if kind.letter == "s" else UNSIGNED)[kind.bits]


def float_type(kind: Kind) -> type[np.floating[Any]]:
    """Return the type in which NumPy represents a floating type of PTX."""
    return np.float32 if kind.letter == "bf" else _FLOAT[kind.bits]
