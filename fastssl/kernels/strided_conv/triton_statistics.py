"""Triton kernels of `strided_conv` that sum over the frames of a sequence, for group norm.

One kernel sums chunks of frames; a second one adds the chunks of each sequence in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.strided_conv.plan import LayerPlan
from fastssl.kernels.strided_conv.triton_blocks import (
    FRAME_CHUNK,
    WINDOW_CHUNK,
    block_for,
    block_of,
    chunk_programs,
    chunks_of,
    load_windows,
    per_channel,
    window_block,
)


@triton.jit(do_not_specialize=["batch"])
def _window_moments_kernel(
    x_ptr,
    moments_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum window^T window over a chunk in fp64, where each window ends with a one: (programs, BLOCK_K, BLOCK_K).

    The first sample of the sequence is subtracted from all samples, so that a constant offset costs no precision.
    """
    program = tl.program_id(0)
    sequence, first, left = block_of(program, cu_out_ptr, batch, CHUNK)
    begin = tl.load(cu_in_ptr + sequence).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_K, BLOCK_K], tl.float64)
    origin = tl.load(x_ptr + begin, mask=left > 0, other=0.0).to(tl.float64)
    x_ptr += begin + first.to(tl.int64) * STEP
    for start in range(0, tl.minimum(left, CHUNK), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        valid = rows < left
        windows = load_windows(x_ptr, rows, valid, STEP, WINDOW, BLOCK_K).to(tl.float64)
        windows = tl.where(valid[:, None] & (k < WINDOW), windows - origin, windows)
        sums += windows[:, :, None] * windows[:, None, :]
    positions = tl.arange(0, BLOCK_K)[:, None] * BLOCK_K + k
    tl.store(moments_ptr + program.to(tl.int64) * BLOCK_K * BLOCK_K + positions, tl.sum(sums, 0))


@triton.jit
def _window_covariance(
    x_ptr,
    moments_ptr,
    cu_in_ptr,
    cu_out_ptr,
    sequence,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return mean (BLOCK_K,) and covariance (BLOCK_K, BLOCK_K) of a sequence's windows; zero from index WINDOW on."""
    chunk, chunks, frames = chunks_of(sequence, cu_out_ptr, CHUNK)
    k = tl.arange(0, BLOCK_K)
    positions = k[:, None] * BLOCK_K + k[None, :]
    moments = tl.zeros([BLOCK_K, BLOCK_K], tl.float64)
    moments_ptr += chunk.to(tl.int64) * BLOCK_K * BLOCK_K
    for _ in range(chunks):
        moments += tl.load(moments_ptr + positions)
        moments_ptr += BLOCK_K * BLOCK_K
    moments /= tl.maximum(frames, 1)
    inside = k < WINDOW
    # Row and column WINDOW come from the column of ones, so they are the means.
    row = tl.sum(tl.where((k == WINDOW)[:, None], moments, 0.0), 0)
    column = tl.sum(tl.where((k == WINDOW)[None, :], moments, 0.0), 1)
    both = inside[:, None] & inside[None, :]
    covariance = tl.where(both, moments - column[:, None] * row[None, :], 0.0)
    origin = tl.load(x_ptr + tl.load(cu_in_ptr + sequence), mask=frames > 0, other=0.0).to(tl.float64)
    return tl.where(inside, row + origin, 0.0), covariance


@triton.jit(do_not_specialize=["batch"])
def _window_statistics_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    moments_ptr,
    statistics_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    eps,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute mean (w . mean) and 1 / deviation (variance w . covariance w) of each channel from those of windows.

    For a sequence of one frame, 0 is stored instead of 1 / deviation.
    """
    sequence = tl.program_id(0)
    mean, covariance = _window_covariance(x_ptr, moments_ptr, cu_in_ptr, cu_out_ptr, sequence, WINDOW, BLOCK_K, CHUNK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    mask = (channels < C)[:, None] & (k < WINDOW)[None, :]
    weight = tl.load(weight_ptr + channels[:, None] * WINDOW + k[None, :], mask=mask, other=0.0).to(tl.float64)
    means = tl.sum(weight * mean[None, :], 1)
    if bias_ptr is not None:
        means += tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float64)
    variances = tl.sum(tl.sum(weight[:, :, None] * covariance[None, :, :], 1) * weight, 1)
    rstd = tl.rsqrt(tl.maximum(variances, 0.0).to(tl.float32) + eps)
    # One frame is its own mean. It is computed with other rounding than the mean, and eps would make that large.
    _, _, frames = chunks_of(sequence, cu_out_ptr, CHUNK)
    rstd = tl.where(frames > 1, rstd, 0.0)
    statistics_ptr += sequence * C + channels
    tl.store(statistics_ptr, means.to(tl.float32), mask=channels < C)
    tl.store(statistics_ptr + batch * C, rstd, mask=channels < C)


@triton.jit(do_not_specialize=["batch"])
def _frame_moments_kernel(
    conv_out_ptr,
    moments_ptr,
    cu_out_ptr,
    batch,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute a chunk's mean and sum of squared differences from the mean, per channel: (programs, 2, C)."""
    program = tl.program_id(0)
    sequence, first, left = block_of(program, cu_out_ptr, batch, CHUNK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_T)
    conv_out_ptr += (tl.load(cu_out_ptr + sequence) + first).to(tl.int64) * C
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, tl.minimum(left, CHUNK), BLOCK_T):
        mask = (start + rows < left)[:, None] & (channels < C)[None, :]
        sums += tl.load(conv_out_ptr + (start + rows)[:, None] * C + channels[None, :], mask=mask, other=0.0)
    mean = tl.sum(sums, 0) / tl.maximum(tl.minimum(left, CHUNK), 1)
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, tl.minimum(left, CHUNK), BLOCK_T):
        mask = (start + rows < left)[:, None] & (channels < C)[None, :]
        frames = tl.load(conv_out_ptr + (start + rows)[:, None] * C + channels[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, frames - mean[None, :], 0.0)
        squares += centred * centred
    moments_ptr += program * 2 * C + channels
    tl.store(moments_ptr, mean, mask=channels < C)
    tl.store(moments_ptr + C, tl.sum(squares, 0), mask=channels < C)


@triton.jit(do_not_specialize=["batch"])
def _frame_statistics_kernel(
    moments_ptr,
    bias_ptr,
    statistics_ptr,
    cu_out_ptr,
    batch,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Combine the chunks of a sequence into mean and 1 / standard deviation, by the formula of Chan et al. (1979)."""
    sequence = tl.program_id(0)
    chunk, chunks, frames = chunks_of(sequence, cu_out_ptr, CHUNK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for i in range(chunks):
        part_ptr = moments_ptr + (chunk + i) * 2 * C + channels
        distance = tl.load(part_ptr, mask=channels < C, other=0.0) - mean
        before = i * CHUNK
        here = tl.minimum(frames - before, CHUNK)
        share = here.to(tl.float32) / (before + here)
        mean += distance * share
        squares += tl.load(part_ptr + C, mask=channels < C, other=0.0) + distance * distance * (before * share)
    if bias_ptr is not None:
        mean += tl.load(bias_ptr + channels, mask=channels < C, other=0.0)
    statistics_ptr += sequence * C + channels
    tl.store(statistics_ptr, mean, mask=channels < C)
    tl.store(statistics_ptr + batch * C, tl.rsqrt(squares / tl.maximum(frames, 1) + eps), mask=channels < C)


@triton.jit
def _sum_chunks_kernel(sums_ptr, totals_ptr, cu_out_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr):
    """Add the chunks of each sequence in order: (programs, 3, C) to (B, 3, C)."""
    sequence, row = tl.program_id(0), tl.program_id(1)
    chunk, chunks, _ = chunks_of(sequence, cu_out_ptr, CHUNK)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for i in range(chunk, chunk + chunks):
        total += tl.load(sums_ptr + (i * 3 + row) * C + channels, mask=channels < C, other=0.0)
    tl.store(totals_ptr + (sequence * 3 + row) * C + channels, total, mask=channels < C)


@triton.jit(do_not_specialize=["batch"])
def _window_group_norm_backward_kernel(
    x_ptr,
    weight_ptr,
    norm_weight_ptr,
    statistics_ptr,
    moments_ptr,
    sums_ptr,
    products_ptr,
    grads_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute one sequence's contribution to the gradients of the first layer's parameters under group norm.

    `grads_ptr` is (B, BLOCK_K + 1, C): the first WINDOW rows are for the weight, row WINDOW is for norm_weight, and row
    BLOCK_K for norm_bias.
    """
    sequence = tl.program_id(0)
    mean, covariance = _window_covariance(x_ptr, moments_ptr, cu_in_ptr, cu_out_ptr, sequence, WINDOW, BLOCK_K, CHUNK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = channels < C
    k = tl.arange(0, BLOCK_K)
    chunk, chunks, _ = chunks_of(sequence, cu_out_ptr, CHUNK)
    products = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    shift = tl.zeros([BLOCK_C], tl.float64)
    products_ptr += chunk.to(tl.int64) * BLOCK_K * C
    sums_ptr += chunk * 3 * C
    for _ in range(chunks):
        products += tl.load(products_ptr + k[:, None] * C + channels[None, :], mask=in_range[None, :], other=0.0)
        shift += tl.load(sums_ptr + channels, mask=in_range, other=0.0)
        products_ptr += BLOCK_K * C
        sums_ptr += 3 * C
    # Centre the windows on their mean. Row WINDOW of `products` comes from the column of ones, so it is the sum of the
    # gradients, rounded in the same way.
    ones = tl.sum(tl.where((k == WINDOW)[:, None], products, 0.0), 0)
    products = tl.where((k < WINDOW)[:, None], products - mean[:, None] * ones[None, :], 0.0)
    mask = (k < WINDOW)[:, None] & in_range[None, :]
    weight = tl.load(weight_ptr + channels[None, :] * WINDOW + k[:, None], mask=mask, other=0.0).to(tl.float64)
    rstd = tl.load(statistics_ptr + (batch + sequence) * C + channels, mask=in_range, other=0.0).to(tl.float64)
    scale = rstd * tl.sum(weight * products, 0)
    spread = tl.sum(covariance[:, :, None] * weight[None, :, :], 1)
    grad_weight = rstd[None, :] * (products - (scale * rstd)[None, :] * spread)
    grad_weight *= per_channel(norm_weight_ptr, channels, C, 1.0)
    grad_weight = tl.where((k == WINDOW)[:, None], scale[None, :], grad_weight)
    grads_ptr += sequence * (BLOCK_K + 1) * C + channels
    tl.store(grads_ptr[None, :] + k[:, None] * C, grad_weight.to(tl.float32), mask=in_range[None, :])
    tl.store(grads_ptr + BLOCK_K * C, shift.to(tl.float32), mask=in_range)


def _window_moments(layer: LayerPlan, x: Tensor) -> Tensor:
    """Run `_window_moments_kernel` on all chunks; return (programs, BLOCK_K, BLOCK_K) fp64."""
    programs, block = chunk_programs(layer, WINDOW_CHUNK), window_block(layer)
    moments = x.new_empty((programs, block, block), dtype=torch.float64)
    _window_moments_kernel[(programs,)](
        x,
        moments,
        layer.cu_in,
        layer.cu_out,
        layer.batch,
        STEP=layer.stride,
        WINDOW=layer.window,
        BLOCK_T=4096 // block**2,
        BLOCK_K=block,
        CHUNK=WINDOW_CHUNK,
    )
    return moments


def group_statistics(
    layer: LayerPlan,
    x: Tensor,  # (N_out, C_out), or (N, 1)
    *,
    windows: bool,
) -> Tensor:  # (2, B, C_out)
    """Compute mean and 1 / standard deviation of convolution output plus bias, per sequence and channel.

    Args:
        layer: Description of the layer.
        x: (N_out, C_out) convolution output; with `windows`, the layer's input (N, 1).
        windows: Whether to compute the statistics from windows of the input.

    Returns:
        (2, B, C_out) fp32.
    """
    statistics = x.new_empty((2, layer.batch, layer.channels), dtype=torch.float32)
    if windows:
        _window_statistics_kernel[layer.batch, triton.cdiv(layer.channels, 16)](
            x,
            layer.weight,
            layer.bias,
            _window_moments(layer, x),
            statistics,
            layer.cu_in,
            layer.cu_out,
            layer.batch,
            layer.eps,
            C=layer.channels,
            WINDOW=layer.window,
            BLOCK_C=16,
            BLOCK_K=window_block(layer),
            CHUNK=WINDOW_CHUNK,
        )
        return statistics
    programs, block = chunk_programs(layer, FRAME_CHUNK), block_for(layer.channels, 128)
    blocks = triton.cdiv(layer.channels, block)
    moments = statistics.new_empty((programs, 2, layer.channels))
    _frame_moments_kernel[programs, blocks](
        x, moments, layer.cu_out, layer.batch, C=layer.channels, BLOCK_T=32, BLOCK_C=block, CHUNK=FRAME_CHUNK
    )
    _frame_statistics_kernel[layer.batch, blocks](
        moments,
        layer.bias,
        statistics,
        layer.cu_out,
        layer.batch,
        layer.eps,
        C=layer.channels,
        BLOCK_C=block,
        CHUNK=FRAME_CHUNK,
    )
    return statistics


def window_group_norm_backward(
    layer: LayerPlan,
    x: Tensor,  # (N, 1)
    statistics: Tensor | None,  # (2, B, C)
    sums: Tensor,  # (programs, 3, C)
    products: Tensor | None,  # (programs, BLOCK_K, C)
) -> tuple[Tensor, Tensor, Tensor]:  # (C, 1, K), (C,), (C,)
    """Return gradients of weight, norm_weight and norm_bias, from the sums that `_activate_backward_kernel` stored."""
    block = window_block(layer)
    grads = sums.new_empty((layer.batch, block + 1, layer.channels))
    _window_group_norm_backward_kernel[layer.batch, triton.cdiv(layer.channels, 16)](
        x,
        layer.weight,
        layer.norm_weight,
        statistics,
        _window_moments(layer, x),
        sums,
        products,
        grads,
        layer.cu_in,
        layer.cu_out,
        layer.batch,
        C=layer.channels,
        WINDOW=layer.window,
        BLOCK_C=16,
        BLOCK_K=block,
        CHUNK=WINDOW_CHUNK,
    )
    totals = grads.sum(0)
    grad_weight = totals[: layer.window].t().reshape(layer.weight.shape)
    return grad_weight, totals[layer.window], totals[block]


def sum_chunks(
    layer: LayerPlan,
    sums: Tensor,  # (programs, 3, C)
) -> Tensor:  # (B, 3, C)
    """Return sums over whole sequences, from the sums over their chunks of FRAME_CHUNK frames."""
    totals, block = sums.new_empty((layer.batch, 3, layer.channels)), block_for(layer.channels, 128)
    _sum_chunks_kernel[layer.batch, 3, triton.cdiv(layer.channels, block)](
        sums, totals, layer.cu_out, C=layer.channels, BLOCK_C=block, CHUNK=FRAME_CHUNK
    )
    return totals
