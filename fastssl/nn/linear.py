"""A linear layer whose output for a row does not depend on the number of other rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastssl import ops
from fastssl.kernels import gemm


class _Linear(torch.autograd.Function):
    """A linear layer with autograd that uses `kernels.gemm` for its three matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return gemm.nt(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            gemm.nn(grad_out, weight) if needs_x else None,
            gemm.tn(grad_out, x) if needs_weight else None,
            grad_out.sum(0) if needs_bias else None,
        )


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply `torch.nn.functional.linear` to packed frames; on the CPU, a frame gets the same bits in any batch.

    Args:
        x: (N, C_in) packed frames.
        weight: (C_out, C_in) weight.
        bias: (C_out,) bias, or None.

    Returns:
        (N, C_out) in the dtype of `x`, or in autocast's dtype under autocast.
    """
    if _by_onednn(x, weight):
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    rows = x.shape[0]
    if rows >= gemm.STABLE_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    padded = F.pad(x, (0, 0, 0, gemm.STABLE_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows]


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether the products of a layer call oneDNN directly."""
    return weight.dtype == x.dtype and not torch.is_autocast_enabled("cpu") and gemm.takes_onednn(x)


class PackedLinear(nn.Linear):
    """`torch.nn.Linear` over packed frames; on the CPU, a frame gets the same bits in any batch."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (N, in_features) to (N, out_features)."""
        return packed_linear(input, self.weight, self.bias)

    def with_gelu(self, input: Tensor) -> Tensor:
        """Apply the layer, then GELU: (N, in_features) to (N, out_features).

        If oneDNN computes the product and neither autograd nor a hook needs the value before GELU, oneDNN applies GELU
        as part of the product.
        """
        watched = torch.is_grad_enabled() or self._forward_pre_hooks or self._forward_hooks
        if _by_onednn(input, self.weight) and not watched:
            return gemm.nt(input, self.weight, self.bias, gelu=True)
        return ops.bias_gelu_dropout(self(input), None)
