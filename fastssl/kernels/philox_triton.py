"""The dropout masks of `philox.py`, for use inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed_ptr, offset, first, threshold, BLOCK: tl.constexpr, WIDTH: tl.constexpr, RANDOMNESS: tl.constexpr):
    """Return which elements dropout keeps: (n, BLOCK) bool, row i for elements first[i] to first[i] + BLOCK - 1.

    `first` (n,) contains element numbers, and these are multiples of 8 if WIDTH is one, and of 4 if WIDTH is. Then each
    Philox block is computed once, and its draws go to neighbouring elements. Otherwise each element computes its own
    block.
    """
    PER_BLOCK: tl.constexpr = 4 if RANDOMNESS == 1 else 8
    seed = tl.load(seed_ptr)
    if WIDTH % PER_BLOCK == 0:
        counters = offset + (first // PER_BLOCK)[:, None] + tl.arange(0, BLOCK // PER_BLOCK)[None, :]
        word_0, word_1, word_2, word_3 = _philox(seed, counters)
        # Each join appends a dimension of 2, so the (n, BLOCK // PER_BLOCK, 2, 2) tile contains the words in order.
        draws = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
        kept = draws >= threshold.to(tl.uint32)
        if RANDOMNESS >= 2:
            kept = tl.join((draws << 16) >= threshold.to(tl.uint32), kept)
        return tl.reshape(kept, (first.shape[0], BLOCK))
    elements = first[:, None] + tl.arange(0, BLOCK)[None, :]
    word_0, word_1, word_2, word_3 = _philox(seed, offset + elements // PER_BLOCK)
    words = elements if RANDOMNESS == 1 else elements // 2
    low = tl.where(words % 2 == 0, word_0, word_1)
    high = tl.where(words % 2 == 0, word_2, word_3)
    draws = tl.where(words % 4 < 2, low, high)
    if RANDOMNESS >= 2:
        draws = tl.where(elements % 2 == 0, draws << 16, draws)
    return draws >= threshold.to(tl.uint32)


@triton.jit
def _philox(seed, counters):
    """Return the four words of the Philox blocks whose int64 numbers are `counters`."""
    low, high = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0, low * 0)
