"""The public function of `dropout_add_layer_norm`, its schema and its checks."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.kernels import philox
from fastssl.kernels.dispatch import Schemas, choose_backend, define_op
from fastssl.kernels.dropout_add_layer_norm import reference

_FORWARD = (
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float dropout_p, Tensor? seed, SymInt offset,"
    " bool prenorm) -> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)"
)
# With `prenorm` the backward has the sum for x, and no residual.
_BACKWARD = (
    "(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd,"
    " float dropout_p, Tensor? seed, SymInt offset)"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)
#: A row is held in the registers of one block of threads.
_TRITON_MAX_WIDTH = 8192


def _fake_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
    prenorm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if prenorm else 0),
        weight.new_empty(rows),
        weight.new_empty(rows),
    )


def _fake_backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Without dropout the gradient of x is that of the residual, and the first result is empty.
    grad_x = x.new_empty(x.shape if dropout_p > 0 else 0)
    return grad_x, x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


define_op(
    "dropout_add_layer_norm",
    schemas=Schemas(_FORWARD, _BACKWARD, _fake_forward, _fake_backward),
    triton_kernels="fastssl.kernels.dropout_add_layer_norm.triton_kernel",
)
_KERNELS = {"native": torch.ops.fastssl_native, "triton": torch.ops.fastssl_triton}


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        offset: int,
        prenorm: bool,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, total, mean, rstd = _KERNELS[backend].dropout_add_layer_norm_fwd(
            x, residual, weight, bias, eps, dropout_p, seed, offset, prenorm
        )
        ctx.settings = dropout_p, offset, backend
        if prenorm:
            ctx.save_for_backward(total, None, weight, mean, rstd, seed)
            return out, total
        ctx.save_for_backward(x, residual, weight, mean, rstd, seed)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, residual, weight, mean, rstd, seed = ctx.saved_tensors
        dropout_p, offset, backend = ctx.settings
        if grad_total is not None:
            grad_total = grad_total.contiguous()
        grad_x, grad_residual, grad_weight, grad_bias = _KERNELS[backend].dropout_add_layer_norm_bwd(
            grad_out.contiguous(), grad_total, x, residual, weight, mean, rstd, dropout_p, seed, offset
        )
        return grad_x if dropout_p > 0 else grad_residual, grad_residual, grad_weight, grad_bias, *(None,) * 6


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
    prenorm: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, D), with `prenorm` twice
    """Layer norm (arXiv 1607.06450, equation 3) of residual + dropout(x), as a transformer layer joins its branches.

    The dropout mask is that of `fastssl.kernels.philox`: a function of seed, offset and the element's place in `x`.

    Args:
        x: (N, D) frames of the branch, which dropout falls on.
        residual: (N, D), in the dtype of `x`.
        weight: (D,) of the norm, of any floating dtype.
        bias: (D,) of the norm, of any floating dtype.
        eps: Added to the variance.
        dropout_p: Probability of dropping an element of `x`; the kept ones are scaled by 1 / (1 - dropout_p).
        seed: () int64 on the device of `x`: the same seed drops the same elements. None draws one from PyTorch's
            generator of that device, without waiting for it, so activation checkpointing repeats it.
        offset: First Philox block of the mask, which takes ceil(N D / 4), so that several masks may share a seed.
        prenorm: Return the sum too, which a layer with its norm before the block carries on as its residual. Then the
            norm is of the sum as it is returned, rounded to its dtype.
        backend: See `fastssl.ops`; None takes the fastest there is.

    Returns:
        The normalised frames (N, D), with `prenorm` also the sum (N, D), in the dtype of `x`, which under autocast is
        autocast's for `x` and `residual`. Sum and norm are computed in at least fp32.

    Raises:
        ValueError: Shapes, dtypes or options do not fit, or `backend` cannot serve the call.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, residual = x.to(dtype), residual.to(dtype)
    _check(x, residual, weight, bias)
    unsupported = _why_not_triton(x)
    chosen = choose_backend(
        "dropout_add_layer_norm", x, backend, unsupported={"triton": unsupported} if unsupported else None
    )
    seed = philox.resolve_seed(seed, dropout_p=dropout_p, offset=offset, device=x.device)
    with torch.autocast(device, enabled=False):
        if chosen == "reference":
            out, total = reference.dropout_add_layer_norm(
                x,
                residual,
                weight=weight,
                bias=bias,
                eps=eps,
                dropout_p=dropout_p,
                seed=seed,
                offset=offset,
                prenorm=prenorm,
            )
            return (out, total) if prenorm else out
        accumulator = torch.promote_types(x.dtype, torch.float32)
        result: Tensor | tuple[Tensor, Tensor] = _DropoutAddLayerNorm.apply(
            x.contiguous(),
            residual.contiguous(),
            weight.to(accumulator).contiguous(),
            bias.to(accumulator).contiguous(),
            eps,
            dropout_p,
            seed,
            offset,
            prenorm,
            chosen,
        )
        return result


def _why_not_triton(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32"
    if x.shape[1] > _TRITON_MAX_WIDTH:
        return f"it takes at most {_TRITON_MAX_WIDTH} channels, not {x.shape[1]}"
    return None


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected (N, D), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating point, got {x.dtype}")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: expected {tuple(x.shape)} {x.dtype}, as x, got {tuple(residual.shape)} {residual.dtype}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[1:]:
            raise ValueError(f"{name}: expected ({x.shape[1]},), got {tuple(parameter.shape)}")
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}")
