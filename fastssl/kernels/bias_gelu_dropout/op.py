"""The public function of `bias_gelu_dropout`, its operators and its checks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.kernels import philox
from fastssl.kernels.bias_gelu_dropout import reference
from fastssl.kernels.dispatch import Op, autocast_off, contiguous


def _fake_forward(
    x: Tensor,  # (N, D)
    bias: Tensor | None,  # (D,)
    dropout_p: float,
    seed: Tensor | None,  # ()
    offset: int,
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor, x: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    # A schema cannot return None: the gradient of a bias that was not given is empty.
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


_OP = Op(
    "bias_gelu_dropout",
    _fake_forward,
    _fake_backward,
    triton_kernels="fastssl.kernels.bias_gelu_dropout.triton_kernel",
)


class _BiasGeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *inputs: Any) -> Any:  # inputs as in `_fake_forward`
        x, bias, dropout_p, seed, offset = inputs = contiguous(inputs)
        ctx.save_for_backward(x, bias, seed)
        ctx.settings = backend, dropout_p, offset
        return _OP.forward[backend](*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, seed = ctx.saved_tensors
        backend, dropout_p, offset = ctx.settings
        grad_x, grad_bias = _OP.backward[backend](*contiguous(grads), x, bias, dropout_p, seed, offset)
        return None, grad_x, None if bias is None else grad_bias, None, None, None


def bias_gelu_dropout(
    x: Tensor,  # (N, D)
    bias: Tensor | None,  # (D,)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # ()
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:  # (N, D)
    """Dropout of GELU(x + bias), with the exact GELU (arXiv 1606.08415), as the feed-forward layer has it.

    The dropout mask is that of `fastssl.kernels.philox`: a function of seed, offset and the element's place in `x`.

    Args:
        x: (N, D) frames.
        bias: (D,) of any floating dtype, or None. It belongs here rather than in the matrix product before, because
            its gradient is the sum of what the backward has in hand.
        dropout_p: Probability of dropping an element; the kept ones are scaled by 1 / (1 - dropout_p).
        seed: () int64 on the device of `x`: the same seed drops the same elements. None draws one from PyTorch's
            generator of that device, without waiting for it, so activation checkpointing repeats it.
        offset: First Philox block of the mask, which takes ceil(N D / 4), so that several masks may share a seed.
        backend: See `fastssl.ops`; None takes the fastest there is.

    Returns:
        (N, D) in the dtype of `x`, computed in at least fp32. Autocast does not change this op.

    Raises:
        ValueError: Shapes, dtypes or options do not fit, or `backend` cannot serve the call.
    """
    _check(x, bias)
    chosen = _OP.choose(x, backend, {"triton": "it computes in float32" if x.dtype == torch.float64 else None})
    seed = philox.resolve_seed(seed, dropout_p=dropout_p, offset=offset, device=x.device)
    with autocast_off(x):
        if chosen == "reference":
            return reference.bias_gelu_dropout(x, bias, dropout_p=dropout_p, seed=seed, offset=offset)
        if bias is not None:
            bias = bias.to(torch.promote_types(x.dtype, torch.float32))
        out: Tensor = _BiasGeluDropout.apply(chosen, x, bias, dropout_p, seed, offset)
        return out


def _check(x: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: expected (N, D), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating point, got {x.dtype}")
    if bias is not None and bias.shape != x.shape[1:]:
        raise ValueError(f"bias: expected ({x.shape[1]},), got {tuple(bias.shape)}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias: is on {bias.device}, x on {x.device}")
