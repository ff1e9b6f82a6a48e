"""A linear layer whose output for a row does not depend on the number of other rows."""

from collections.abc import Iterator
from contextlib import contextmanager
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


class _CastLinear(torch.autograd.Function):
    """A linear layer with copies of its parameters in autocast's dtype.

    The gradients of weight and bias are fp32 at once. Those of `F.linear` would be rounded to autocast's dtype first,
    and then cast, each in a launch of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weight_copy: Tensor, bias_copy: Tensor | None
    ) -> Tensor:
        lower = x.to(weight_copy.dtype)
        ctx.save_for_backward(lower, weight_copy)
        ctx.dtype = x.dtype
        return F.linear(lower, weight_copy, bias_copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        lower, weight_copy = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (
            (grad_out @ weight_copy).to(ctx.dtype) if needs_x else None,
            _product_in_fp32(grad_out.t(), lower) if needs_weight else None,
            grad_out.sum(0, dtype=torch.float32) if needs_bias else None,
            None,
            None,
        )


def _product_in_fp32(x: Tensor, y: Tensor) -> Tensor:
    if x.device.type == "cuda":
        return torch.mm(x, y, out_dtype=torch.float32)
    return (x @ y).float()


#: Copies of parameters in autocast's dtype, by the id of the parameter; empty outside `casts_together`.
_copies: dict[int, Tensor] = {}


@contextmanager
def casts_together(module: nn.Module) -> Iterator[None]:
    """Return a context in which the linear layers of a module are cast for autocast in one launch, not one by one.

    Without autocast and on the CPU, nothing changes. The parameters must not change inside the context.

    Args:
        module: Module whose linear layers `packed_linear` computes.
    """
    linear = (part for part in module.modules() if isinstance(part, nn.Linear))
    parameters: list[Tensor] = [
        one for part in linear for one in part.parameters(recurse=False) if one.dtype == torch.float32
    ]
    if _copies or not parameters or not _is_cast(parameters[0].device.type):
        yield
        return
    device = parameters[0].device
    sizes = [-(-one.numel() // _ALIGNMENT) * _ALIGNMENT for one in parameters]
    with torch.no_grad():
        buffer = torch.empty(sum(sizes), dtype=torch.get_autocast_dtype(device.type), device=device)
        parts = zip(buffer.split(sizes), parameters, strict=True)
        copies = [part[: one.numel()].view(one.shape) for part, one in parts]
        torch._foreach_copy_(copies, parameters)
    _copies.update(zip(map(id, parameters), copies, strict=True))
    try:
        yield
    finally:
        _copies.clear()


def casts_are_shared() -> bool:
    """Return whether the code runs inside `casts_together`, with copies that are freed at its end."""
    return bool(_copies)


def _is_cast(device: str) -> bool:
    return device != "cpu" and torch.is_autocast_enabled(device)


#: Copies begin at multiples of this many elements, because fast matrix products need aligned pointers.
_ALIGNMENT = 64


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply `torch.nn.functional.linear` to packed frames; on the CPU, a frame gets the same bits in any batch.

    Args:
        x: (N, C_in) packed frames.
        weight: (C_out, C_in) weight.
        bias: (C_out,) bias, or None.

    Returns:
        (N, C_out) in the dtype of `x`, or in autocast's dtype under autocast.
    """
    if id(weight) in _copies and torch.is_autocast_enabled(x.device.type):
        bias_copy = None if bias is None else _copies[id(bias)]
        cast: Tensor = _CastLinear.apply(x, weight, bias, _copies[id(weight)], bias_copy)
        return cast
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
