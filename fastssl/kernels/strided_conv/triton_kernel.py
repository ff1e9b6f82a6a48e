"""Triton kernels of `strided_conv`: convolution of packed frames as a matrix product whose rows overlap.

With channels last, the K input frames of an output frame are K * C_in contiguous numbers, so windows are not copied.
Norm, activation and the first layer are in triton_rows.py, sums over sequences in triton_statistics.py. README.md has
the formulas and lists what is kept for the backward.

A tile contains output frames of one sequence. Tiles are counted from the start of their sequence. Input addresses are
computed, not looked up in a table, and the host need not know the lengths.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.gelu_triton import gelu_derivative, normal_at
from fastssl.kernels.precision import precision_of
from fastssl.kernels.strided_conv.plan import LayerPlan, plan_layers
from fastssl.kernels.strided_conv.triton_blocks import (
    RowGradients,
    block_for,
    block_of,
    has_windows,
)
from fastssl.kernels.strided_conv.triton_rows import activate, activate_backward
from fastssl.kernels.strided_conv.triton_statistics import group_statistics

#: Approximate number of programs for the weight gradient: two for each of the 132 multiprocessors of an H200 GPU.
_PROGRAMS = 264


@triton.jit(do_not_specialize=["batch"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    conv_out_ptr,
    out_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply windows by `weight_ptr` (C_OUT, WINDOW). Store the product, its activation after the bias, or both."""
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = WINDOW % BLOCK_K == 0 and C_OUT % BLOCK_N == 0
    program = tl.program_id(0)
    sequence, first, left = block_of(program // TILES_N, cu_out_ptr, batch, BLOCK_M)
    if left <= 0:
        return
    rows = tl.arange(0, BLOCK_M)
    columns = (program % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows after the end read the last frame again, because the memory after it may not belong to x.
    frames = tl.minimum(rows, left - 1)
    x_ptr += (tl.load(cu_in_ptr + sequence).to(tl.int64) + first.to(tl.int64) * STRIDE) * C_IN
    x_ptrs = x_ptr + frames[:, None] * (STRIDE * C_IN) + k[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * WINDOW + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WINDOW, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inside = start + k < WINDOW
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inside[:, None] & (columns < C_OUT)[None, :], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    mask = (rows < left)[:, None] & (columns < C_OUT)[None, :]
    positions = (tl.load(cu_out_ptr + sequence) + first).to(tl.int64) * C_OUT + rows[:, None] * C_OUT + columns[None, :]
    # Activate the rounded product, because the backward pass has only that one.
    conv_out = acc.to(x_ptr.dtype.element_ty)
    if conv_out_ptr is not None:
        tl.store(conv_out_ptr + positions, conv_out, mask=mask)
    if out_ptr is not None:
        out = conv_out.to(tl.float32)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + columns, mask=columns < C_OUT, other=0.0).to(tl.float32)[None, :]
        if GELU:
            below, _ = normal_at(out, x_ptr.dtype.element_ty == tl.float32)
            out *= below
        tl.store(out_ptr + positions, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def _input_grad_kernel(
    grad_ptr,
    weight_ptr,
    lower_conv_out_ptr,
    lower_out_ptr,
    grad_x_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the gradient of the input: each input frame gathers from output frames whose windows contain it.

    A tile contains the input frames q * STRIDE + phase of one phase, for successive q. Input frame q * STRIDE + phase
    enters output frames q, q - 1, ... through taps phase, phase + STRIDE, ... If the layer below has no bias and no
    norm, `lower_conv_out_ptr` points to its convolution's output. The gradient then continues through its activation,
    and the output of that activation is stored again.
    """
    TILES_N: tl.constexpr = (C_IN + BLOCK_N - 1) // BLOCK_N
    TILES_K: tl.constexpr = (C_OUT + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    sequence, first, left = block_of(program // (TILES_N * STRIDE), cu_in_ptr, batch, STRIDE * BLOCK_M)
    if left <= 0:
        return
    phase = program % STRIDE
    columns = (program // STRIDE % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    taps = tl.maximum(KERNEL - phase + STRIDE - 1, 0) // STRIDE
    begin_out = tl.load(cu_out_ptr + sequence)
    frame = first // STRIDE
    frames_out = tl.load(cu_out_ptr + sequence + 1) - begin_out
    grad_ptr += (begin_out + frame).to(tl.int64) * C_OUT
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, taps * TILES_K):
        back = taps - 1 - step // TILES_K
        channels = (step % TILES_K) * BLOCK_K + k
        source = rows - back
        grad_mask = ((frame + source >= 0) & (frame + source < frames_out))[:, None]
        weight_ptrs = (
            weight_ptr + (phase + back * STRIDE) * C_IN + channels[:, None] * (KERNEL * C_IN) + columns[None, :]
        )
        if C_OUT % BLOCK_K == 0 and C_IN % BLOCK_N == 0:
            weight = tl.load(weight_ptrs)
        else:
            grad_mask = grad_mask & (channels < C_OUT)[None, :]
            weight = tl.load(weight_ptrs, mask=(channels < C_OUT)[:, None] & (columns < C_IN)[None, :], other=0.0)
        grad = tl.load(grad_ptr + source[:, None] * C_OUT + channels[None, :], mask=grad_mask, other=0.0)
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
    offset = (tl.load(cu_in_ptr + sequence) + first + phase).to(tl.int64) * C_IN
    positions = offset + rows * (STRIDE * C_IN)
    inside = rows * STRIDE + phase < left
    pointers = lower_conv_out_ptr, lower_out_ptr, grad_x_ptr
    # Store one half after the other, because the GELU of both would need more registers than there are.
    halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    column = (program // STRIDE % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _store_input_grad(halves[0], pointers, positions, inside, column, C_IN, GELU)
    _store_input_grad(halves[1], pointers, positions, inside, column + BLOCK_N // 2, C_IN, GELU)


@triton.jit
def _store_input_grad(grad, pointers, positions, inside, columns, C_IN: tl.constexpr, GELU: tl.constexpr):
    """Store a tile of the input's gradient, after the activation of the layer below if its output is given."""
    lower_conv_out_ptr, lower_out_ptr, grad_x_ptr = pointers
    positions = positions[:, None] + columns[None, :]
    mask = inside[:, None] & (columns < C_IN)[None, :]
    if lower_conv_out_ptr is not None:
        lower = tl.load(lower_conv_out_ptr + positions, mask=mask, other=0.0).to(tl.float32)
        if GELU:
            below, bell = normal_at(lower, grad_x_ptr.dtype.element_ty == tl.float32)
            grad *= gelu_derivative(lower, below, bell)
            lower *= below
        tl.store(lower_out_ptr + positions, lower.to(lower_out_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_x_ptr + positions, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sequence_of(row, cu_ptr, batch):
    """Return the number of the sequence that contains a packed row."""
    sequence = 0
    for start in range(0, batch, 128):
        index = start + tl.arange(0, 128)
        ends = tl.load(cu_ptr + 1 + index, mask=index < batch, other=0)
        sequence += tl.sum(((index < batch) & (ends <= row)).to(tl.int32))
    return sequence


@triton.jit(do_not_specialize=["batch", "total", "share"])
def _weight_grad_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    cu_in_ptr,
    cu_out_ptr,
    batch,
    total,
    share,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum gradient times window over `share` output frames, in fp32: `partial_ptr` is (shares, C_OUT, WINDOW)."""
    TILES_N: tl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = C_OUT % BLOCK_M == 0 and WINDOW % BLOCK_N == 0
    tile, part = tl.program_id(0), tl.program_id(1)
    m = (tile // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_K)
    first = part * share
    last = tl.minimum(first + share, total)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sequence in range(_sequence_of(first, cu_out_ptr, batch), _sequence_of(last - 1, cu_out_ptr, batch) + 1):
        begin = tl.load(cu_out_ptr + sequence)
        row = tl.maximum(first, begin)
        left = tl.minimum(last, tl.load(cu_out_ptr + sequence + 1)) - row
        row_in = tl.load(cu_in_ptr + sequence).to(tl.int64) + (row - begin).to(tl.int64) * STRIDE
        grad_ptrs = grad_ptr + row.to(tl.int64) * C_OUT + rows[:, None] * C_OUT + m[None, :]
        x_ptrs = x_ptr + row_in * C_IN + rows[:, None] * (STRIDE * C_IN) + n[None, :]
        for start in range(0, left, BLOCK_K):
            valid = (rows < left - start)[:, None]
            if EVEN:
                grad = tl.load(grad_ptrs, mask=valid, other=0.0)
                x = tl.load(x_ptrs, mask=valid, other=0.0)
            else:
                grad = tl.load(grad_ptrs, mask=valid & (m < C_OUT)[None, :], other=0.0)
                x = tl.load(x_ptrs, mask=valid & (n < WINDOW)[None, :], other=0.0)
            acc = tl.dot(tl.trans(grad), x, acc, input_precision=PRECISION)
            grad_ptrs += BLOCK_K * C_OUT
            x_ptrs += BLOCK_K * STRIDE * C_IN
    mask = (m < C_OUT)[:, None] & (n < WINDOW)[None, :]
    tl.store(partial_ptr + part * (C_OUT * WINDOW) + m[:, None] * WINDOW + n[None, :], acc, mask=mask)


class _Blocks(NamedTuple):
    """Tile of a matrix product (m rows, n columns, k deep), and number of warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def _blocks(x: Tensor, *, columns: int, depth: int) -> _Blocks:
    """Return the tile for (many, columns) = (many, depth) @ (depth, columns)."""
    if x.dtype != torch.float32:
        # With 96 KiB and 128 registers, two blocks share a multiprocessor: one multiplies while the other computes
        # GELU.
        return _Blocks(128, block_for(columns, 128), block_for(depth, 64), 8, 3)
    if precision_of("strided_conv", x) == "tf32":
        return _Blocks(128, block_for(columns, 128), block_for(depth, 32), 8, 3)
    return _Blocks(64, block_for(columns, 64), 16, 4, 2)


def _weight_grad_blocks(x: Tensor, *, channels: int, window: int) -> _Blocks:
    """Return the tile for (channels, window) = (channels, many) @ (many, window)."""
    if x.dtype != torch.float32:
        return _Blocks(block_for(channels, 128), block_for(window, 256), 64, 8, 3)
    if precision_of("strided_conv", x) == "tf32":
        return _Blocks(block_for(channels, 128), block_for(window, 128), 32, 8, 3)
    return _Blocks(block_for(channels, 64), block_for(window, 64), 16, 4, 2)


def _as_matrix(weight: Tensor) -> Tensor:
    """Reorder a weight (C_out, C_in, K) to (C_out, K * C_in), the memory order of a window."""
    return weight.permute(0, 2, 1).flatten(1).contiguous()


def _convolve(
    layer: LayerPlan,
    x: Tensor,  # (N, C_in)
    *,
    keep: bool,
    activate: bool,
) -> tuple[Tensor, Tensor]:  # (N_out, C_out), (N_out, C_out)
    """Return the convolution's output if `keep`, and its activation if `activate`; an unwanted one is (0, C_out)."""
    conv_out, out = (x.new_empty((layer.total if made else 0, layer.channels)) for made in (keep, activate))
    blocks = _blocks(x, columns=layer.channels, depth=layer.window)
    tiles = (layer.total // blocks.m + layer.batch) * triton.cdiv(layer.channels, blocks.n)
    _forward_kernel[(tiles,)](
        x,
        _as_matrix(layer.weight),
        layer.bias,
        conv_out if keep else None,
        out if activate else None,
        layer.cu_in,
        layer.cu_out,
        layer.batch,
        C_IN=x.shape[1],
        C_OUT=layer.channels,
        WINDOW=layer.window,
        STRIDE=layer.stride,
        GELU=layer.activation == "gelu",
        PRECISION=precision_of("strided_conv", x),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return conv_out, out


def _forward(layer: LayerPlan, x: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, convolution output (empty unless `keep`) and statistics of one layer."""
    nothing = x.new_empty((0, layer.channels))
    statistics = layer.new_statistics(x)
    if layer.total == 0:
        return nothing, nothing.clone(), statistics
    windows = has_windows(layer)
    if layer.norm == "none" and not windows:
        conv_out, out = _convolve(layer, x, keep=keep, activate=True)
        return out, conv_out, statistics
    conv_out = nothing if windows else _convolve(layer, x, keep=True, activate=False)[0]
    frames = x if windows else conv_out
    if layer.norm == "group":
        statistics = group_statistics(layer, frames, windows=windows)
    out = activate(layer, frames, statistics, windows=windows)
    return out, conv_out if keep else nothing, statistics


def _input_grad(
    layer: LayerPlan,
    grad_conv: Tensor,  # (N_out, C_out)
    rows: int,
    lower: LayerPlan | None = None,
    conv_out: Tensor | None = None,  # (N, C_in)
) -> tuple[Tensor, Tensor | None]:  # (N, C_in), (N, C_in)
    """Return the gradient of the layer's input, and None.

    If `conv_out` of the `lower` layer is given, return the gradient of `conv_out`, and the layer's recomputed input.
    """
    c_in = layer.weight.shape[1]
    grad_x = grad_conv.new_empty((rows, c_in))
    lower_out = None if conv_out is None else torch.empty_like(grad_x)
    blocks = _blocks(grad_conv, columns=c_in, depth=layer.channels)
    tiles = (rows // (layer.stride * blocks.m) + layer.batch) * triton.cdiv(c_in, blocks.n) * layer.stride
    _input_grad_kernel[(tiles,)](
        grad_conv,
        _as_matrix(layer.weight),
        conv_out,
        lower_out,
        grad_x,
        layer.cu_in,
        layer.cu_out,
        layer.batch,
        C_IN=c_in,
        C_OUT=layer.channels,
        KERNEL=layer.weight.shape[2],
        STRIDE=layer.stride,
        GELU=lower is not None and lower.activation == "gelu",
        PRECISION=precision_of("strided_conv", grad_conv),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return grad_x, lower_out


def _weight_grad(
    layer: LayerPlan,
    x: Tensor,  # (N, C_in)
    grad_conv: Tensor,  # (N_out, C_out)
) -> Tensor:  # (C_out, C_in, K)
    """Return the weight's gradient: a kernel sums blocks of frames, then PyTorch adds these sums in a fixed order."""
    blocks = _weight_grad_blocks(x, channels=layer.channels, window=layer.window)
    tiles = triton.cdiv(layer.channels, blocks.m) * triton.cdiv(layer.window, blocks.n)
    share = max(8 * blocks.k, triton.cdiv(layer.total, max(1, _PROGRAMS // tiles)))
    shares = triton.cdiv(layer.total, share)
    partial_sums = x.new_empty((shares, layer.channels, layer.window), dtype=torch.float32)
    _weight_grad_kernel[tiles, shares](
        grad_conv,
        x,
        partial_sums,
        layer.cu_in,
        layer.cu_out,
        layer.batch,
        layer.total,
        share,
        C_IN=x.shape[1],
        C_OUT=layer.channels,
        WINDOW=layer.window,
        STRIDE=layer.stride,
        PRECISION=precision_of("strided_conv", x),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    c_out, c_in, kernel = layer.weight.shape
    return partial_sums.sum(0).view(c_out, kernel, c_in).permute(0, 2, 1)


def strided_conv_fwd(
    x: Tensor,  # (N, C_in)
    save: bool,
    *lists: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # (N_out, C_out)
    """Return the stack's output, and each layer's convolution output (if kept) and group norm statistics."""
    conv_outs, statistics = [], []
    with torch.cuda.device_of(x):
        for layer in plan_layers(*lists):
            x, conv_out, statistic = _forward(layer, x, keep=save and layer.is_kept)
            conv_outs.append(conv_out)
            statistics.append(statistic)
    return x, conv_outs, statistics


def strided_conv_bwd(
    grad_out: Tensor,  # (N_out, C_out)
    x: Tensor,  # (N, C_in)
    conv_outs: list[Tensor],  # (N_l, C_l) or (0, C_l)
    statistics: list[Tensor],  # (2, B, C_l)
    needs_grad_x: bool,
    *lists: Any,
) -> tuple[Tensor | list[Tensor], ...]:
    """Return the gradients of `x`, weights, biases, norm weights and norm biases; (0,) for a parameter that is None."""
    layers = plan_layers(*lists)
    grad_x, grads = x.new_zeros((len(x) if needs_grad_x else 0, x.shape[1])), [RowGradients() for _ in layers]
    if layers[-1].total > 0:
        with torch.cuda.device_of(x):
            grads = _backward(layers, grad_out, x, conv_outs, statistics, windows=not needs_grad_x)
            if needs_grad_x and grads[0].conv_out is not None:
                grad_x, _ = _input_grad(layers[0], grads[0].conv_out, len(x))
    pairs = zip(layers, grads, strict=True)
    by_layer = (map(partial(_like, x), layer.parameters, grad.parameters) for layer, grad in pairs)
    return grad_x, *map(list, zip(*by_layer, strict=True))


def _like(x: Tensor, parameter: Tensor | None, grad: Tensor | None) -> Tensor:
    """Copy a gradient to its parameter's shape and dtype; zeros if `grad` is None, (0,) if `parameter` is None."""
    if parameter is None:
        return x.new_empty(0)
    return torch.zeros_like(parameter) if grad is None else torch.empty_like(parameter).copy_(grad)


def _backward(
    layers: Sequence[LayerPlan],
    grad_out: Tensor,  # (N_out, C_out)
    x: Tensor,  # (N, C_in)
    conv_outs: Sequence[Tensor],
    statistics: Sequence[Tensor],
    *,
    windows: bool,
) -> list[RowGradients]:
    """Return the gradients of each layer's parameters, and of the first convolution's output unless it uses windows."""

    def through(i: int, grad: Tensor) -> RowGradients:
        """Run the backward of layer i from its output to its convolution's output."""
        layer, last = layers[i], i + 1 == len(layers)
        if windows and has_windows(layer):
            return activate_backward(layer, x, statistics[i], grad, windows=True, keep_activated=not last)
        product = conv_outs[i] if layer.is_kept else _convolve(layer, x, keep=True, activate=False)[0]
        return activate_backward(layer, product, statistics[i], grad, windows=False, keep_activated=not last)

    grads, row = [], through(len(layers) - 1, grad_out)
    for i in reversed(range(1, len(layers))):
        layer, below, grad_conv = layers[i], layers[i - 1], row.conv_out
        assert grad_conv is not None
        if below.norm == "none" and below.bias is None and below.is_kept:
            row_below = RowGradients(*_input_grad(layer, grad_conv, below.total, below, conv_outs[i - 1]))
        else:
            row_below = through(i - 1, _input_grad(layer, grad_conv, below.total)[0])
        assert row_below.activated is not None
        weight = _weight_grad(layer, row_below.activated, grad_conv)
        grads.append(row._replace(conv_out=None, activated=None, weight=weight))
        row = row_below
    if row.conv_out is not None:
        row = row._replace(activated=None, weight=_weight_grad(layers[0], x, row.conv_out))
    return [row, *reversed(grads)]


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Return calls by label; tests/ops/ahead_of_time.py compiles the kernels that each call would launch."""
    cases: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for norm in ("group", "layer"):
            cases[f"front end, {norm} norm, {dtype}".replace("torch.", "")] = partial(
                _forward_and_backward, dtype, norm, (1, 512, 512, 512), (10, 3, 2), (5, 2, 2), False
            )
        # The longest window and most channels that are computed from windows under layer norm, and twice the channels.
        for channels in (512, 1024):
            cases[f"layer norm, K=31, {channels} channels, {dtype}".replace("torch.", "")] = partial(
                _forward_and_backward, dtype, "layer", (1, channels), (31,), (5,), False
            )
    cases["group norm everywhere, bfloat16"] = partial(
        _forward_and_backward, torch.bfloat16, "groups", (512, 512, 512), (3, 3), (2, 2), True
    )
    cases["odd sizes, bfloat16"] = partial(
        _forward_and_backward, torch.bfloat16, "layer", (5, 100, 7), (3, 2), (1, 3), True
    )
    cases["odd sizes, float32"] = partial(
        _forward_and_backward, torch.float32, "groups", (5, 100, 7), (3, 2), (1, 3), True
    )
    # Parameters are fp32 under autocast, and 16-bit in an encoder that is 16-bit as a whole.
    float32, halves = torch.float32, (torch.bfloat16, torch.float16)
    for dtype, vectors in (*((dtype, float32) for dtype in (*halves, float32)), *((dtype, dtype) for dtype in halves)):
        for norm in ("group", "layer"):
            label = f"front end, {norm} norm, {dtype}, biases in {vectors}".replace("torch.", "")
            cases[label] = partial(
                _forward_and_backward, dtype, norm, (1, 512, 512), (10, 3), (5, 2), False, vectors, biased=True
            )
    for dtype in halves:
        label = f"front end, group norm in {dtype}".replace("torch.", "")
        cases[label] = partial(_forward_and_backward, dtype, "group", (1, 512), (10,), (5,), False, dtype, biased=False)
    for dtype in (*halves, float32):
        cases[f"front end, layer norm, {dtype}, no biases".replace("torch.", "")] = partial(
            _forward_and_backward, dtype, "layer", (1, 512, 512, 512), (10, 3, 2), (5, 2, 2), False, biased=False
        )
        cases[f"mel frames, {dtype}".replace("torch.", "")] = partial(
            _forward_and_backward, dtype, "none", (80, 512, 512), (3, 3), (2, 2), False
        )
        # If the waveform has a gradient, as in `fastssl check`, the first layer is not computed from windows.
        for norm in ("group", "layer"):
            label = f"front end with a gradient of the waveform, {norm} norm in {dtype}".replace("torch.", "")
            cases[label] = partial(
                _forward_and_backward, dtype, norm, (1, 512, 512), (10, 3), (5, 2), True, vectors_dtype=dtype
            )
    return cases


def _forward_and_backward(
    dtype: torch.dtype,
    norm: str,
    channels: tuple[int, ...],
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    needs_grad_x: bool,
    vectors_dtype: torch.dtype = torch.float32,
    biased: bool | None = None,
) -> None:
    """Launch all kernels of a stack, also as they run without a backward; biases and norms have `vectors_dtype`.

    With `biased` None, convolutions have biases unless the norm is "group", as in published models.
    """
    x = torch.zeros(16000, channels[0], dtype=dtype)
    lengths, weights = [len(x)], []
    for c_in, c_out, kernel, stride in zip(channels[:-1], channels[1:], kernels, strides, strict=True):
        weights.append(torch.zeros(c_out, c_in, kernel, dtype=dtype))
        lengths.append((lengths[-1] - kernel) // stride + 1)
    norms = {
        "group": ["group"] + ["none"] * (len(weights) - 1),
        "layer": ["layer"] * len(weights),
        "groups": ["group"] * len(weights),
        "none": ["none"] * len(weights),
    }[norm]
    vectors = [torch.zeros(len(weight), dtype=vectors_dtype) for weight in weights]
    biased = norm != "group" if biased is None else biased
    biases = [vector if biased else None for vector in vectors]
    norm_parameters = [None if name == "none" else vector for name, vector in zip(norms, vectors, strict=True)]
    count = len(weights)
    lists: list[Any] = [
        [torch.tensor([0, length], dtype=torch.int32) for length in lengths],
        weights,
        biases,
        norm_parameters,
        norm_parameters,
        lengths[1:],
        list(strides),
        norms,
        [1e-5] * count,
        ["gelu"] * count,
    ]
    strided_conv_fwd(x, False, *lists)
    out, conv_outs, statistics = strided_conv_fwd(x, True, *lists)
    strided_conv_bwd(out, x, conv_outs, statistics, needs_grad_x, *lists)
