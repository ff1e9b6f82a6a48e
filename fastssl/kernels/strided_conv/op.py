"""The public functions of `strided_conv`, their schema and their checks."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.dispatch import Op, autocast_off, cast_together, contiguous
from fastssl.kernels.strided_conv import blocks, reference
from fastssl.kernels.strided_conv.plan import StridedConvLayer, plan_layers
from fastssl.packing import Layout

# Each list has one entry per layer; `cu_seqlens` has one more, for the input. `plan_layers` turns them into one record
# per layer. The schema is written by hand because PyTorch cannot infer `str[]` from a Python annotation.
_LAYERS = (
    "Tensor[] cu_seqlens, Tensor[] weights, Tensor?[] biases, Tensor?[] norm_weights, Tensor?[] norm_biases,"
    " SymInt[] totals, int[] strides, str[] norms, float[] eps, str[] activations"
)
# `conv_outs` contains the convolutions' outputs before bias, norm and activation, saved for the backward pass: (0, C)
# for a layer that need not be saved. `statistics` contains mean and 1 / standard deviation for group norm, (2, B, C).
_FORWARD = f"(Tensor x, bool save, {_LAYERS}) -> (Tensor out, Tensor[] conv_outs, Tensor[] statistics)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor x, Tensor[] conv_outs, Tensor[] statistics, bool needs_grad_x, {_LAYERS})"
    " -> (Tensor grad_x, Tensor[] grad_weights, Tensor[] grad_biases, Tensor[] grad_norm_weights,"
    " Tensor[] grad_norm_biases)"
)


def _fake_forward(x: Tensor, save: bool, *lists: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = plan_layers(*lists)
    return (
        x.new_empty(layers[-1].total, layers[-1].channels),
        [x.new_empty(layer.total if save and layer.is_kept else 0, layer.channels) for layer in layers],
        [layer.new_statistics(x) for layer in layers],
    )


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    conv_outs: list[Tensor],
    statistics: list[Tensor],
    needs_grad_x: bool,
    *lists: Any,
) -> tuple[Tensor | list[Tensor], ...]:
    parameters = zip(*(layer.parameters for layer in plan_layers(*lists)), strict=True)
    grads = [
        [x.new_empty(0) if given is None else given.new_empty(given.shape) for given in kind] for kind in parameters
    ]
    return x.new_empty(x.shape if needs_grad_x else (0, x.shape[1])), *grads


_OP = Op(
    "strided_conv",
    _fake_forward,
    _fake_backward,
    schemas=(_FORWARD, _BACKWARD),
    triton_kernels="fastssl.kernels.strided_conv.triton_kernel",
    native_cpu=("fastssl.kernels.strided_conv.blocks", blocks.PARTS),
)


class _Settings(NamedTuple):
    """Arguments of the kernels that are not tensors. The schema ends with the five lists, in this order."""

    backend: str
    save: bool
    totals: list[int]
    strides: list[int]
    norms: list[str]
    eps: list[float]
    activations: list[str]


def _lists(settings: _Settings, tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return all lists of the schema. `tensors` contains `cu_seqlens`, then the four lists of parameters."""
    _, _, *rest = settings
    depth = len(settings.strides)
    split = [list(tensors[first : first + depth]) for first in range(depth + 1, len(tensors), depth)]
    return [list(tensors[: depth + 1]), *split, *rest]


class _StridedConvStack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:  # (N, C_in), L + 1 cu_seqlens, L of each parameter -> (N_out, C_out)
        out: Tensor
        out, conv_outs, statistics = _OP.forward[settings.backend](x, settings.save, *_lists(settings, tensors))
        if settings.save:
            ctx.save_for_backward(x, *tensors, *conv_outs, *statistics)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        depth = len(ctx.settings.strides)
        x, *tensors = contiguous(ctx.saved_tensors)
        tensors, conv_outs, statistics = tensors[: -2 * depth], tensors[-2 * depth : -depth], tensors[-depth:]
        needs_grad_x: bool = ctx.needs_input_grad[1]
        grad_x, *grads = _OP.backward[ctx.settings.backend](
            grad_out.contiguous(), x, conv_outs, statistics, needs_grad_x, *_lists(ctx.settings, tensors)
        )
        pairs = zip(tensors[depth + 1 :], chain(*grads), strict=True)
        grad_parameters = [None if parameter is None else grad for parameter, grad in pairs]
        return None, grad_x if needs_grad_x else None, *[None] * (depth + 1), *grad_parameters


def strided_conv(
    x: Tensor,  # (N, C_in)
    weight: Tensor,  # (C_out, C_in, K)
    layout: Layout,
    *,
    stride: int,
    bias: Tensor | None = None,  # (C_out,)
    norm: Literal["none", "group", "layer"] = "none",
    norm_weight: Tensor | None = None,  # (C_out,)
    norm_bias: Tensor | None = None,  # (C_out,)
    eps: float = 1e-5,
    activation: Literal["gelu", "none"] = "gelu",
    backend: str | None = None,
) -> tuple[Tensor, Layout]:  # (N_out, C_out)
    """Apply a strided convolution to packed sequences, then norm and activation (wav2vec 2.0, arXiv 2006.11477).

    The convolution has no padding: T input frames give floor((T - K) / stride) + 1 output frames, and none if T < K.
    Sequences never mix. The norm "group" normalises each channel over the frames of its sequence (`torch.nn.GroupNorm`
    with C_out groups), so the result does not depend on the rest of the batch.

    Args:
        x: (N, C_in) packed frames, channels last.
        weight: (C_out, C_in, K) weight as `torch.nn.Conv1d` stores it, in the dtype of `x`.
        layout: Where each sequence of `x` begins.
        stride: Number of input frames from one output frame to the next.
        bias: (C_out,) bias, added before the norm; None adds none.
        norm: "none", "group" (over time, per utterance and channel) or "layer" (over channels, per frame).
        norm_weight: (C_out,) scale after the norm; None uses 1.
        norm_bias: (C_out,) shift after the norm; None uses 0.
        eps: Added to the variance.
        activation: "gelu" (with erf, not the tanh approximation) or "none".
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        (N_out, C_out) in the dtype of `x`, and its layout. Under autocast, `x` and `weight` are cast to autocast's
        dtype first. Norm and activation are computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: A shape, dtype or option is invalid, or `backend` cannot run this call.
    """
    layer = StridedConvLayer(weight, stride, bias, norm, norm_weight, norm_bias, eps, activation)
    return _run_stack(x, [layer], layout, backend, [""])


def strided_conv_stack(
    x: Tensor,  # (N, C_in)
    layers: Sequence[StridedConvLayer],
    layout: Layout,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Layout]:  # (N_out, C_out)
    """Apply one `strided_conv` after another, such as the front end of wav2vec 2.0 (arXiv 2006.11477, section 2).

    Gives the same values as calling `strided_conv` layer by layer, in less memory: the backward pass recomputes
    activations, so only each layer's convolution output is kept (and nothing at all for a first layer with one input
    channel).

    Args:
        x: (N, C_in) packed frames, channels last.
        layers: One or more layers; the input channels of a layer are the output channels of the layer before it.
        layout: Where each sequence of `x` begins.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        Output of the last layer, (N_out, C_out) in the dtype of `x`, and its layout. Autocast as in `strided_conv`.

    Raises:
        ValueError: `layers` is empty, or `strided_conv` would raise for a layer; the message names the layer.
    """
    if not layers:
        raise ValueError("layers: expected at least one layer, got none")
    return _run_stack(x, layers, layout, backend, [f"layers[{index}]." for index in range(len(layers))])


def _run_stack(
    x: Tensor, layers: Sequence[StridedConvLayer], layout: Layout, backend: str | None, names: list[str]
) -> tuple[Tensor, Layout]:
    """Check and run the layers; error messages about a layer start with its entry of `names`."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        lower = cast_together([layer.weight for layer in layers], dtype)
        x, layers = x.to(dtype), [layer._replace(weight=cast) for layer, cast in zip(layers, lower, strict=True)]
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, C_in) for this layout, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating point, got {x.dtype}")
    if layout.cu_seqlens.device != x.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, must be on {x.device} like x")
    c_in, layouts = x.shape[1], [layout]
    for layer, name in zip(layers, names, strict=True):
        _check(layer, c_in, x.dtype, name)
        c_in = layer.weight.shape[0]
        layouts.append(layouts[-1].after_conv(layer.weight.shape[2], layer.stride))
    unsupported = {"triton": "its kernels do not support float64" if x.dtype == torch.float64 else None}
    chosen = _OP.choose(x, backend, unsupported)
    with autocast_off(x):
        if chosen == "reference":
            for layer, layer_layout in zip(layers, layouts[:-1], strict=True):
                x = reference.strided_conv(x, layer, layer_layout)
            return x, layouts[-1]
        weights, strides, biases, norms, norm_weights, norm_biases, eps, activations = map(
            list, zip(*layers, strict=True)
        )
        parameters = (*weights, *biases, *norm_weights, *norm_biases)
        tracked = (tensor is not None and tensor.requires_grad for tensor in (x, *parameters))
        settings = _Settings(
            chosen,
            torch.is_grad_enabled() and any(tracked),
            [out.total for out in layouts[1:]],
            strides,
            norms,
            eps,
            activations,
        )
        inputs = contiguous((x, *(each.cu_seqlens for each in layouts), *parameters))
        values: Tensor = _StridedConvStack.apply(settings, *inputs)
    return values, layouts[-1]


def _check(layer: StridedConvLayer, c_in: int, dtype: torch.dtype, name: str) -> None:
    weight = layer.weight
    if weight.dim() != 3 or weight.shape[1] != c_in:
        raise ValueError(f"{name}weight: expected (C_out, {c_in}, K), got {tuple(weight.shape)}")
    if weight.dtype != dtype:
        raise ValueError(f"{name}weight: dtype {weight.dtype}, must be {dtype} like x")
    if layer.stride < 1:
        raise ValueError(f"{name}stride: must be at least 1, got {layer.stride}")
    if layer.norm not in ("none", "group", "layer"):
        raise ValueError(f"{name}norm: must be 'none', 'group' or 'layer', got {layer.norm!r}")
    if layer.activation not in ("gelu", "none"):
        raise ValueError(f"{name}activation: must be 'gelu' or 'none', got {layer.activation!r}")
    if layer.norm == "none" and (layer.norm_weight is not None or layer.norm_bias is not None):
        raise ValueError(f"{name}norm_weight and norm_bias: given, but norm is 'none'")
    for option in ("bias", "norm_weight", "norm_bias"):
        parameter = getattr(layer, option)
        if parameter is not None and parameter.shape != weight.shape[:1]:
            raise ValueError(f"{name}{option}: expected ({weight.shape[0]},), got {tuple(parameter.shape)}")
