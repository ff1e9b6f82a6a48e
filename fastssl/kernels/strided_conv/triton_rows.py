"""Triton kernels of `strided_conv` that work frame by frame: norm, GELU and their backward.

These kernels read the convolution's output from memory, or compute it from windows of the input. The latter is for the
first layer, which has one input channel: the product of a window of K samples and a (K, C) matrix is cheaper to
recompute than to load. README.md has the formulas.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.gelu_triton import gelu_derivative, normal_at
from fastssl.kernels.precision import precision_of
from fastssl.kernels.strided_conv.plan import LayerPlan
from fastssl.kernels.strided_conv.triton_blocks import (
    FRAME_CHUNK,
    WINDOW_CHUNK,
    RowGradients,
    block_for,
    block_of,
    chunk_programs,
    load_windows,
    per_channel,
    window_block,
)
from fastssl.kernels.strided_conv.triton_statistics import sum_chunks, window_group_norm_backward


@triton.jit
def _multiply_windows(windows, weight_ptr, channels, C, WINDOW: tl.constexpr, PRECISION: tl.constexpr):
    """Compute the first layer's convolution, (rows, channels), from windows and `weight_ptr` (C, WINDOW)."""
    BLOCK_K: tl.constexpr = windows.shape[1]
    k = tl.arange(0, BLOCK_K)[:, None]
    mask = (k < WINDOW) & (channels < C)[None, :]
    weight = tl.load(weight_ptr + channels[None, :] * WINDOW + k, mask=mask, other=0.0)
    return tl.dot(windows, weight, input_precision=PRECISION)


@triton.jit
def _standardise(frames, statistics_ptr, sequence, batch, channels, eps, C, NORM: tl.constexpr):
    """Standardise frames as group norm or layer norm does; also return 1 / standard deviation, or 1 without a norm."""
    rstd = 1.0
    if NORM == "group":
        mean = per_channel(statistics_ptr + sequence * C, channels, C, 0.0)
        rstd = per_channel(statistics_ptr + (batch + sequence) * C, channels, C, 0.0)
        frames = (frames - mean) * rstd
    elif NORM == "layer":
        mean = tl.sum(frames, 1)[:, None] / C
        centred = tl.where((channels < C)[None, :], frames - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / C + eps)
        frames = centred * rstd
    return frames, rstd


@triton.jit(do_not_specialize=["batch"])
def _activate_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    statistics_ptr,
    out_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    eps,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Apply norm and GELU to the frames at `x_ptr`; with `weight_ptr`, first compute them from windows at `x_ptr`."""
    sequence, first, left = block_of(tl.program_id(0), cu_out_ptr, batch, BLOCK_T)
    if left <= 0:
        return
    rows = tl.arange(0, BLOCK_T)
    valid = rows < left
    offset = (tl.load(cu_out_ptr + sequence) + first).to(tl.int64) * C
    if weight_ptr is not None:
        x_ptr += tl.load(cu_in_ptr + sequence).to(tl.int64) + first.to(tl.int64) * STEP
        windows = load_windows(x_ptr, rows, valid, STEP, WINDOW, BLOCK_K)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (channels < C)[None, :]
        positions = offset + rows[:, None] * C + channels[None, :]
        if weight_ptr is not None:
            frames = _multiply_windows(windows, weight_ptr, channels, C, WINDOW, PRECISION)
        else:
            frames = tl.load(x_ptr + positions, mask=mask, other=0.0).to(tl.float32)
        frames += per_channel(bias_ptr, channels, C, 0.0)
        frames, _ = _standardise(frames, statistics_ptr, sequence, batch, channels, eps, C, NORM)
        if norm_weight_ptr is not None:
            frames *= per_channel(norm_weight_ptr, channels, C, 1.0)
        if norm_bias_ptr is not None:
            frames += per_channel(norm_bias_ptr, channels, C, 0.0)
        if GELU:
            below, _ = normal_at(frames, out_ptr.dtype.element_ty == tl.float32)
            frames *= below
        tl.store(out_ptr + positions, frames.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def _activate_backward_kernel(
    grad_out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    statistics_ptr,
    totals_ptr,
    grad_conv_ptr,
    activated_ptr,
    sums_ptr,
    products_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    eps,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute the backward of norm and GELU over a chunk of one sequence.

    Let g be the gradient of the norm's output. `sums_ptr` (programs, 3, C) receives three sums over the chunk: of g, of
    g times the standardised frames, and of the gradient of the convolution's output. A sum that is not needed may be
    zero. `products_ptr` (programs, BLOCK_K, C) receives the sums of window times that gradient. Group norm's gradient
    needs sums over the whole sequence, which are read from `totals_ptr` (B, 3, C). With windows they are not given: the
    products are then sums of window times g, and are corrected later.
    """
    program = tl.program_id(0)
    sequence, first, left = block_of(program, cu_out_ptr, batch, CHUNK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = (channels < C)[None, :]
    norm_weight = per_channel(norm_weight_ptr, channels, C, 1.0)
    length = tl.maximum(tl.load(cu_out_ptr + sequence + 1) - tl.load(cu_out_ptr + sequence), 1)
    if totals_ptr is not None:
        totals_ptr += sequence * 3 * C
        mean_grad = norm_weight * per_channel(totals_ptr, channels, C, 0.0) / length
        mean_product = norm_weight * per_channel(totals_ptr + C, channels, C, 0.0) / length
    offset = (tl.load(cu_out_ptr + sequence) + first).to(tl.int64) * C
    if weight_ptr is not None:
        x_ptr += tl.load(cu_in_ptr + sequence).to(tl.int64) + first.to(tl.int64) * STEP
        products = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    shift_sums = tl.zeros([BLOCK_C], tl.float32)
    scale_sums = tl.zeros([BLOCK_C], tl.float32)
    bias_sums = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, tl.minimum(left, CHUNK), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        valid = rows < left
        mask = valid[:, None] & in_range
        positions = offset + rows[:, None] * C + channels[None, :]
        if weight_ptr is not None:
            windows = load_windows(x_ptr, rows, valid, STEP, WINDOW, BLOCK_K)
            frames = _multiply_windows(windows, weight_ptr, channels, C, WINDOW, PRECISION)
        else:
            frames = tl.load(x_ptr + positions, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            frames += per_channel(bias_ptr, channels, C, 0.0)
        standard, rstd = _standardise(frames, statistics_ptr, sequence, batch, channels, eps, C, NORM)
        activated = standard * norm_weight
        if norm_bias_ptr is not None:
            activated += per_channel(norm_bias_ptr, channels, C, 0.0)
        grad = tl.load(grad_out_ptr + positions, mask=mask, other=0.0).to(tl.float32)
        if GELU:
            below, bell = normal_at(activated, grad_out_ptr.dtype.element_ty == tl.float32)
            grad *= gelu_derivative(activated, below, bell)
            activated *= below
        if activated_ptr is not None:
            tl.store(activated_ptr + positions, activated.to(activated_ptr.dtype.element_ty), mask=mask)
        if NORM != "none":
            shift_sums += tl.sum(grad, 0)
        if NORM == "layer" or (NORM == "group" and weight_ptr is None):
            scale_sums += tl.sum(grad * standard, 0)
        if NORM == "layer":
            grad *= norm_weight
            along = tl.sum(grad, 1)[:, None] / C
            across = tl.sum(grad * standard, 1)[:, None] / C
            grad = tl.where(in_range, rstd * (grad - along - standard * across), 0.0)
        if totals_ptr is not None:
            grad = norm_weight * grad - mean_grad - standard * mean_product
            # The norm of one frame is constant; a fused multiply-add would leave the rounding of a product here.
            grad *= tl.where(length > 1, rstd, 0.0)
        if NORM != "group" and weight_ptr is None:
            bias_sums += tl.sum(grad, 0)
        if grad_conv_ptr is not None:
            tl.store(grad_conv_ptr + positions, grad.to(grad_conv_ptr.dtype.element_ty), mask=mask)
        if weight_ptr is not None:
            products = tl.dot(tl.trans(windows), grad.to(windows.dtype), products, input_precision=PRECISION)
    if sums_ptr is not None:
        sums_ptr += program * 3 * C + channels
        tl.store(sums_ptr, shift_sums, mask=channels < C)
        tl.store(sums_ptr + C, scale_sums, mask=channels < C)
        tl.store(sums_ptr + 2 * C, bias_sums, mask=channels < C)
    if products_ptr is not None:
        products_ptr += program.to(tl.int64) * BLOCK_K * C
        k = tl.arange(0, BLOCK_K)[:, None]
        tl.store(products_ptr + k * C + channels[None, :], products, mask=in_range)


def _row_blocks(layer: LayerPlan, *, windows: bool) -> tuple[int, int]:
    """Return a tile's frames and channels: 16 numbers per thread of 8 warps, or 32 if a product needs 16 frames."""
    if layer.norm != "layer":
        return 32, block_for(layer.channels, 128)
    channels = block_for(layer.channels, 1 << 16)  # layer norm needs all channels of a frame
    return min(64, max(16 if windows else 1, 4096 // channels)), channels


def _loads_at_once(layer: LayerPlan, x: Tensor, *, windows: bool) -> bool:
    """Return whether the next tile is loaded only after the present one, because two fp32 tiles need too much memory.

    With 512 channels, two tiles take 100 KiB of shared memory per block. Several GPUs have 99 (sm_86, sm_89, sm_120).
    """
    return windows and layer.norm == "layer" and x.dtype == torch.float32


def _settings(layer: LayerPlan, x: Tensor, *, windows: bool) -> dict[str, Any]:
    """Return the arguments that the forward and backward kernels of norm and activation share."""
    block_t, block_c = _row_blocks(layer, windows=windows)
    return {
        "cu_in_ptr": layer.cu_in,
        "cu_out_ptr": layer.cu_out,
        "batch": layer.batch,
        "eps": layer.eps,
        "C": layer.channels,
        "WINDOW": layer.window,
        "STEP": layer.stride,
        "NORM": layer.norm,
        "GELU": layer.activation == "gelu",
        "PRECISION": precision_of("strided_conv", x),
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "BLOCK_K": window_block(layer) if windows else 16,
        "num_warps": 8,
        "num_stages": 1 if _loads_at_once(layer, x, windows=windows) else 2,
    }


def activate(
    layer: LayerPlan,
    x: Tensor,  # (N_out, C_out), or (N, 1) with `windows`
    statistics: Tensor | None,  # (2, B, C_out)
    *,
    windows: bool,
) -> Tensor:  # (N_out, C_out)
    """Apply norm and activation to the convolution's output.

    Args:
        layer: Description of the layer.
        x: (N_out, C_out) convolution output; with `windows`, the layer's input (N, 1).
        statistics: (2, B, C_out) mean and 1 / standard deviation for group norm.
        windows: Whether to compute the convolution from windows of the input.

    Returns:
        (N_out, C_out) output of the layer, in the dtype of `x`.
    """
    out = x.new_empty((layer.total, layer.channels))
    settings = _settings(layer, x, windows=windows)
    _activate_kernel[(layer.total // settings["BLOCK_T"] + layer.batch,)](
        x,
        layer.weight if windows else None,
        layer.bias,
        layer.norm_weight,
        layer.norm_bias,
        statistics,
        out,
        **settings,
    )
    return out


def activate_backward(
    layer: LayerPlan,
    x: Tensor,  # (N_out, C_out), or (N, 1)
    statistics: Tensor | None,  # (2, B, C_out)
    grad_out: Tensor,  # (N_out, C_out)
    *,
    windows: bool,
    keep_activated: bool,
) -> RowGradients:
    """Run the backward of `activate`: compute gradients of the convolution's output, or with `windows`, of the weight.

    Args:
        layer: Description of the layer.
        x: As in `activate`.
        statistics: (2, B, C_out) mean and 1 / standard deviation for group norm.
        grad_out: (N_out, C_out) gradient of the layer's output.
        windows: As in `activate`.
        keep_activated: Whether to also return the layer's output.
    """
    settings = _settings(layer, x, windows=windows)
    chunk = WINDOW_CHUNK if windows else FRAME_CHUNK
    programs, channels = chunk_programs(layer, chunk), layer.channels
    sums = grad_out.new_empty((programs, 3, channels), dtype=torch.float32)
    activated = torch.empty_like(grad_out) if keep_activated else None
    grad_conv = None if windows else torch.empty_like(grad_out)
    products = sums.new_empty((programs, settings["BLOCK_K"], channels)) if windows else None
    inputs = grad_out, x, layer.weight if windows else None, layer.bias, layer.norm_weight, layer.norm_bias, statistics
    grid = programs, triton.cdiv(channels, settings["BLOCK_C"])
    if windows or layer.norm != "group":
        _activate_backward_kernel[grid](*inputs, None, grad_conv, activated, sums, products, **settings, CHUNK=chunk)
        if layer.norm == "group":
            weight, norm_weight, norm_bias = window_group_norm_backward(layer, x, statistics, sums, products)
            # The norm subtracts the mean, and with it the bias, so the gradient of the bias is zero.
            return RowGradients(None, activated, weight, torch.zeros_like(norm_bias), norm_weight, norm_bias)
        totals = sums.sum(0)
    else:
        _activate_backward_kernel[grid](*inputs, None, None, None, sums, None, **settings, CHUNK=chunk)
        per_sequence = sum_chunks(layer, sums)
        _activate_backward_kernel[grid](
            *inputs, per_sequence, grad_conv, activated, None, None, **settings, CHUNK=chunk
        )
        totals = per_sequence.sum(0)
    norm_bias, norm_weight, bias = totals.unbind()
    if products is None:
        return RowGradients(grad_conv, activated, None, bias, norm_weight, norm_bias)
    total = products.sum(0)
    weight, bias = total[: layer.window].t().reshape(layer.weight.shape), total[layer.window]
    return RowGradients(None, activated, weight, bias, norm_weight, norm_bias)
