"""The dropout masks of `philox.py` within Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed_ptr, offset, first, threshold, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Which elements dropout keeps, of the `BLOCK` from each of `first` (n,) on: (n, BLOCK).

    ALIGNED: every `first` is a multiple of 4. Then the four words of a block belong to neighbours in the tile, and no
    block is computed twice; else every element computes the block that its word is in.
    """
    seed = tl.load(seed_ptr)
    if ALIGNED:
        counters = offset + (first // 4)[:, None] + tl.arange(0, BLOCK // 4)[None, :]
        word_0, word_1, word_2, word_3 = _philox(seed, counters)
        # Joining adds a last dimension of 2, so that a tile of (n, BLOCK // 4, 2, 2) has the words in order.
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
    low, high = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0, low * 0)
