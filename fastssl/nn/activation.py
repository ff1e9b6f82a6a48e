"""Activations with the same bits wherever in a batch a frame lies.

On a CPU PyTorch computes the last elements of each thread's share by another exponential than the rest. Rounding from
fp64 hides the difference.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Elements of a block: in fp64 it stays in the processor's cache, where the detour costs no more than the memory.
_BLOCK = 1 << 15


def sigmoid(x: Tensor) -> Tensor:
    """`torch.sigmoid`."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.sigmoid(x)
    return torch.sigmoid(x.double()).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """`torch.nn.functional.silu`, x * sigmoid(x), of frames (N, C)."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.silu(x)
    if torch.compiler.is_compiling():
        return F.silu(x.double()).to(x.dtype)
    out: Tensor = _Silu.apply(x)
    return out


def glu(x: Tensor) -> Tensor:
    """`torch.nn.functional.glu`, the first half of the channels times the sigmoid of the second: (N, 2C) to (N, C)."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.glu(x)
    if torch.compiler.is_compiling():
        return F.glu(x.double()).to(x.dtype)
    out: Tensor = _Glu.apply(x)
    return out


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _by_blocks(F.silu, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x: Tensor = torch.ops.aten.silu_backward(grad_out, x)
        return grad_x


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _by_blocks(F.glu, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x: Tensor = torch.ops.aten.glu_backward(grad_out, x, 1)
        return grad_x


def _by_blocks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    rows = max(1, _BLOCK // max(1, x.shape[1]))
    return torch.cat([function(block.double()).to(x.dtype) for block in x.split(rows)])
