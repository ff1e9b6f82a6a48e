"""The public function of `dropout_add_layer_norm`, its operators and its checks."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastssl.kernels import philox
from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.dispatch import Op, autocast_off, contiguous, norms_stay_wide, to_autocast_dtype
from fastssl.kernels.dropout_add_layer_norm import reference
from fastssl.kernels.randomness import resolve_randomness

#: Largest number of channels: a thread block holds a whole row in its registers.
_TRITON_MAX_WIDTH = 8192


def _fake_forward(
    x: Tensor,  # (N, D)
    residual: Tensor,  # (N, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
    prenorm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # out, sum, mean, rstd
    rows = x.shape[0]
    total = residual.new_empty(x.shape if prenorm else 0)
    return residual.new_empty(x.shape), total, weight.new_empty(rows), weight.new_empty(rows)


def _fake_backward(
    grad_out: Tensor,  # (N, D)
    grad_sum: Tensor | None,  # (N, D)
    x: Tensor,  # with `prenorm`, the sum; `residual` is then None
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Without dropout, the gradients of x and residual are equal, and the first result is empty.
    grad_x = x.new_empty(x.shape if dropout_p > 0 else 0)
    grad_residual = (x if residual is None else residual).new_empty(x.shape)
    return grad_x, grad_residual, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


_OP = Op(
    "dropout_add_layer_norm",
    _fake_forward,
    _fake_backward,
    triton_kernels="fastssl.kernels.dropout_add_layer_norm.triton_kernel",
)


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *inputs: Any) -> Any:  # inputs as in `_fake_forward`
        x, residual, weight, _, _, dropout_p, randomness, seed, offset, prenorm = inputs = contiguous(inputs)
        out, total, mean, rstd = _OP.forward[backend](*inputs)
        summands = (total, None) if prenorm else (x, residual)
        ctx.save_for_backward(*summands, weight, mean, rstd, seed)
        ctx.settings = backend, dropout_p, randomness, offset
        return (out, total) if prenorm else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        *saved, seed = contiguous(ctx.saved_tensors)
        backend, dropout_p, randomness, offset = ctx.settings
        grads = contiguous((grad_out, grad_total))
        grad_x, *others = _OP.backward[backend](*grads, *saved, dropout_p, randomness, seed, offset)
        # If x is narrower than the residual, autograd rounds its gradient.
        return None, grad_x if dropout_p > 0 else others[0], *others, *(None,) * 6


@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    *,
    weight: Tensor,
    bias: Tensor,
    eps: float = ...,
    dropout_p: float = ...,
    seed: Tensor | None = ...,
    offset: int = ...,
    randomness: int | None = ...,
    prenorm: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    *,
    weight: Tensor,
    bias: Tensor,
    eps: float = ...,
    dropout_p: float = ...,
    seed: Tensor | None = ...,
    offset: int = ...,
    randomness: int | None = ...,
    prenorm: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def dropout_add_layer_norm(
    x: Tensor,  # (N, D)
    residual: Tensor,  # (N, D)
    *,
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # ()
    offset: int = 0,
    randomness: int | None = None,
    prenorm: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, D), twice with `prenorm`
    """Apply layer norm (arXiv 1607.06450, equation 3) to residual + dropout(x), as at the end of a transformer block.

    `fastssl.kernels.philox` defines the dropout mask as a function of the seed, the offset and the position of an
    element in `x`.

    Args:
        x: (N, D) output of the block; dropout is applied to it.
        residual: (N, D) input of the block, in the dtype of `x`, or in fp32 if `x` is in half precision.
        weight: (D,) scale of the norm, of any floating dtype.
        bias: (D,) shift of the norm, of any floating dtype.
        eps: Added to the variance.
        dropout_p: Probability of dropping an element of `x`; the kept ones are multiplied by 1 / (1 - dropout_p).
            Version 2 of the randomness rounds the probability to a multiple of 2^-16.
        seed: () int64 on the device of `x`; the same seed drops the same elements. None draws a seed from PyTorch's
            generator of that device; the host does not wait for the seed. Activation checkpointing restores that
            generator.
        offset: Number of the first Philox block of the mask. A mask uses ceil(N D / 8) blocks, and ceil(N D / 4) under
            version 1 of the randomness. Several masks can share a seed if their blocks do not overlap.
        randomness: Version of the random draws, 1 or 2 (`fastssl.kernels.randomness`); None uses the version in force.
        prenorm: Whether to also return the sum, which a layer that normalises the inputs of its blocks needs as the
            next residual. The sum is then rounded to the dtype of `residual` before it is normalised.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        The normalised frames (N, D), and with `prenorm` also the sum (N, D), in the dtype of `residual`. Under CPU
        autocast, `x` and `residual` are cast to autocast's dtype first. Under CUDA autocast, nothing is rounded: like
        PyTorch's sum there, the residual is only widened to the dtype of `x`. Sum and norm are computed in at least
        fp32.

    Raises:
        ValueError: A shape, dtype or option is invalid, or `backend` cannot run this call.
    """
    if norms_stay_wide(x):
        residual = residual.to(torch.promote_types(x.dtype, residual.dtype))
    else:
        x, residual = to_autocast_dtype(x, residual)
    _check(x, residual, weight, bias)
    mixed = None if x.dtype == residual.dtype else "its kernels need x and residual in the same dtype"
    chosen = _OP.choose(x, backend, {"triton": _why_not_triton(x), "native": mixed})
    randomness = resolve_randomness(randomness)
    seed = philox.resolve_seed(seed, dropout_p=dropout_p, offset=offset, device=x.device)
    with autocast_off(x):
        if chosen == "reference":
            out, total = reference.dropout_add_layer_norm(
                x,
                residual,
                weight=weight,
                bias=bias,
                eps=eps,
                dropout_p=dropout_p,
                randomness=randomness,
                seed=seed,
                offset=offset,
                prenorm=prenorm,
            )
            return (out, total) if prenorm else out
        accumulator = torch.promote_types(x.dtype, torch.float32)
        weight, bias = weight.to(accumulator), bias.to(accumulator)
        result: Tensor | tuple[Tensor, Tensor] = _DropoutAddLayerNorm.apply(
            chosen, x, residual, weight, bias, eps, dropout_p, randomness, seed, offset, prenorm
        )
        return result


def _why_not_triton(x: Tensor) -> str | None:
    """Return why the Triton kernels cannot run this call, or None if they can."""
    if x.dtype == torch.float64:
        return "its kernels compute in float32"
    if x.shape[1] > _TRITON_MAX_WIDTH:
        return f"its kernels support at most {_TRITON_MAX_WIDTH} channels, not {x.shape[1]}"
    return None


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected (N, D), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating point, got {x.dtype}")
    if residual.shape != x.shape or residual.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(
            f"residual: expected {tuple(x.shape)} {x.dtype} like x (or float32 if x is in half precision),"
            f" got {tuple(residual.shape)} {residual.dtype}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[1:]:
            raise ValueError(f"{name}: expected ({x.shape[1]},), got {tuple(parameter.shape)}")
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, must be on {x.device} like x")
