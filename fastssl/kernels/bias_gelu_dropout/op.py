"""The public function of `bias_gelu_dropout`, its operators and its checks."""

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels import philox
from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.bias_gelu_dropout import reference
from fastssl.kernels.dispatch import Op, autocast_off, contiguous
from fastssl.kernels.randomness import resolve_randomness


def _fake_forward(
    x: Tensor,  # (N, D)
    bias: Tensor | None,  # (D,)
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor]:
    # A schema cannot return None, so the gradient of a missing bias is an empty tensor.
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
        x, bias, dropout_p, randomness, seed, offset = inputs = contiguous(inputs)
        ctx.save_for_backward(x, bias, seed)
        ctx.settings = backend, dropout_p, randomness, offset
        return _OP.forward[backend](*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, seed = contiguous(ctx.saved_tensors)
        backend, dropout_p, randomness, offset = ctx.settings
        grad_x, grad_bias = _OP.backward[backend](*contiguous(grads), x, bias, dropout_p, randomness, seed, offset)
        return None, grad_x, None if bias is None else grad_bias, *(None,) * 4


def bias_gelu_dropout(
    x: Tensor,  # (N, D)
    bias: Tensor | None,  # (D,)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # ()
    offset: int = 0,
    randomness: int | None = None,
    backend: str | None = None,
) -> Tensor:  # (N, D)
    """Apply dropout to GELU(x + bias), the middle of a feed-forward block. The GELU (arXiv 1606.08415) is exact.

    `fastssl.kernels.philox` defines the dropout mask as a function of the seed, the offset and the position of an
    element in `x`.

    Args:
        x: (N, D) frames.
        bias: (D,) bias of any floating dtype, or None. Pass the bias of the preceding linear layer here: this op's
            backward pass computes its gradient without another pass over memory.
        dropout_p: Probability of dropping an element; the kept ones are multiplied by 1 / (1 - dropout_p).
            Version 2 of the randomness rounds the probability to a multiple of 2^-16.
        seed: () int64 on the device of `x`; the same seed drops the same elements. None draws a seed from PyTorch's
            generator of that device; the host does not wait for the seed. Activation checkpointing restores that
            generator.
        offset: Number of the first Philox block of the mask. A mask uses ceil(N D / 8) blocks, and ceil(N D / 4) under
            version 1 of the randomness. Several masks can share a seed if their blocks do not overlap.
        randomness: Version of the random draws, 1 or 2 (`fastssl.kernels.randomness`); None uses the version in force.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        (N, D) in the dtype of `x`, computed in at least fp32. Autocast does not change this op.

    Raises:
        ValueError: A shape, dtype or option is invalid, or `backend` cannot run this call.
    """
    _check(x, bias)
    chosen = _OP.choose(x, backend, {"triton": "its kernels compute in float32" if x.dtype == torch.float64 else None})
    randomness = resolve_randomness(randomness)
    seed = philox.resolve_seed(seed, dropout_p=dropout_p, offset=offset, device=x.device)
    with autocast_off(x):
        if chosen == "reference":
            return reference.bias_gelu_dropout(
                x, bias, dropout_p=dropout_p, randomness=randomness, seed=seed, offset=offset
            )
        if bias is not None:
            bias = bias.to(torch.promote_types(x.dtype, torch.float32))
        out: Tensor = _BiasGeluDropout.apply(chosen, x, bias, dropout_p, randomness, seed, offset)
        return out


def _check(x: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: expected (N, D), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating point, got {x.dtype}")
    if bias is not None and bias.shape != x.shape[1:]:
        raise ValueError(f"bias: expected ({x.shape[1]},), got {tuple(bias.shape)}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias: is on {bias.device}, must be on {x.device} like x")
