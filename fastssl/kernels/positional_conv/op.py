"""The public function of `positional_conv` and its checks. PyTorch's own convolutions do the work.

On the CPU, frames are in channels-last order, which makes oneDNN's forward convolution twice as fast. The gradient of
the input is computed as a forward convolution too. The gradient of the weight is a correlation over time at K lags. It
is computed by FFT over blocks of frames, or lag by lag if each group has one channel. On a GPU, the batch is convolved
as one sequence with zeros between the utterances.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.dispatch import Op, autocast_off, to_autocast_dtype
from fastssl.kernels.positional_conv import reference
from fastssl.packing import Layout, Packed

_OP = Op("positional_conv", torch_devices=("cpu", "cuda"))


def positional_conv(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (D, D/G, K)
    layout: Layout,
    *,
    bias: Tensor | None = None,  # (D,)
    backend: str | None = None,
) -> Tensor:  # (N, D)
    """Apply a grouped convolution over the frames of each sequence, keeping its length (arXiv 2006.11477, section 2).

    Output frame t is the sum over k of weight[:, :, k] times input frame t + k - K // 2, with zeros beyond the ends of
    the sequence. Transformers and fairseq compute the same with padding K // 2, and drop the extra frame at the end if
    K is even.

    Args:
        x: (N, D) packed frames.
        weight: (D, D/G, K) weight as `torch.nn.Conv1d` with G groups stores it, in the dtype of `x`.
        layout: Where each sequence begins.
        bias: (D,) bias in the dtype of `x`, or None.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        (N, D) in the dtype of `x`. Under autocast, `x`, `weight` and `bias` are cast to autocast's dtype first.

    Raises:
        ValueError: A shape or dtype is invalid, or `backend` cannot run this call.
    """
    x, weight, bias = to_autocast_dtype(x, weight, bias)
    _check(x, weight, layout, bias)
    unsupported = {}
    if x.dtype == torch.float64:
        unsupported["torch"] = "it computes gradients in float32"
    elif x.dtype == torch.float16 and x.device.type == "cpu":
        unsupported["torch"] = "oneDNN supports float16 convolutions on some CPUs only"
    elif layout.total == 0:
        unsupported["torch"] = "it does not support empty batches"
    chosen = _OP.choose(x, backend, unsupported)
    implementation = {"torch": _torch_conv, "reference": reference.positional_conv}[chosen]
    with autocast_off(x):
        return implementation(x.contiguous(), weight, layout, bias=bias)


def _check(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, D) for this layout, got {tuple(x.shape)}")
    if layout.cu_seqlens.device != x.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, must be on {x.device} like x")
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[0] != channels or weight.shape[1] == 0 or channels % weight.shape[1]:
        raise ValueError(f"weight: expected ({channels}, {channels} / groups, K), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"weight and bias: must be {x.dtype} like x")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected ({channels},), got {tuple(bias.shape)}")


def _torch_conv(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (D, D/G, K)
    layout: Layout,
    *,
    bias: Tensor | None,  # (D,)
) -> Tensor:  # (N, D)
    """Run the backend "torch" in fp32, bf16 or (on a GPU) fp16. Arguments as in `positional_conv`."""
    if x.device.type == "cpu":
        out: Tensor = _ChannelsLastConv.apply(x, weight, bias, layout)
        return out
    return _conv_with_gaps(x, weight, layout, bias)


def _conv_with_gaps(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """Convolve the batch as one sequence with zeros between the utterances: one call of cuDNN."""
    groups, padding = x.shape[1] // weight.shape[1], weight.shape[2] // 2
    gapped, _ = _with_gaps(x, layout, gap=padding)
    convolved = F.conv1d(gapped.t()[None], weight, bias, padding=padding, groups=groups)[0].t()
    # Not `convolved[rows]`, whose backward on a GPU sorts the rows. No row occurs twice, so nothing is added up.
    return convolved.index_select(0, layout.rows_with_gaps(0, padding))


class _ChannelsLastConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layout, ctx.has_bias = layout, bias is not None
        return _convolve(x, weight, bias, layout, first=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        channels, group_channels, kernel = weight.shape
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = weight.view(-1, group_channels, group_channels, kernel).transpose(1, 2).flip(3)
            turned = turned.reshape(channels, group_channels, kernel)
            # The taps are reversed, so an even kernel reaches one frame further forward than back.
            grad_x = _convolve(grad_out, turned, None, ctx.layout, first=1 - kernel % 2)
        if ctx.needs_input_grad[1]:
            correlate = _grad_depthwise_weight if group_channels == 1 else _grad_weight
            grad_weight = correlate(grad_out, x, weight, ctx.layout)
        grad_bias = grad_out.sum(0, dtype=torch.float64).to(grad_out.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *, first: int) -> Tensor:
    """Convolve each utterance on its own, so that no bit depends on the batch; leave out its `first` output frames."""
    groups, padding = x.shape[1] // weight.shape[1], weight.shape[2] // 2
    filters = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    out = x.new_empty(x.shape)
    for begin, length in zip(layout.offsets, layout.lengths, strict=False):
        if length:
            # View (T, D) as an image (1, D, 1, T) in channels-last order; this copies nothing.
            frames = x[begin : begin + length].view(1, 1, length, -1).permute(0, 3, 1, 2)
            convolved = F.conv2d(frames, filters, bias, padding=(0, padding), groups=groups)
            out[begin : begin + length] = convolved[0, :, 0, first : first + length].t()
    return out


def _grad_weight(grad_out: Tensor, x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Sum grad_out[t, o] x[t + k - K // 2, i] over frames t, for K lags k and each pair of channels in a group.

    This uses FFTs over blocks of frames. A block is K - 1 frames shorter than the transform, so no lag wraps around.
    One matrix product per frequency sums over the blocks, and one more transforms the frequencies back to the K lags.
    """
    channels, group_channels, kernel = weight.shape
    groups, padding = channels // group_channels, kernel // 2
    transform = max(2, 1 << (2 * kernel - 1).bit_length())
    block, frequencies = transform - kernel + 1, transform // 2 + 1
    x, grad_out = (_with_gaps(frames.float(), layout, gap=padding)[0] for frames in (x, grad_out))
    total = len(x)
    blocks = max(1, -(-total // block))
    x = F.pad(x, (0, 0, padding, blocks * block + transform - total - padding)).unfold(0, transform, block)[:blocks]
    grad_out = F.pad(grad_out, (0, 0, 0, blocks * block - total)).view(blocks, block, channels).transpose(1, 2)
    spectra = []
    for frames in (grad_out, x):  # (blocks, D, time) -> (frequencies * G, blocks, D/G)
        spectrum = torch.fft.rfft(frames, n=transform).view(blocks, groups, group_channels, frequencies)
        spectra.append(spectrum.permute(3, 1, 0, 2).reshape(frequencies * groups, blocks, group_channels))
    products = torch.bmm(spectra[0].mH, spectra[1]).view(frequencies, -1)
    return (
        (_inverse_transform(transform, kernel) @ torch.cat([products.real, products.imag]))
        .view(kernel, channels, group_channels)
        .permute(1, 2, 0)
        .to(weight.dtype)
    )


def _grad_depthwise_weight(grad_out: Tensor, x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Compute `_grad_weight` for groups of one channel, where an FFT would cost more than the sums themselves."""
    kernel = weight.shape[2]
    padding = kernel // 2
    x, grad_out = (_with_gaps(frames.float(), layout, gap=padding)[0] for frames in (x, grad_out))
    total = len(x)
    x = F.pad(x, (0, 0, padding, kernel - 1 - padding))
    products = torch.empty_like(grad_out)  # reuse one buffer: allocating it for every lag costs more than the products
    lags = [torch.mul(grad_out, x[lag : lag + total], out=products).sum(0) for lag in range(kernel)]
    return torch.stack(lags, 1).unsqueeze(1).to(weight.dtype)


def _inverse_transform(transform: int, kernel: int) -> Tensor:  # (K, 2 * frequencies)
    """Return the first K rows of an inverse real FFT's matrix: columns for real parts, then for imaginary parts."""
    frequency = torch.arange(transform // 2 + 1, device="cpu")
    angles = (torch.arange(kernel, device="cpu").unsqueeze(1) * frequency % transform).double() * (
        2 * math.pi / transform
    )
    twice = torch.where((frequency == 0) | (frequency == transform // 2), 1.0, 2.0).double() / transform
    return torch.cat([angles.cos() * twice, -angles.sin() * twice], 1).float()


def _with_gaps(x: Tensor, layout: Layout, *, gap: int) -> tuple[Tensor, Layout]:
    """Return the batch as one sequence with `gap` zeros between utterances, and a layout of utterances with gaps."""
    gapped, longer = Packed(x, layout).with_gaps(0, gap)
    return gapped[: longer.total - gap], longer
