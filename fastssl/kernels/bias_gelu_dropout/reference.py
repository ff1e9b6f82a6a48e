"""Bias, GELU and dropout in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import philox


def bias_gelu_dropout(
    x: Tensor,  # (N, D)
    bias: Tensor | None,  # (D,)
    *,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
) -> Tensor:  # (N, D)
    """Apply dropout to GELU(x + bias). Arguments as in `op.py`, but `seed` is None without dropout."""
    accumulator = torch.promote_types(x.dtype, torch.float32)
    total = x.to(accumulator)
    if bias is not None:
        total = total + bias.to(accumulator)
    out = philox.dropout(F.gelu(total), dropout_p=dropout_p, randomness=randomness, seed=seed, offset=offset)
    return out.to(x.dtype)
