"""Instructions that compute each lane's result from its own registers."""

from collections.abc import Callable

import numpy as np

from tests.emulation.ptx.lanes import Action, Lanes, executes, reader
from tests.emulation.ptx.parser import Immediate, Instruction, Vector
from tests.emulation.ptx.values import PREDICATE, Array, Kind, decode, encode, float_type, integer_type

_SMALLEST_NORMAL = np.finfo(np.float32).tiny


def _flushed(values: Array) -> Array:
    """Replace denormal fp32 numbers by zero of the same sign, as instructions with `.ftz` do."""
    if values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < _SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def _fused(x: Array, y: Array, z: Array) -> Array:
    """Compute x * y + z with one rounding; in fp64 with two, whose difference no kernel of ours can show."""
    wide: Array = np.asarray(x, np.float64) * y + z
    return wide.astype(x.dtype)


def _nonzero(y: Array) -> tuple[Array, Array]:
    """Return divisors without zeros, and where the zeros were: there a GPU returns anything, and goes on."""
    zero = np.asarray(y == 0)
    return np.where(zero, np.ones_like(y), y), zero


def _quotient(x: Array, y: Array) -> Array:
    if x.dtype.kind == "f":
        return np.asarray(np.divide(x, y))
    divisor, undefined = _nonzero(y)
    quotient: Array = x // divisor
    if x.dtype.kind == "i":  # NumPy rounds down, a GPU towards zero
        quotient = quotient + ((quotient < 0) & (quotient * divisor != x)).astype(x.dtype)
    return np.where(undefined, ~np.zeros_like(x), quotient)


def _remainder(x: Array, y: Array) -> Array:
    divisor, undefined = _nonzero(y)
    return np.where(undefined, ~np.zeros_like(x), np.fmod(x, divisor))


def _shift_left(x: Array, y: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    shifted: Array = np.where(y < bits, x << np.minimum(y, bits - 1).astype(x.dtype), x.dtype.type(0))
    return shifted


def _shift_right(x: Array, y: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    beyond = x >> x.dtype.type(bits - 1) if x.dtype.kind == "i" else x.dtype.type(0)
    shifted: Array = np.where(y < bits, x >> np.minimum(y, bits - 1).astype(x.dtype), beyond)
    return shifted


#: Opcode -> function of the operands, in fp32 for bfloat16 and for packed halves.
_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _quotient,
    "rem": _remainder,
    "fma": _fused,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shift_left,
    "shr": _shift_right,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: (1 / np.sqrt(np.asarray(x, np.float64))).astype(x.dtype),
    "rcp": lambda x: np.divide(x.dtype.type(1), x),
    "sqrt": np.sqrt,
}


@executes(*_FUNCTIONS, "min", "max")
def _elementwise(instruction: Instruction) -> Action:
    if instruction.opcode == "mul" and instruction.parts[1] in _PARTS_OF_A_PRODUCT:
        return _integer_product(instruction)
    kind, target, *sources = instruction.kinds[-1], *instruction.operands
    function = _FUNCTIONS.get(instruction.opcode) or _extreme(instruction, kind)
    if kind.packed:
        return _halves(instruction, function)
    # The number of places of a shift is unsigned, and has 32 bits.
    is_shift = instruction.opcode in ("shl", "shr")
    kinds = [Kind("u", 32) if is_shift and index == 1 else kind for index in range(len(sources))]
    read = [reader(source, each) for source, each in zip(sources, kinds, strict=True)]
    flush = "ftz" in instruction.parts

    def act(lanes: Lanes, mask: Array | None) -> None:
        values = [each(lanes) for each in read]
        if flush:
            lanes.write(target, _flushed(function(*map(_flushed, values))), kind, mask)
        else:
            lanes.write(target, function(*values), kind, mask)

    return act


def _extreme(instruction: Instruction, kind: Kind) -> Callable[..., Array]:
    """Return the function of `min` or `max`: floats ignore NaN unless the opcode says otherwise."""
    if kind.is_float and "NaN" not in instruction.parts:
        return np.fmin if instruction.opcode == "min" else np.fmax
    return np.minimum if instruction.opcode == "min" else np.maximum


def _halves(instruction: Instruction, function: Callable[..., Array]) -> Action:
    """Apply a function to both halves of registers that contain two fp16 or bfloat16 numbers."""
    kind, target, *sources = instruction.kinds[-1], *instruction.operands
    half = Kind(kind.letter, kind.bits)
    read = [reader(source, Kind("u", 32)) for source in sources]

    def act(lanes: Lanes, mask: Array | None) -> None:
        packed = [each(lanes) for each in read]
        low, high = (
            encode(function(*(_half(bits, index, kind).astype(np.float32) for bits in packed)), half)
            for index in (0, 1)
        )
        lanes.write_bits(target, _pack(low, high), Kind("b", 32), mask)

    return act


def _half(bits: Array, index: int, kind: Kind) -> Array:
    """Return the low (0) or the high (1) number of registers that contain two."""
    return decode(bits >> np.uint32(16 * index), Kind(kind.letter, kind.bits))


def _pack(low: Array, high: Array) -> Array:
    packed: Array = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
    return packed


_PARTS_OF_A_PRODUCT = ("lo", "hi", "wide")


@executes("mad")
def _integer_product(instruction: Instruction) -> Action:
    """Multiply integers; keep the low half of the product, the high half or all of it; `mad` adds a number."""
    part, kind, target, *sources = instruction.parts[1], instruction.kinds[-1], *instruction.operands
    if part not in _PARTS_OF_A_PRODUCT or (part == "hi" and kind.bits > 32):
        raise instruction.unknown()
    result = Kind(kind.letter, 2 * kind.bits) if part == "wide" else kind
    first, second = (reader(source, kind) for source in sources[:2])
    addend = reader(sources[2], result) if instruction.opcode == "mad" else None

    def act(lanes: Lanes, mask: Array | None) -> None:
        x, y = first(lanes), second(lanes)
        if part == "lo":
            product = x * y
        else:
            wide = integer_type(Kind(kind.letter, 2 * kind.bits))
            product = x.astype(wide) * y.astype(wide)
            if part == "hi":
                product = (product >> wide(kind.bits)).astype(x.dtype)
        lanes.write(target, product if addend is None else product + addend(lanes), result, mask)

    return act


#: Comparison -> function; those of floats that end in "u" are true for NaN, the others false.
_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@executes("setp")
def _compare(instruction: Instruction) -> Action:
    kind, name, target = instruction.kinds[-1], instruction.parts[1], instruction.operands[0]
    unordered = kind.is_float and name in ("ltu", "leu", "gtu", "geu", "equ", "neu")
    comparison = _COMPARISONS.get(name.removesuffix("u") if unordered else name)
    combined = _COMBINATIONS.get(instruction.parts[2])
    if comparison is None and name not in ("nan", "num"):
        raise instruction.unknown()
    if isinstance(target, Vector) != kind.packed:
        raise instruction.unknown()
    targets = target.items if isinstance(target, Vector) else (target,)
    whole = Kind("u", 32) if kind.packed else kind
    first, second = (reader(operand, whole) for operand in instruction.operands[1:3])
    third = reader(instruction.operands[3], PREDICATE) if combined else None

    def compared(x: Array, y: Array) -> Array:
        isnan = np.isnan(x) | np.isnan(y) if kind.is_float else np.asarray(False)
        if comparison is None:
            return isnan if name == "nan" else ~isnan
        result: Array = comparison(x, y)
        return result | isnan if unordered else result & ~isnan

    def act(lanes: Lanes, mask: Array | None) -> None:
        x, y = first(lanes), second(lanes)
        for index, item in enumerate(targets):
            if kind.packed:
                result = compared(*(_half(bits, index, kind) for bits in (x, y)))
            else:
                result = compared(x, y)
            if combined is not None and third is not None:
                result = combined(result, third(lanes))
            lanes.write(item, result, PREDICATE, mask)

    return act


@executes("selp")
def _select(instruction: Instruction) -> Action:
    kind, target = Kind("b", instruction.kinds[-1].bits), instruction.operands[0]
    first, second = (reader(operand, kind) for operand in instruction.operands[1:3])
    condition = reader(instruction.operands[3], PREDICATE)
    return lambda lanes, mask: lanes.write_bits(
        target, np.where(condition(lanes), first(lanes), second(lanes)), kind, mask
    )


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@executes("cvt")
def _convert(instruction: Instruction) -> Action:
    target, source = instruction.kinds[-2:]
    if target.packed:
        return _convert_pair(instruction)
    # Rounding down to a smaller float, or saturation, would need code of its own.
    unknown = {"sat", "rz", "rm", "rp", "rna"} & set(instruction.parts)
    if unknown:
        raise instruction.unknown()
    read = reader(instruction.operands[1], source)
    rounding = next((_ROUNDINGS[part] for part in instruction.parts if part in _ROUNDINGS), None)
    flush = "ftz" in instruction.parts

    def act(lanes: Lanes, mask: Array | None) -> None:
        values = read(lanes)
        values = _flushed(values) if flush else values
        values = values if rounding is None else rounding(values)
        if source.is_float and not target.is_float:
            limits = np.iinfo(integer_type(target))
            values = np.clip(np.nan_to_num(values.astype(np.float64)), float(limits.min), float(limits.max))
            values = values.astype(integer_type(target))
        elif target.is_float:
            values = values.astype(float_type(target))
        lanes.write(instruction.operands[0], values, target, mask)

    return act


def _convert_pair(instruction: Instruction) -> Action:
    """Round two fp32 numbers to fp16 or bfloat16, the first to the high half of a register."""
    packed, target, *sources = instruction.kinds[-2], *instruction.operands
    half = Kind(packed.letter, packed.bits)
    if len(sources) != 2 or "rn" not in instruction.parts:
        raise instruction.unknown()
    first, second = (reader(source, Kind("f", 32)) for source in sources)
    return lambda lanes, mask: lanes.write_bits(
        target, _pack(encode(second(lanes), half), encode(first(lanes), half)), Kind("b", 32), mask
    )


@executes("bfe")
def _extract_bits(instruction: Instruction) -> Action:
    """Extract `length` bits from place `first` on; a signed type copies their highest bit upwards."""
    kind, (target, source, first, length) = instruction.kinds[-1], instruction.operands
    if not isinstance(first, Immediate) or not isinstance(length, Immediate):
        raise instruction.unknown()
    read, dtype = reader(source, kind), integer_type(kind)
    unused = kind.bits - length.bits
    up, down = dtype(max(unused - first.bits, 0)), dtype(unused)
    return lambda lanes, mask: lanes.write(target, (read(lanes) << up) >> down, kind, mask)


@executes("prmt")
def _permute_bytes(instruction: Instruction) -> Action:
    """Choose each byte of the result from the eight bytes of two registers, by four bits of the selector.

    The highest of the four means: not the byte, but eight copies of its sign.
    """
    target, *sources = instruction.operands
    if instruction.parts != ("prmt", "b32"):
        raise instruction.unknown()
    first, second, selector = (reader(source, Kind("u", 32)) for source in sources)

    def act(lanes: Lanes, mask: Array | None) -> None:
        both = first(lanes).astype(np.uint64) | (second(lanes).astype(np.uint64) << np.uint64(32))
        selectors = selector(lanes).astype(np.uint64)
        result = np.zeros(lanes.count, np.uint32)
        for place in range(4):
            chosen = (selectors >> np.uint64(4 * place)) & np.uint64(0xF)
            byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            copies_sign = (chosen & np.uint64(8)) > 0
            byte = np.where(copies_sign, np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0)), byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * place)
        lanes.write(target, result, Kind("b", 32), mask)

    return act


@executes("lop3")
def _logic(instruction: Instruction) -> Action:
    """Apply any function of three bits, given as a table of its eight results."""
    target, *sources, table = instruction.operands
    if not isinstance(table, Immediate):
        raise instruction.unknown()
    read = [reader(source, Kind("u", 32)) for source in sources]

    def act(lanes: Lanes, mask: Array | None) -> None:
        values = [each(lanes) for each in read]
        result = np.zeros(lanes.count, np.uint32)
        for case in range(8):
            if table.bits >> case & 1:
                terms = [value if case >> (2 - place) & 1 else ~value for place, value in enumerate(values)]
                result |= terms[0] & terms[1] & terms[2]
        lanes.write(target, result, Kind("b", 32), mask)

    return act
