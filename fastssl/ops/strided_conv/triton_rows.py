"""Triton kernels of `strided_conv` that go frame by frame: norm, GELU, their backward, and the first layer.

The first layer reads one channel: its output is the product of a window of K samples with a (K, C) matrix, cheaper to
make again than to load, so these kernels take their frames from memory or from windows. README.md has the formulas.

Blocks are counted from the beginning of their sequence, so a sequence has the same bits in any batch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Longest window, in samples, that is multiplied again rather than kept: with a column of ones it fits 32.
LONGEST_WINDOW = 31
#: Widest output for which layer norm fits the window kernels.
_WIDEST_LAYER_NORM = 1024
#: Frames of one sequence that one program sums up before a second kernel takes over.
_WINDOW_CHUNK, _FRAME_CHUNK = 2048, 256


class Layer(NamedTuple):
    """One layer of a stack, with where its sequences begin."""

    weight: Tensor  # (C_out, C_in, K)
    bias: Tensor | None  # (C_out,)
    norm_weight: Tensor | None  # (C_out,)
    norm_bias: Tensor | None  # (C_out,)
    stride: int
    norm: str
    eps: float
    gelu: bool
    cu_in: Tensor  # (B + 1,)
    cu_out: Tensor  # (B + 1,)
    total: int

    @property
    def channels(self) -> int:
        """C_out."""
        return self.weight.shape[0]

    @property
    def window(self) -> int:
        """Contiguous numbers that one output frame is made of."""
        return self.weight.shape[1] * self.weight.shape[2]

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.cu_out.shape[0] - 1

    @property
    def has_windows(self) -> bool:
        """Whether the kernels of this file can make its frames from windows of the input."""
        wide = self.norm == "layer" and self.channels > _WIDEST_LAYER_NORM
        return self.weight.shape[1] == 1 and self.window <= LONGEST_WINDOW and not wide


class RowGradients(NamedTuple):
    """What the backward of norm and activation leaves."""

    conv_out: Tensor | None = None  # (N_out, C_out), but for a layer made from windows, which has `weight` instead
    activated: Tensor | None = None  # (N_out, C_out), the layer's output again, on request
    weight: Tensor | None = None  # (C_out, C_in, K)
    bias: Tensor | None = None  # (C_out,)
    norm_weight: Tensor | None = None  # (C_out,)
    norm_bias: Tensor | None = None  # (C_out,)


@triton.jit
def normal_at(x, EXACT: tl.constexpr):
    """Standard normal: the probability below x, and the density times sqrt(2 pi).

    Where 2e-7 is enough, as csrc/common/vector_math.h with coefficients halved: with rsqrt squared for the reciprocal
    and one exponential for both results, that is half the instructions of `tl.erf` and `tl.exp`.
    """
    bell = tl.exp2(x * x * -0.72134752044)
    if EXACT:
        below = 0.5 + 0.5 * tl.erf(x * 0.70710678119)
    else:
        root = tl.rsqrt(1.0 + 0.282842712 * tl.abs(x))
        t = root * root
        p = 0.02513105050
        p = p * t - 0.091450736
        p = p * t + 0.0845428185
        p = p * t - 0.00280394475
        p = p * t + 0.070715852
        p = p * t + 0.084270939
        p = p * t + 0.1039213615
        p = p * t + 0.1128347965
        p = p * t + 0.112837933
        tail = p * t * bell
        below = tl.where(x < 0, tail, 1.0 - tail)
    return below, bell


@triton.jit
def gelu_derivative(x, below, bell):
    """From what `normal_at` gives."""
    return below + x * bell * 0.3989422804


@triton.jit
def block_of(tile, cu_ptr, batch, BLOCK: tl.constexpr):
    """Sequence of a block, first frame of the block within it, and frames from there to its end, perhaps none.

    Sequence b has the blocks from cu[b] // BLOCK + b on. That leaves each enough of them, and at most one too many; so
    a grid of N // BLOCK + B programs needs to know nothing of the lengths.
    """
    sequence = -1
    for start in range(0, batch, 128):
        index = start + tl.arange(0, 128)
        begins = tl.load(cu_ptr + index, mask=index < batch, other=0)
        sequence += tl.sum(((index < batch) & (begins // BLOCK + index <= tile)).to(tl.int32))
    begin = tl.load(cu_ptr + sequence)
    first = (tile - begin // BLOCK - sequence) * BLOCK
    return sequence, first, tl.load(cu_ptr + sequence + 1) - begin - first


@triton.jit
def chunks_of(sequence, cu_ptr, CHUNK: tl.constexpr):
    """First block of a sequence, and the number of its blocks that have frames."""
    begin = tl.load(cu_ptr + sequence)
    frames = tl.load(cu_ptr + sequence + 1) - begin
    return begin // CHUNK + sequence, (frames + CHUNK - 1) // CHUNK, frames


@triton.jit
def _load_windows(x_ptr, rows, valid, STEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K): the window of each frame, then a one, then zeros."""
    k = tl.arange(0, BLOCK_K)[None, :]
    windows = tl.load(x_ptr + rows[:, None] * STEP + k, mask=valid[:, None] & (k < WINDOW), other=0.0)
    return tl.where((k == WINDOW) & valid[:, None], 1.0, windows.to(tl.float32)).to(windows.dtype)


@triton.jit
def _multiply_windows(windows, weight_ptr, channels, C, WINDOW: tl.constexpr, PRECISION: tl.constexpr):
    """(rows, channels) of the first layer's product. `weight_ptr` is (C, WINDOW)."""
    BLOCK_K: tl.constexpr = windows.shape[1]
    k = tl.arange(0, BLOCK_K)[:, None]
    mask = (k < WINDOW) & (channels < C)[None, :]
    weight = tl.load(weight_ptr + channels[None, :] * WINDOW + k, mask=mask, other=0.0)
    return tl.dot(windows, weight, input_precision=PRECISION)


@triton.jit
def _per_channel(ptr, channels, C, default: tl.constexpr):
    if ptr is None:
        values = tl.full(channels.shape, default, tl.float32)
    else:
        values = tl.load(ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    return values[None, :]


@triton.jit
def _standardise(frames, statistics_ptr, sequence, batch, channels, eps, C, NORM: tl.constexpr):
    """Frames less their mean, over their deviation, and one over the deviation."""
    rstd = 1.0
    if NORM == "group":
        mean = _per_channel(statistics_ptr + sequence * C, channels, C, 0.0)
        rstd = _per_channel(statistics_ptr + (batch + sequence) * C, channels, C, 0.0)
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
    """Norm and GELU of frames: those at `x_ptr`, or with a weight those made from the windows there."""
    sequence, first, left = block_of(tl.program_id(0), cu_out_ptr, batch, BLOCK_T)
    if left <= 0:
        return
    rows = tl.arange(0, BLOCK_T)
    valid = rows < left
    offset = (tl.load(cu_out_ptr + sequence) + first).to(tl.int64) * C
    if weight_ptr is not None:
        x_ptr += tl.load(cu_in_ptr + sequence).to(tl.int64) + first.to(tl.int64) * STEP
        windows = _load_windows(x_ptr, rows, valid, STEP, WINDOW, BLOCK_K)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (channels < C)[None, :]
        positions = offset + rows[:, None] * C + channels[None, :]
        if weight_ptr is not None:
            frames = _multiply_windows(windows, weight_ptr, channels, C, WINDOW, PRECISION)
        else:
            frames = tl.load(x_ptr + positions, mask=mask, other=0.0).to(tl.float32)
        frames += _per_channel(bias_ptr, channels, C, 0.0)
        frames, _ = _standardise(frames, statistics_ptr, sequence, batch, channels, eps, C, NORM)
        if norm_weight_ptr is not None:
            frames *= _per_channel(norm_weight_ptr, channels, C, 1.0)
        if norm_bias_ptr is not None:
            frames += _per_channel(norm_bias_ptr, channels, C, 0.0)
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
    """Backward of norm and GELU over a chunk of one sequence.

    `sums_ptr` (programs, 3, C) takes the chunk's sums of g, g * standardised frames and dL/d conv, where g is the
    gradient behind the norm; `products_ptr` (programs, BLOCK_K, C) those of window times dL/d conv, or g for the group
    norm, whose gradient needs the sums over the whole sequence, `totals_ptr` (B, 3, C), first.
    """
    program = tl.program_id(0)
    sequence, first, left = block_of(program, cu_out_ptr, batch, CHUNK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = (channels < C)[None, :]
    norm_weight = _per_channel(norm_weight_ptr, channels, C, 1.0)
    length = tl.maximum(tl.load(cu_out_ptr + sequence + 1) - tl.load(cu_out_ptr + sequence), 1)
    if totals_ptr is not None:
        totals_ptr += sequence * 3 * C
        mean_grad = norm_weight * _per_channel(totals_ptr, channels, C, 0.0) / length
        mean_product = norm_weight * _per_channel(totals_ptr + C, channels, C, 0.0) / length
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
            windows = _load_windows(x_ptr, rows, valid, STEP, WINDOW, BLOCK_K)
            frames = _multiply_windows(windows, weight_ptr, channels, C, WINDOW, PRECISION)
        else:
            frames = tl.load(x_ptr + positions, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            frames += _per_channel(bias_ptr, channels, C, 0.0)
        standard, rstd = _standardise(frames, statistics_ptr, sequence, batch, channels, eps, C, NORM)
        activated = standard * norm_weight
        if norm_bias_ptr is not None:
            activated += _per_channel(norm_bias_ptr, channels, C, 0.0)
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
            grad = rstd * (norm_weight * grad - mean_grad - standard * mean_product)
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
    """Sum over a chunk of the products of any two samples of a window, and of a one, in fp64.

    A sequence is measured from its first sample, so a constant offset costs no digits.
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
        windows = _load_windows(x_ptr, rows, valid, STEP, WINDOW, BLOCK_K).to(tl.float64)
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
    """Mean (BLOCK_K,) and covariance (BLOCK_K, BLOCK_K) of the windows of a sequence; zero beyond a window."""
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
    # The last row and column are the means: products with the one.
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
    """Mean and one over the deviation of each channel, from those of the windows: w . mean and w . covariance w."""
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
    """Mean of a chunk, and the sum of squared distances from it: (programs, 2, C)."""
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
    """Chunks of a sequence into its mean and one over its deviation, by Chan's formula."""
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
    """(programs, 3, C) to (B, 3, C): the chunks of each sequence, in order."""
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
    """What a sequence adds to the gradients of the first layer under group norm.

    `grads_ptr` (B, BLOCK_K + 1, C): WINDOW rows of the weight, at row WINDOW norm_weight, at row BLOCK_K norm_bias.
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
    # Around the mean window. The product with the one is the sum of the same rounded gradients.
    ones = tl.sum(tl.where((k == WINDOW)[:, None], products, 0.0), 0)
    products = tl.where((k < WINDOW)[:, None], products - mean[:, None] * ones[None, :], 0.0)
    mask = (k < WINDOW)[:, None] & in_range[None, :]
    weight = tl.load(weight_ptr + channels[None, :] * WINDOW + k[:, None], mask=mask, other=0.0).to(tl.float64)
    rstd = tl.load(statistics_ptr + (batch + sequence) * C + channels, mask=in_range, other=0.0).to(tl.float64)
    scale = rstd * tl.sum(weight * products, 0)
    spread = tl.sum(covariance[:, :, None] * weight[None, :, :], 1)
    grad_weight = rstd[None, :] * (products - (scale * rstd)[None, :] * spread)
    grad_weight *= _per_channel(norm_weight_ptr, channels, C, 1.0)
    grad_weight = tl.where((k == WINDOW)[:, None], scale[None, :], grad_weight)
    grads_ptr += sequence * (BLOCK_K + 1) * C + channels
    tl.store(grads_ptr[None, :] + k[:, None] * C, grad_weight.to(tl.float32), mask=in_range[None, :])
    tl.store(grads_ptr + BLOCK_K * C, shift.to(tl.float32), mask=in_range)


def _row_blocks(layer: Layer, *, windows: bool) -> tuple[int, int]:
    """Frames and channels of a tile: 16 numbers for each thread of 8 warps, 32 where a product needs 16 frames."""
    if layer.norm != "layer":
        return 32, _channel_block(layer.channels, 128)
    channels = max(16, triton.next_power_of_2(layer.channels))  # a norm over channels needs them all
    return min(64, max(16 if windows else 1, 4096 // channels)), channels


def _channel_block(channels: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(channels)))


def _window_block(layer: Layer) -> int:
    return max(16, triton.next_power_of_2(layer.window + 1))


def _chunk_programs(layer: Layer, chunk: int) -> int:
    return layer.total // chunk + layer.batch


def _settings(layer: Layer, *, windows: bool, precision: str) -> dict[str, Any]:
    """What the two kernels of norm and activation have in common."""
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
        "GELU": layer.gelu,
        "PRECISION": precision,
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "BLOCK_K": _window_block(layer) if windows else 16,
        "num_warps": 8,
        "num_stages": 2,
    }


def activate(
    layer: Layer,
    x: Tensor,  # (N_out, C_out), or (N, 1) where the layer is made from windows
    statistics: Tensor | None,  # (2, B, C_out)
    *,
    windows: bool,
    precision: str,
) -> Tensor:  # (N_out, C_out)
    """Norm and activation of the convolution's output, or with `windows` of what the input's windows give."""
    out = x.new_empty((layer.total, layer.channels))
    settings = _settings(layer, windows=windows, precision=precision)
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


def _window_moments(layer: Layer, x: Tensor) -> Tensor:
    programs, block = _chunk_programs(layer, _WINDOW_CHUNK), _window_block(layer)
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
        CHUNK=_WINDOW_CHUNK,
    )
    return moments


def group_statistics(
    layer: Layer,
    x: Tensor,  # (N_out, C_out), or (N, 1)
    *,
    windows: bool,
) -> Tensor:  # (2, B, C_out)
    """Mean and one over the deviation, per sequence and channel, of the convolution's output and its bias, fp32."""
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
            BLOCK_K=_window_block(layer),
            CHUNK=_WINDOW_CHUNK,
        )
        return statistics
    programs, block = _chunk_programs(layer, _FRAME_CHUNK), _channel_block(layer.channels, 128)
    blocks = triton.cdiv(layer.channels, block)
    moments = statistics.new_empty((programs, 2, layer.channels))
    _frame_moments_kernel[programs, blocks](
        x, moments, layer.cu_out, layer.batch, C=layer.channels, BLOCK_T=32, BLOCK_C=block, CHUNK=_FRAME_CHUNK
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
        CHUNK=_FRAME_CHUNK,
    )
    return statistics


def activate_backward(
    layer: Layer,
    x: Tensor,  # (N_out, C_out), or (N, 1)
    statistics: Tensor | None,  # (2, B, C_out)
    grad_out: Tensor,  # (N_out, C_out)
    *,
    windows: bool,
    precision: str,
    keep_activated: bool,
) -> RowGradients:
    """Backward of `activate`, to the convolution's output, or with `windows` to the weight.

    Args:
        layer: What was computed.
        x: As in the forward.
        statistics: Of the group norm.
        grad_out: Gradient of the layer's output.
        windows: As in the forward.
        precision: Of fp32 products.
        keep_activated: Whether to give the layer's output again.
    """
    settings = _settings(layer, windows=windows, precision=precision)
    chunk = _WINDOW_CHUNK if windows else _FRAME_CHUNK
    programs, channels = _chunk_programs(layer, chunk), layer.channels
    sums = grad_out.new_empty((programs, 3, channels), dtype=torch.float32)
    activated = torch.empty_like(grad_out) if keep_activated else None
    grad_conv = None if windows else torch.empty_like(grad_out)
    products = sums.new_empty((programs, settings["BLOCK_K"], channels)) if windows else None
    inputs = grad_out, x, layer.weight if windows else None, layer.bias, layer.norm_weight, layer.norm_bias, statistics
    grid = programs, triton.cdiv(channels, settings["BLOCK_C"])
    if windows or layer.norm != "group":
        _activate_backward_kernel[grid](*inputs, None, grad_conv, activated, sums, products, **settings, CHUNK=chunk)
        if layer.norm == "group":
            return _window_group_norm_backward(layer, x, statistics, sums, products, activated)
        totals = sums.sum(0)
    else:
        _activate_backward_kernel[grid](*inputs, None, None, None, sums, None, **settings, CHUNK=chunk)
        per_sequence = sums.new_empty((layer.batch, 3, channels))
        block = _channel_block(channels, 128)
        _sum_chunks_kernel[layer.batch, 3, triton.cdiv(channels, block)](
            sums, per_sequence, layer.cu_out, C=channels, BLOCK_C=block, CHUNK=chunk
        )
        _activate_backward_kernel[grid](
            *inputs, per_sequence, grad_conv, activated, None, None, **settings, CHUNK=chunk
        )
        totals = per_sequence.sum(0)
    grad_weight = None
    if products is not None:
        grad_weight = products.sum(0)[: layer.window].t().reshape(layer.weight.shape)
    norm_bias, norm_weight, bias = totals.unbind()
    return RowGradients(grad_conv, activated, grad_weight, bias, norm_weight, norm_bias)


def _window_group_norm_backward(
    layer: Layer, x: Tensor, statistics: Tensor | None, sums: Tensor, products: Tensor | None, activated: Tensor | None
) -> RowGradients:
    block = _window_block(layer)
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
        CHUNK=_WINDOW_CHUNK,
    )
    totals = grads.sum(0)
    grad_weight = totals[: layer.window].t().reshape(layer.weight.shape)
    # A bias moves the mean alone, which the norm takes out again.
    bias = torch.zeros_like(totals[0])
    return RowGradients(None, activated, grad_weight, bias, totals[layer.window], totals[block])
