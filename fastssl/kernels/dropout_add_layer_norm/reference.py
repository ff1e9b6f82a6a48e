"""Dropout, residual and layer norm in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import philox


def dropout_add_layer_norm(
    x: Tensor,  # (N, D)
    residual: Tensor,  # (N, D)
    *,
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
    prenorm: bool,
) -> tuple[Tensor, Tensor]:  # (N, D), (N, D)
    """Return the normalised sum and the sum. Arguments as in `op.py`, but `seed` is None without dropout."""
    accumulator = torch.promote_types(x.dtype, torch.float32)
    branch = philox.dropout(x.to(accumulator), dropout_p=dropout_p, randomness=randomness, seed=seed, offset=offset)
    total = residual.to(accumulator) + branch
    rounded = total.to(residual.dtype)
    if prenorm:
        total = rounded.to(accumulator)
    out = F.layer_norm(total, weight.shape, weight.to(accumulator), bias.to(accumulator), eps)
    return out.to(residual.dtype), rounded
