"""Activations that give a frame the same bits at any place in a batch.

On a CPU, PyTorch computes the last elements of each thread's share with a different exponential function. Computing in
fp64 and rounding the result hides the difference.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.autograd import is_transformed, once_differentiable

#: Elements per block. A block in fp64 fits in the processor's cache, so computing in fp64 costs no memory traffic.
_BLOCK = 1 << 15


def sigmoid(x: Tensor) -> Tensor:
    """Return `torch.sigmoid` of a tensor, in its shape and dtype; on the CPU, computed in fp64 and then rounded."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.sigmoid(x)
    return torch.sigmoid(x.double()).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Compute `torch.nn.functional.silu`, x * sigmoid(x): (N, C) to (N, C) in the dtype of `x`."""
    return _rounded(F.silu, torch.ops.aten.silu_backward, x)


def glu(x: Tensor) -> Tensor:
    """Compute `torch.nn.functional.glu`, the first half of the channels times the sigmoid of the second half.

    Args:
        x: (N, 2C) frames.

    Returns:
        (N, C) in the dtype of `x`.
    """
    return _rounded(F.glu, partial(torch.ops.aten.glu_backward, dim=1), x)


def _rounded(function: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function`; on the CPU, compute in fp64 and round. `gradient` maps (grad_out, x) to the gradient of x."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return function(x)
    if torch.compiler.is_compiling() or is_transformed():
        return function(x.double()).to(x.dtype)
    out: Tensor = _Rounded.apply(function, gradient, x)
    return out


class _Rounded(torch.autograd.Function):
    """The autograd function of `_rounded` on the CPU. It works on blocks of rows, and saves `x`, not an fp64 copy."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor], x: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        rows = max(1, _BLOCK // max(1, x.shape[1]))
        return torch.cat([function(block.double()).to(x.dtype) for block in x.split(rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, None, ctx.gradient(grad_out, x)
