"""Helpers of the Triton kernels of `varlen_attention`: blocks of rows, loads and stores, bias, dropout.

Blocks are counted from the start of their sequence, and block sizes do not change the order of a sum, so a sequence has
the same bits in any batch.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
#: Arguments that change from call to call. Triton must not specialise on them, or it would recompile for new values.
SIZES = ["total", "batch", "reach", "threshold"]


@triton.jit
def _mixed_product(x):
    """Apply the finaliser of 32-bit MurmurHash3 to uint32 numbers, without its first and last step, which are equal."""
    x *= 0x85EBCA6B
    x ^= x >> 13
    return x * 0xC2B2AE35


@triton.jit
def _fold(x):
    """Apply the first and last step of that finaliser, which is linear in the bits and its own inverse."""
    return x ^ (x >> 16)


@triton.jit
def row_states(seed_ptr, rows, head):
    """Return the state of the dropout hash after seed, packed row and head; only the key and a `_fold` are missing."""
    seed = tl.load(seed_ptr)
    state = _mixed_product(_fold(seed.to(tl.uint32) ^ 0x9E3779B9))
    state = _mixed_product(state ^ _fold((seed >> 32).to(tl.uint32)))
    state = _mixed_product(state ^ _fold(rows.to(tl.uint32)))
    return _mixed_product(state ^ _fold(head.to(tl.uint32)))


@triton.jit
def is_kept(states, start, places, threshold, RANDOMNESS: tl.constexpr):
    """Return whether dropout keeps the weights of the keys start + places, from the results of `row_states`.

    `start` is a multiple of a power of two above all places. Under version 2 of the randomness, the keys p and p + 8,
    where p has a bit 3 of 0, share a hash. A thread has both in the results of tensor cores, whether keys are rows or
    columns. The shared hash is written twice here, and the compiler computes it once.
    """
    places = places.to(tl.uint32)
    start = tl.cast(start, tl.uint32)  # an int in the interpreter
    shared = places if RANDOMNESS == 1 else places & 0xFFFFFFF7
    draws = _mixed_product(states ^ shared ^ _fold(start))
    if RANDOMNESS == 1:
        draws = _fold(draws)
    else:
        draws = tl.where((places & 8) == 0, draws * 0x10001, draws)  # the upper 16 bits decide
    return draws >= threshold.to(tl.uint32)


@triton.jit
def unknown_zero(total):
    """Return 0.0 in a way that the compiler cannot see, for the weights that dropout drops.

    It would otherwise choose between a constant and a weight after rounding to 16 bits. That takes one more instruction
    per weight, because two 16-bit numbers share a register.
    """
    return tl.where(total > 0, 0.0, 1.0)


@triton.jit
def biases_at(bias_ptr, distances, reach):
    """Load the bias of one head in fp32 at some distances, which are clamped to the table."""
    return tl.load(bias_ptr + tl.minimum(tl.maximum(distances, -reach), reach) + reach).to(tl.float32)


@triton.jit
def block_of(tile, cu_seqlens_ptr, batch, BLOCK: tl.constexpr):
    """Locate block `tile`: return the first row and length of its sequence, and the block's first row in it.

    The blocks of sequence b start at number cu_seqlens[b] // BLOCK + b. They cover its rows, and at most one of them
    starts after its end. So N // BLOCK + B programs cover all sequences, and the host need not know the lengths.
    """
    sequence = -1
    for start in range(0, batch, 128):
        index = start + tl.arange(0, 128)
        begins = tl.load(cu_seqlens_ptr + index, mask=index < batch, other=0)
        sequence += tl.sum(((index < batch) & (begins // BLOCK + index <= tile)).to(tl.int32))
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    return begin, length, (tile - begin // BLOCK - sequence) * BLOCK


@triton.jit
def load_rows(ptr, rows, length, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load (rows, BLOCK_E) of one sequence and head; zeros for rows after its end, which belong to other sequences."""
    columns = tl.arange(0, BLOCK_E)
    mask = (rows < length)[:, None]
    if E < BLOCK_E:
        mask = mask & (columns < E)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, length, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store (rows, BLOCK_E) of one sequence and head, without rows after its end."""
    columns = tl.arange(0, BLOCK_E)
    mask = (rows < length)[:, None]
    if E < BLOCK_E:
        mask = mask & (columns < E)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], x.to(ptr.dtype.element_ty), mask=mask)
