"""The dropout masks of `philox.py`, for use inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed_ptr, offset, first, threshold, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return which elements dropout keeps: (n, BLOCK) bool, row i for elements first[i] to first[i] + BLOCK - 1.

    `first` (n,) contains element numbers. ALIGNED means that they are all multiples of 4: then each Philox block is
    computed once, and its four words go to neighbouring elements. Otherwise each element computes its own block.
    """
    seed = tl.load(seed_ptr)
    if ALIGNED:
        counters = offset + (first // 4)[:, None] + tl.arange(0, BLOCK // 4)[None, :]
        word_0, word_1, word_2, word_3 = _philox(seed, counters)
        # Each join appends a dimension of 2, so the (n, BLOCK // 4, 2, 2) tile contains the words in order.
        pairs = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
        bits = tl.reshape(pairs, (first.shape[0], BLOCK))
    else:
        elements = first[:, None] + tl.arange(0, BLOCK)[None, :]
        word_0, word_1, word_2, word_3 = _philox(seed, offset + elements // 4)
        low = tl.where(elements % 2 == 0, word_0, word_1)
        high = tl.where(elements % 2 == 0, word_2, word_3)
        bits = tl.where(elements % 4 < 2, low, high)
    return bits >= threshold.to(tl.uint32)


@triton.jit
def _philox(seed, counters):
    """Return the four words of the Philox blocks whose int64 numbers are `counters`."""
    low, high = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0, low * 0)
