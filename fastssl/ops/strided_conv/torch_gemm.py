"""The backend "torch" of `strided_conv`: PyTorch's GEMM over strided views of the packed frames, without im2col.

With channels last, the `stride` input frames at which an output frame begins are stride * C_in contiguous numbers, so a
convolution of kernel K is ceil(K / stride) products of a strided view with a slice of the weight. Norm and activation
are recomputed in the backward: only the input and the convolution's output are kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.packing import Layout

# Frames with fewer channels than this make poor GEMM operands; all their taps are gathered into one instead.
_FEWEST_CHANNELS = 8


def strided_conv(
    x: Tensor,  # (N, C_in)
    weight: Tensor,  # (C_out, C_in, K)
    layout: Layout,
    *,
    stride: int,
    bias: Tensor | None,  # (C_out,)
    norm: str,
    norm_weight: Tensor | None,  # (C_out,)
    norm_bias: Tensor | None,  # (C_out,)
    eps: float,
    activation: str,
) -> Tensor:  # (N_out, C_out)
    """Arguments as in `fastssl.ops.strided_conv`; fp32 or fp64, on the CPU."""
    spans = list(_spans(layout, layout.after_conv(weight.shape[2], stride)))
    x, total_out = x.contiguous(), sum(frames for _, _, frames in spans)
    out: Tensor = _StridedConv.apply(
        x, weight, bias, norm_weight, norm_bias, spans, total_out, stride, norm, eps, activation
    )
    return out


def _spans(layout: Layout, layout_out: Layout) -> Iterator[tuple[int, int, int]]:
    """First input row, first output row and output frames of each sequence that has any."""
    for first_in, first_out, frames in zip(layout.offsets, layout_out.offsets, layout_out.lengths, strict=False):
        if frames:
            yield first_in, first_out, frames


class _StridedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        spans: list[tuple[int, int, int]],
        total_out: int,
        stride: int,
        norm: str,
        eps: float,
        activation: str,
    ) -> Tensor:
        conv_out = x.new_empty(total_out, weight.shape[0])
        out = torch.empty_like(conv_out)
        matrix = weight.permute(2, 1, 0).flatten(0, 1).contiguous()  # (K * C_in, C_out)
        for first_in, first_out, frames in spans:
            rows = slice(first_out, first_out + frames)
            for index, (columns, view) in enumerate(_operands(x, weight, first_in, frames, stride)):
                if index == 0:
                    torch.mm(view, matrix[columns], out=conv_out[rows])
                else:
                    conv_out[rows].addmm_(view, matrix[columns])
            if bias is not None:
                conv_out[rows] += bias
            normalised = _norm(conv_out[rows], norm, norm_weight, norm_bias, eps)[0]
            out[rows] = F.gelu(normalised) if activation == "gelu" else normalised
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, conv_out)
        ctx.settings = spans, stride, norm, eps, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, norm_weight, norm_bias, conv_out = ctx.saved_tensors
        spans, stride, norm, eps, activation = ctx.settings
        needs_x: bool = ctx.needs_input_grad[0]
        matrix = weight.permute(2, 1, 0).flatten(0, 1).contiguous()
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_matrix = torch.zeros_like(matrix)
        grad_bias, grad_norm_weight, grad_norm_bias = (
            None if parameter is None else torch.zeros_like(parameter) for parameter in (bias, norm_weight, norm_bias)
        )
        for first_in, first_out, frames in spans:
            rows = slice(first_out, first_out + frames)
            grad, (normalised, mean, rstd) = grad_out[rows], _norm(conv_out[rows], norm, norm_weight, norm_bias, eps)
            if activation == "gelu":
                grad = torch.ops.aten.gelu_backward(grad.contiguous(), normalised)
            if norm != "none":
                grad, grad_scale, grad_shift = _norm_backward(
                    grad, conv_out[rows], mean, rstd, norm, norm_weight, norm_bias
                )
                if grad_norm_weight is not None:
                    grad_norm_weight += grad_scale
                if grad_norm_bias is not None:
                    grad_norm_bias += grad_shift
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            for columns, view in _operands(x, weight, first_in, frames, stride):
                grad_matrix[columns].addmm_(view.t(), grad)
            if grad_x is not None:
                for columns, view in _disjoint_operands(grad_x, weight, first_in, frames, stride):
                    view.addmm_(grad, matrix[columns].t())
        grad_weight = grad_matrix.unflatten(0, (weight.shape[2], weight.shape[1])).permute(2, 1, 0)
        return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, None, None, None, None, None, None


def _operands(x: Tensor, weight: Tensor, first_in: int, frames: int, stride: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight matrix, and the view of the input (frames, rows) that they multiply."""
    _, c_in, kernel = weight.shape
    if c_in < _FEWEST_CHANNELS:
        yield slice(None), _view(x, first_in, frames, kernel, stride)
    else:
        yield from _disjoint_operands(x, weight, first_in, frames, stride)


def _disjoint_operands(
    x: Tensor, weight: Tensor, first_in: int, frames: int, stride: int
) -> Iterator[tuple[slice, Tensor]]:
    """As `_operands`, cut so that no view overlaps itself: the views can be written to."""
    _, c_in, kernel = weight.shape
    for tap in range(0, kernel, stride):
        taps = min(stride, kernel - tap)
        yield slice(tap * c_in, (tap + taps) * c_in), _view(x, first_in + tap, frames, taps, stride)


def _view(x: Tensor, first_row: int, frames: int, taps: int, stride: int) -> Tensor:
    channels, last_row = x.shape[1], first_row + (frames - 1) * stride + taps
    return x.view(-1)[first_row * channels : last_row * channels].unfold(0, taps * channels, stride * channels)


def _norm(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised frames of one sequence, and the mean and reciprocal deviation they were normalised with."""
    if norm == "none":
        return x, x, x
    if norm == "layer":
        return torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)
    mean = x.mean(0)
    centred = x - mean
    rstd = torch.rsqrt(centred.square().mean(0) + eps)
    normalised = centred.mul_(rstd if weight is None else rstd * weight)
    return (normalised if bias is None else normalised.add_(bias)), mean, rstd


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the frames, the weight and the bias."""
    if norm == "layer":
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[1:], mean, rstd, weight, bias, [True, weight is not None, bias is not None]
        )
        return grads
    standard = (x - mean).mul_(rstd)
    grad_bias, grad_weight = grad.sum(0), (grad * standard).sum(0)
    grad_x = grad - standard.mul_(grad_weight / len(x))
    grad_x -= grad_x.mean(0)
    return grad_x.mul_(rstd if weight is None else rstd * weight), grad_weight, grad_bias
