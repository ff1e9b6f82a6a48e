"""Philox-4x32-10 in plain PyTorch: the specification of the dropout masks that kernels recompute.

Philox is a counter-based random generator (Salmon et al., SC 2011). Its bits are a function of a seed and a counter, so
a mask need not be stored. Each block of the generator has four words of 32 bits, which serve the elements of a tensor
in row-major order. Under version 1 of the randomness (`randomness.py`), element i uses word i % 4 of block
offset + i // 4. Under version 2, it uses 16 bits of word (i % 8) // 2 of block offset + i // 8: the lower ones if i is
even, the upper ones if it is odd.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastssl.kernels.randomness import dropout_threshold, kept_fraction

_LOW = 0xFFFFFFFF


def keep_mask(
    seed: Tensor,  # ()
    shape: tuple[int, ...],
    *,
    dropout_p: float,
    randomness: int,
    offset: int = 0,
) -> Tensor:
    """Return which elements dropout keeps.

    Args:
        seed: () int64 seed.
        shape: Shape of the tensor; elements are counted in row-major order.
        dropout_p: Probability of dropping an element.
        randomness: Version of the random draws (`randomness.py`).
        offset: Number of the first Philox block. Masks with the same seed are independent if their blocks do not
            overlap; a mask uses ceil(elements / 8) blocks, and ceil(elements / 4) under version 1.

    Returns:
        Bool tensor of the given shape on the device of `seed`, True where an element is kept.
    """
    total = 1
    for size in shape:
        total *= size
    per_block = 4 if randomness == 1 else 8
    blocks = torch.arange(offset, offset + (total + per_block - 1) // per_block, device=seed.device)
    draws = torch.stack(philox(seed, blocks), 1)
    if randomness >= 2:
        draws = torch.stack(((draws << 16) & _LOW, draws), 2)  # the upper 16 bits decide
    return (draws.flatten()[:total] >= dropout_threshold(dropout_p, randomness)).view(shape)


def philox(
    seed: Tensor,  # ()
    counters: Tensor,  # (n,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # 4 x (n,)
    """Compute the four words of each Philox block.

    Args:
        seed: () int64 seed.
        counters: (n,) int64 block numbers.

    Returns:
        Four (n,) int64 tensors, one for each word, with values from 0 to 2^32 - 1.
    """
    c0, c1 = counters & _LOW, (counters >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The products are unsigned 64-bit numbers. int64 has the same bits; the mask removes copies of the sign bit.
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
    """Check the dropout arguments of an op and return the seed to use.

    A seed is drawn from PyTorch's generator of the device, without waiting for the device. Activation checkpointing
    restores that generator, so a recomputation draws the same seed.

    Args:
        seed: () int64 on `device`, or None to draw a seed.
        dropout_p: Probability of dropping an element.
        device: Device of the op.
        offset: Number of the first Philox block.

    Returns:
        () int64 on `device`; None if `dropout_p` is 0.

    Raises:
        ValueError: `dropout_p` is not in [0, 1), `offset` is negative, or `seed` has the wrong shape, dtype or device.
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
    if seed is not None:
        return seed
    if _supply is None or device.type == "cpu":
        return torch.randint(2**63 - 1, (), device=device)
    return _supply.take(device)


class _Supply:
    """Seeds of each device that were drawn together and are handed out one by one. Only the host counts them."""

    def __init__(self) -> None:
        self.left: dict[torch.device, list[Tensor]] = {}

    def take(self, device: torch.device) -> Tensor:  # ()
        if not self.left.get(device):
            # Triton compiles a kernel again for a pointer that is not a multiple of 16 bytes, so use every other seed.
            self.left[device] = list(torch.randint(2**63 - 1, (_SUPPLY, 2), device=device)[:, 0].unbind())
        return self.left[device].pop()


#: Number of seeds that `seeds_together` draws at once: enough for a step of most models.
_SUPPLY = 128
_supply: _Supply | None = None


@contextmanager
def seeds_together(device: torch.device) -> Iterator[None]:
    """Return a context in which ops on a GPU take their seeds from one draw, instead of one small launch for each.

    Do not use it around activation checkpointing, which restores the generator but not the seeds that are left. On the
    CPU, it changes nothing.

    Args:
        device: Device of the ops inside the context.
    """
    global _supply
    before = _supply
    _supply = None if device.type == "cpu" else _Supply()
    try:
        yield
    finally:
        _supply = before


def dropout(
    x: Tensor,
    *,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int = 0,
) -> Tensor:
    """Apply dropout to `x` with the mask of `keep_mask`.

    Args:
        x: Tensor of any shape.
        dropout_p: Probability of dropping an element; kept ones are divided by the probability of keeping one.
        randomness: Version of the random draws.
        seed: () int64 seed; None returns `x` unchanged.
        offset: Number of the first Philox block.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    if seed is None:
        return x
    keep = keep_mask(seed, tuple(x.shape), dropout_p=dropout_p, randomness=randomness, offset=offset)
    return torch.where(keep, x * (1 / kept_fraction(dropout_p, randomness)), 0.0)
