"""The public functions of `strided_conv`, their schema and their checks."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.kernels.dispatch import Op, autocast_off, contiguous
from fastssl.kernels.strided_conv import blocks, reference
from fastssl.packing import Layout

# Lists have one entry per layer, `cu_seqlens` one more, for the input. `conv_outs` is what the forward keeps: the
# convolution's output before bias, norm and activation, (0, C) where the backward does without; `statistics` is
# (2, B, C) mean and rstd for group norm.
_FORWARD = (
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] norm_weights, Tensor?[] norm_biases, Tensor[] cu_seqlens,"
    " SymInt[] totals, SymInt[] max_lengths, int[] strides, str[] norms, float[] eps, str[] activations, bool save)"
    " -> (Tensor out, Tensor[] conv_outs, Tensor[] statistics)"
)
_BACKWARD = (
    "(Tensor grad_out, Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] norm_weights, Tensor?[] norm_biases,"
    " Tensor[] conv_outs, Tensor[] statistics, Tensor[] cu_seqlens, SymInt[] totals, SymInt[] max_lengths,"
    " int[] strides, str[] norms, float[] eps, str[] activations, bool needs_grad_x)"
    " -> (Tensor grad_x, Tensor[] grad_weights, Tensor[] grad_biases, Tensor[] grad_norm_weights,"
    " Tensor[] grad_norm_biases)"
)


def _fake_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None],
    cu_seqlens: list[Tensor],
    totals: list[int],
    max_lengths: list[int],
    strides: list[int],
    norms: list[str],
    eps: list[float],
    activations: list[str],
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    channels, sequences = [weight.shape[0] for weight in weights], cu_seqlens[0].shape[0] - 1
    kept = [save and not (index == 0 and x.shape[1] == 1) for index in range(len(weights))]
    accumulation = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(totals[-1], channels[-1]),
        [x.new_empty(total if keep else 0, c) for total, keep, c in zip(totals, kept, channels, strict=True)],
        [
            x.new_empty((2, sequences, c) if norm == "group" else (0,), dtype=accumulation)
            for norm, c in zip(norms, channels, strict=True)
        ],
    )


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None],
    conv_outs: list[Tensor],
    statistics: list[Tensor],
    cu_seqlens: list[Tensor],
    totals: list[int],
    max_lengths: list[int],
    strides: list[int],
    norms: list[str],
    eps: list[float],
    activations: list[str],
    needs_grad_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    def like(parameters: list[Tensor | None]) -> list[Tensor]:
        return [x.new_empty(0) if parameter is None else torch.empty_like(parameter) for parameter in parameters]

    grad_weights = [weight.new_empty(weight.shape) for weight in weights]
    grad_x = x.new_empty(x.shape if needs_grad_x else (0, x.shape[1]))
    return grad_x, grad_weights, like(biases), like(norm_weights), like(norm_biases)


_OP = Op(
    "strided_conv",
    _fake_forward,
    _fake_backward,
    schemas=(_FORWARD, _BACKWARD),
    triton_kernels="fastssl.kernels.strided_conv.triton_kernel",
    native_cpu=("fastssl.kernels.strided_conv.blocks", blocks.PARTS),
)


class StridedConvLayer(NamedTuple):
    """One layer of `strided_conv_stack`; the fields are the arguments of `strided_conv`."""

    weight: Tensor  # (C_out, C_in, K)
    stride: int
    bias: Tensor | None = None  # (C_out,)
    norm: Literal["none", "group", "layer"] = "none"
    norm_weight: Tensor | None = None  # (C_out,)
    norm_bias: Tensor | None = None  # (C_out,)
    eps: float = 1e-5
    activation: Literal["gelu", "none"] = "gelu"


class _Settings(NamedTuple):
    """What the kernels take besides tensors that have a gradient."""

    backend: str
    totals: list[int]
    max_lengths: list[int]
    strides: list[int]
    norms: list[str]
    eps: list[float]
    activations: list[str]
    save: bool


class _StridedConvStack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:  # (N, C_in), L of each parameter, L + 1 cu_seqlens -> (N_out, C_out)
        backend, *rest = settings
        depth = len(settings.strides)
        arguments = [list(tensors[first : first + depth]) for first in range(0, 4 * depth, depth)]
        out: Tensor
        out, conv_outs, statistics = _OP.forward[backend](x, *arguments, list(tensors[4 * depth :]), *rest)
        if settings.save:
            ctx.save_for_backward(x, *tensors, *conv_outs, *statistics)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        backend, *rest, _ = ctx.settings
        depth = len(ctx.settings.strides)
        arguments = [tensors[first : first + depth] for first in range(0, 4 * depth, depth)]
        cu_seqlens = tensors[4 * depth : 5 * depth + 1]
        conv_outs, statistics = tensors[5 * depth + 1 : -depth], tensors[-depth:]
        needs_grad_x: bool = ctx.needs_input_grad[1]
        grad_x, *grads = _OP.backward[backend](
            grad_out.contiguous(), x, *arguments, conv_outs, statistics, cu_seqlens, *rest, needs_grad_x
        )
        grad_parameters = [
            None if parameter is None else grad
            for parameter, grad in zip(chain(*arguments), chain(*grads), strict=True)
        ]
        return None, grad_x if needs_grad_x else None, *grad_parameters, *[None] * (depth + 1)


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
    """Strided convolution of packed sequences, then norm, then activation (wav2vec 2.0, arXiv 2006.11477, section 2).

    No padding: a sequence of T frames gives floor((T - K) / stride) + 1 of them, and none when T < K. Nothing crosses
    the border between sequences. "group" normalises each channel over the frames of its utterance (GroupNorm with
    C_out groups), so the result does not depend on what an utterance was batched with.

    Args:
        x: (N, C_in) packed frames, channels last.
        weight: (C_out, C_in, K), as `torch.nn.Conv1d` stores it, in the dtype of `x`.
        layout: Where each sequence of `x` begins.
        stride: Input frames from one output frame to the next.
        bias: (C_out,) added before the norm.
        norm: "none", "group" (over time, per utterance and channel) or "layer" (over channels, per frame).
        norm_weight: (C_out,) scale after the norm.
        norm_bias: (C_out,) shift after the norm.
        eps: Added to the variance.
        activation: "gelu" (with erf, not the tanh approximation) or "none".
        backend: See `fastssl.ops`; None takes the fastest there is.

    Returns:
        (N_out, C_out) in the dtype of `x`, and its layout. Under autocast `x` and `weight` are cast to its dtype. Norm
        and activation are computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: Shapes, dtypes or options do not fit, or `backend` cannot serve the call.
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
    """One `strided_conv` after another, as the front end of wav2vec 2.0 is (arXiv 2006.11477, section 2).

    The same values, in less memory than layer by layer: the backward recomputes activations, so that of each layer only
    the convolution's output is kept, and of a first layer with one input channel nothing.

    Args:
        x: (N, C_in) packed frames, channels last.
        layers: One or more; a layer's input channels are the output channels of the one before.
        layout: Where each sequence of `x` begins.
        backend: See `fastssl.ops`; None takes the fastest there is.

    Returns:
        (N_out, C_out) of the last layer in the dtype of `x`, and its layout.

    Raises:
        ValueError: As `strided_conv`, and where there is no layer.
    """
    if not layers:
        raise ValueError("layers: there must be at least one")
    return _run_stack(x, layers, layout, backend, [f"layers[{index}]." for index in range(len(layers))])


def _run_stack(
    x: Tensor, layers: Sequence[StridedConvLayer], layout: Layout, backend: str | None, names: list[str]
) -> tuple[Tensor, Layout]:
    weights = [layer.weight for layer in layers]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, C_in) for this layout, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating point, got {x.dtype}")
    if layout.cu_seqlens.device != x.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, x on {x.device}")
    channels = x.shape[1]
    for layer, weight, name in zip(layers, weights, names, strict=True):
        _check(layer, weight, channels, x.dtype, name)
        channels = weight.shape[0]
    layouts = [layout]
    for layer, weight in zip(layers, weights, strict=True):
        layouts.append(layouts[-1].after_conv(weight.shape[2], layer.stride))
    unsupported = {"triton": "float64 has no fast products on a GPU" if x.dtype == torch.float64 else None}
    chosen = _OP.choose(x, backend, unsupported)
    with autocast_off(x):
        if chosen == "reference":
            for layer, weight, layer_layout in zip(layers, weights, layouts[:-1], strict=True):
                x = reference.strided_conv(
                    x,
                    weight,
                    layer_layout,
                    stride=layer.stride,
                    bias=layer.bias,
                    norm=layer.norm,
                    norm_weight=layer.norm_weight,
                    norm_bias=layer.norm_bias,
                    eps=layer.eps,
                    activation=layer.activation,
                )
            return x, layouts[-1]
        parameters = [
            *weights,
            *(layer.bias for layer in layers),
            *(layer.norm_weight for layer in layers),
            *(layer.norm_bias for layer in layers),
        ]
        tracked = (tensor is not None and tensor.requires_grad for tensor in (x, *parameters))
        settings = _Settings(
            chosen,
            [out.total for out in layouts[1:]],
            [out.max_length for out in layouts[1:]],
            [layer.stride for layer in layers],
            [layer.norm for layer in layers],
            [layer.eps for layer in layers],
            [layer.activation for layer in layers],
            torch.is_grad_enabled() and any(tracked),
        )
        values: Tensor = _StridedConvStack.apply(
            settings, *contiguous((x, *parameters, *(each.cu_seqlens for each in layouts)))
        )
    return values, layouts[-1]


def _check(layer: StridedConvLayer, weight: Tensor, c_in: int, dtype: torch.dtype, name: str) -> None:
    if weight.dim() != 3 or weight.shape[1] != c_in:
        raise ValueError(f"{name}weight: expected (C_out, {c_in}, K), got {tuple(weight.shape)}")
    if weight.dtype != dtype:
        raise ValueError(f"{name}weight: dtype {weight.dtype} does not match x, which is {dtype}")
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
