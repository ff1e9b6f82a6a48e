"""Philox-4x32-10 in plain PyTorch: the specification of the dropout masks that kernels recompute.

A counter-based generator (Salmon et al., SC 2011): the bits are a function of seed and counter, so a mask is never
stored. Element i of a tensor takes word i % 4 of block offset + i // 4.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def keep_mask(
    seed: Tensor,  # ()
    shape: tuple[int, ...],
    *,
    dropout_p: float,
    offset: int = 0,
) -> Tensor:
    """Which elements dropout keeps, a bool tensor of `shape` on the device of `seed`.

    Args:
        seed: () int64.
        shape: Of the tensor; elements are counted in row-major order.
        dropout_p: Probability of dropping an element.
        offset: First Philox block, so that several masks may share a seed.
    """
    total = 1
    for size in shape:
        total *= size
    blocks = torch.arange(offset, offset + (total + 3) // 4, device=seed.device)
    bits = torch.stack(philox(seed, blocks), 1).flatten()[:total]
    return (bits >= int(dropout_p * 2**32)).view(shape)


def philox(
    seed: Tensor,  # ()
    counters: Tensor,  # (n,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # 4 x (n,)
    """The four 32-bit words of each block, as int64 that are not negative; `seed` and `counters` are int64."""
    c0, c1 = counters & _LOW, (counters >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The products need 64 bits without sign: int64 wraps to the same bits, and the mask undoes the sign.
        product_0, product_1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _LOW) ^ c1 ^ k0,
            product_1 & _LOW,
            ((product_0 >> 32) & _LOW) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
