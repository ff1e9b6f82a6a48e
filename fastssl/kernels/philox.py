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


def resolve_seed(
    seed: Tensor | None,  # ()
    *,
    dropout_p: float,
    device: torch.device,
    offset: int = 0,
) -> Tensor | None:  # ()
    """The seed of a call: none without dropout, the caller's, or one from PyTorch's generator of the device.

    Drawing one does not wait for the device, and activation checkpointing, which restores the generator, repeats it.

    Raises:
        ValueError: An argument of the dropout does not fit.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: must be at least 0 and less than 1, got {dropout_p}")
    if offset < 0:
        raise ValueError(f"offset: must not be negative, got {offset}")
    if seed is not None and (seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device):
        raise ValueError(
            f"seed: expected () torch.int64 on {device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    if dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (), device=device) if seed is None else seed


def dropout(
    x: Tensor,
    *,
    dropout_p: float,
    seed: Tensor | None,  # ()
    offset: int = 0,
) -> Tensor:
    """Dropout of `x` by `keep_mask`; `seed` is None where `dropout_p` is 0."""
    if seed is None:
        return x
    keep = keep_mask(seed, tuple(x.shape), dropout_p=dropout_p, offset=offset)
    return torch.where(keep, x * (1 / (1 - dropout_p)), 0.0)
