"""Quantisation by a straight-through Gumbel softmax, in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import splitmix


def gumbel_noise(
    seeds: Tensor,  # (M,)
    groups: int,
    codes: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (M, G, V)
    """Draw standard Gumbel noise from one seed per frame: code v of group g gets number g * V + v of its frame's seed.

    Args:
        seeds: (M,) int64 seeds.
        groups: G, the number of groups.
        codes: V, the number of codes per group.
        dtype: Dtype of the noise.

    Returns:
        (M, G, V) noise.
    """
    counters = torch.arange(groups * codes, device=seeds.device)
    noise: Tensor = splitmix.gumbel(seeds.unsqueeze(1), counters, dtype).unflatten(1, (groups, codes))
    return noise


def gumbel_quantize(
    logits: Tensor,  # (M, G, V)
    codevectors: Tensor,  # (G, V, E)
    noise: Tensor | None,  # (M, G, V)
    seeds: Tensor | None,  # (M,)
    *,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (M, G * E), (M, G), (G, V), (G, V)
    """Return the fields of `GumbelQuantized`. Arguments as in `op.py`, without checks."""
    accumulator = torch.promote_types(torch.promote_types(logits.dtype, codevectors.dtype), torch.float32)
    logits = logits.to(accumulator)
    if seeds is not None:
        noise = gumbel_noise(seeds, logits.shape[1], logits.shape[2], accumulator)
    noisy = logits if noise is None else logits + noise.to(accumulator)
    soft = F.softmax(noisy / temperature, dim=-1)
    codes = noisy.argmax(-1)
    hard = F.one_hot(codes, logits.shape[2])
    # In this order of additions, the weights are exactly one-hot, so equal codes give equal vectors to the last bit.
    weights = hard + (soft - soft.detach())
    values = torch.einsum("mgv,gve->mge", weights, codevectors.to(accumulator)).flatten(1)
    return values.to(codevectors.dtype), codes, F.softmax(logits, dim=-1).sum(0), hard.sum(0)
