"""Triton kernels of `strided_conv`: convolution of packed frames as a matrix product whose rows overlap.

With channels last, the K input frames of an output frame are K * C_in contiguous numbers, so no window is ever copied.
Norm, activation and the first layer are in triton_rows.py; README.md has the formulas and what is kept.

A tile holds output frames of one sequence, counted from its beginning: where it reads is arithmetic, not a table, and
the host knows nothing of the lengths.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.ops.strided_conv.triton_rows import (
    Layer,
    RowGradients,
    activate,
    activate_backward,
    block_of,
    gelu_derivative,
    group_statistics,
    normal_at,
)

#: The weight gradient is cut into about so many programs: two for each of the 132 multiprocessors of an H200.
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
    """Frames times `weight_ptr` (C_OUT, WINDOW), and what bias and GELU make of them."""
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = WINDOW % BLOCK_K == 0 and C_OUT % BLOCK_N == 0
    program = tl.program_id(0)
    sequence, first, left = block_of(program // TILES_N, cu_out_ptr, batch, BLOCK_M)
    if left <= 0:
        return
    rows = tl.arange(0, BLOCK_M)
    columns = (program % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows behind the end read the last frame again rather than what lies there.
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
    # The backward knows the rounded product, so the activation is that of the rounded product.
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
    """Each input frame gathers from the output frames that saw it.

    A tile holds frames p = q * STRIDE + phase of one phase. Those were seen by taps phase, phase + STRIDE, ... of
    frames q, q - 1, ..., again contiguous numbers. Where the layer below is a convolution and GELU alone, what it had
    before GELU is at `lower_conv_out_ptr`: the gradient goes through that GELU, whose output is written again.
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
    # By halves, which a thread has in its registers, so that what the GELU needs fits beside them.
    halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    column = (program // STRIDE % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _store_input_grad(halves[0], pointers, positions, inside, column, C_IN, GELU)
    _store_input_grad(halves[1], pointers, positions, inside, column + BLOCK_N // 2, C_IN, GELU)


@triton.jit
def _store_input_grad(grad, pointers, positions, inside, columns, C_IN: tl.constexpr, GELU: tl.constexpr):
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
    """The sequence that a row lies in."""
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
    """Sum of gradient times window over `share` output frames, in fp32: `partial_ptr` (shares, C_OUT, WINDOW)."""
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
    """Tile of a matrix product, warps and stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def _precision(dtype: torch.dtype) -> str:
    """How products of fp32 numbers are made: TF32 where torch was told that it may, exactly otherwise."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _blocks(dtype: torch.dtype, precision: str, *, columns: int, depth: int) -> _Blocks:
    """Tile for (many, columns) = (many, depth) @ (depth, columns)."""
    n, k = (max(16, triton.next_power_of_2(size)) for size in (columns, depth))
    if dtype != torch.float32:
        # 96 KiB: two blocks to a multiprocessor, one of which multiplies while the other is at its GELU.
        return _Blocks(128, min(128, n), min(64, k), 8, 3)
    if precision == "tf32":
        return _Blocks(128, min(128, n), min(32, k), 4, 3)
    return _Blocks(64, min(64, n), 16, 4, 2)


def _weight_grad_blocks(dtype: torch.dtype, precision: str, *, channels: int, window: int) -> _Blocks:
    m, n = (max(16, triton.next_power_of_2(size)) for size in (channels, window))
    if dtype != torch.float32:
        return _Blocks(min(128, m), min(256, n), 64, 8, 3)
    if precision == "tf32":
        return _Blocks(min(128, m), min(128, n), 32, 4, 3)
    return _Blocks(min(64, m), min(64, n), 16, 4, 2)


def _as_matrix(weight: Tensor) -> Tensor:
    """(C_out, C_in, K) to (C_out, K * C_in): the order in which the input lies in memory."""
    return weight.permute(0, 2, 1).flatten(1).contiguous()


def _convolve(layer: Layer, x: Tensor, precision: str, *, conv_out: Tensor | None, out: Tensor | None) -> None:
    blocks = _blocks(x.dtype, precision, columns=layer.channels, depth=layer.window)
    tiles = (layer.total // blocks.m + layer.batch) * triton.cdiv(layer.channels, blocks.n)
    _forward_kernel[(tiles,)](
        x,
        _as_matrix(layer.weight),
        layer.bias,
        conv_out,
        out,
        layer.cu_in,
        layer.cu_out,
        layer.batch,
        C_IN=x.shape[1],
        C_OUT=layer.channels,
        WINDOW=layer.window,
        STRIDE=layer.stride,
        GELU=layer.gelu,
        PRECISION=precision,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _forward(layer: Layer, x: Tensor, *, save: bool, first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, product and statistics of one layer; what is not kept is empty."""
    kept = save and not (first and x.shape[1] == 1)
    nothing = x.new_empty((0, layer.channels))
    statistics = x.new_empty((2, layer.batch, layer.channels) if layer.norm == "group" else 0, dtype=torch.float32)
    if layer.total == 0:
        return nothing, nothing, statistics.zero_()
    precision, windows = _precision(x.dtype), first and layer.has_windows
    conv_out = x.new_empty((layer.total, layer.channels)) if not windows and (kept or layer.norm != "none") else None
    if layer.norm == "none" and not windows:
        out = x.new_empty((layer.total, layer.channels))
        _convolve(layer, x, precision, conv_out=conv_out, out=out)
    else:
        frames = x
        if conv_out is not None:
            _convolve(layer, x, precision, conv_out=conv_out, out=None)
            frames = conv_out
        if layer.norm == "group":
            statistics = group_statistics(layer, frames, windows=windows)
        out = activate(layer, frames, statistics, windows=windows, precision=precision)
    return out, conv_out if kept and conv_out is not None else nothing, statistics


def _input_grad(
    layer: Layer,
    grad_conv: Tensor,  # (N_out, C_out)
    rows: int,
    precision: str,
    *,
    lower: Layer | None = None,
    conv_out: Tensor | None = None,  # (N, C_in)
) -> tuple[Tensor, Tensor | None]:  # (N, C_in), (N, C_in)
    """Gradient of the layer's input; with `conv_out` of the lower layer the gradient of that, and the input again."""
    c_in = layer.weight.shape[1]
    grad_x = grad_conv.new_empty((rows, c_in))
    lower_out = None if conv_out is None else torch.empty_like(grad_x)
    blocks = _blocks(grad_conv.dtype, precision, columns=c_in, depth=layer.channels)
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
        GELU=lower is not None and lower.gelu,
        PRECISION=precision,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return grad_x, lower_out


def _weight_grad(layer: Layer, x: Tensor, grad_conv: Tensor, precision: str) -> Tensor:
    """Shares of the frames in one kernel, and their sum in another: the order of additions is fixed."""
    blocks = _weight_grad_blocks(x.dtype, precision, channels=layer.channels, window=layer.window)
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
        PRECISION=precision,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    c_out, c_in, kernel = layer.weight.shape
    return partial_sums.sum(0).view(c_out, kernel, c_in).permute(0, 2, 1)


def _stack(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weights: Sequence[Tensor | None],
    norm_biases: Sequence[Tensor | None],
    cu_seqlens: Sequence[Tensor],
    totals: Sequence[int],
    strides: Sequence[int],
    norms: Sequence[str],
    eps: Sequence[float],
    activations: Sequence[str],
) -> list[Layer]:
    return [
        Layer(
            weights[i].contiguous(),
            biases[i],
            norm_weights[i],
            norm_biases[i],
            strides[i],
            norms[i],
            eps[i],
            activations[i] == "gelu",
            cu_seqlens[i],
            cu_seqlens[i + 1],
            totals[i],
        )
        for i in range(len(weights))
    ]


def strided_conv_fwd(
    x: Tensor,  # (N, C_in)
    weights: list[Tensor],  # L of (C_out, C_in, K)
    biases: list[Tensor | None],  # L of (C_out,)
    norm_weights: list[Tensor | None],  # L of (C_out,)
    norm_biases: list[Tensor | None],  # L of (C_out,)
    cu_seqlens: list[Tensor],  # L + 1 of (B + 1,)
    totals: list[int],
    max_lengths: list[int],
    strides: list[int],
    norms: list[str],
    eps: list[float],
    activations: list[str],
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output of the stack, and for the backward each layer's product (or nothing) and group norm statistics."""
    layers = _stack(weights, biases, norm_weights, norm_biases, cu_seqlens, totals, strides, norms, eps, activations)
    conv_outs, statistics = [], []
    for i, layer in enumerate(layers):
        x, conv_out, statistic = _forward(layer, x, save=save, first=i == 0)
        conv_outs.append(conv_out)
        statistics.append(statistic)
    return x, conv_outs, statistics


def strided_conv_bwd(
    grad_out: Tensor,  # (N_out, C_out)
    x: Tensor,  # (N, C_in)
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
    """Gradients of x, weights, biases, norm weights and norm biases; (0,) for a parameter that is absent."""
    layers = _stack(weights, biases, norm_weights, norm_biases, cu_seqlens, totals, strides, norms, eps, activations)
    precision = _precision(x.dtype)
    grad_x = x.new_zeros((len(x) if needs_grad_x else 0, x.shape[1]))
    grad_weights = [torch.zeros_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    rows = [RowGradients() for _ in layers]
    if totals[-1] == 0:
        return grad_x, grad_weights, *_parameter_gradients(layers, rows)
    grad, grad_conv, is_through = grad_out, grad_out, False
    for i in reversed(range(len(layers))):
        layer = layers[i]
        if not is_through:
            windows = i == 0 and layer.has_windows and not needs_grad_x
            frames = x if windows else conv_outs[i]
            if i == 0 and x.shape[1] == 1 and not windows:
                frames = x.new_empty((layer.total, layer.channels))
                _convolve(layer, x, precision, conv_out=frames, out=None)
            rows[i] = activate_backward(
                layer,
                frames,
                statistics[i],
                grad,
                windows=windows,
                precision=precision,
                keep_activated=i + 1 < len(layers),
            )
        if rows[i].activated is not None:
            grad_weights[i + 1] = _weight_grad(layers[i + 1], rows[i].activated, grad_conv, precision)
        grad_conv = rows[i].conv_out
        if i > 0:
            below = layers[i - 1]
            is_through = below.norm == "none" and below.bias is None and (i > 1 or x.shape[1] > 1)
            grad, activated = _input_grad(
                layer, grad_conv, below.total, precision, lower=below, conv_out=conv_outs[i - 1] if is_through else None
            )
            if is_through:
                rows[i - 1] = RowGradients(grad, activated)
    if rows[0].weight is not None:
        grad_weights[0] = rows[0].weight
    else:
        grad_weights[0] = _weight_grad(layers[0], x, grad_conv, precision)
    if needs_grad_x:
        grad_x, _ = _input_grad(layers[0], grad_conv, len(x), precision)
    grad_weights = [grad.to(x.dtype).contiguous() for grad in grad_weights]
    return grad_x, grad_weights, *_parameter_gradients(layers, rows)


def _parameter_gradients(
    layers: Sequence[Layer], rows: Sequence[RowGradients]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of biases, norm weights and norm biases, in the dtype of each."""

    def like(parameter: Tensor | None, grad: Tensor | None, weight: Tensor) -> Tensor:
        if parameter is None:
            return weight.new_empty(0)
        return torch.zeros_like(parameter) if grad is None else grad.to(parameter.dtype, copy=True)

    pairs = list(zip(layers, rows, strict=True))
    return (
        [like(layer.bias, row.bias, layer.weight) for layer, row in pairs],
        [like(layer.norm_weight, row.norm_weight, layer.weight) for layer, row in pairs],
        [like(layer.norm_bias, row.norm_bias, layer.weight) for layer, row in pairs],
    )


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Label -> a call for tests/ops/ahead_of_time.py, which compiles what it would launch."""
    cases: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for norm in ("group", "layer"):
            cases[f"front end, {norm} norm, {dtype}".replace("torch.", "")] = partial(
                _forward_and_backward, dtype, norm, (1, 512, 512, 512), (10, 3, 2), (5, 2, 2), False
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
    return cases


def _forward_and_backward(
    dtype: torch.dtype,
    norm: str,
    channels: tuple[int, ...],
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    needs_grad_x: bool,
) -> None:
    x = torch.zeros(16000, channels[0], dtype=dtype)
    lengths, weights = [len(x)], []
    for c_in, c_out, kernel, stride in zip(channels[:-1], channels[1:], kernels, strides, strict=True):
        weights.append(torch.zeros(c_out, c_in, kernel, dtype=dtype))
        lengths.append((lengths[-1] - kernel) // stride + 1)
    norms = {
        "group": ["group"] + ["none"] * (len(weights) - 1),
        "layer": ["layer"] * len(weights),
        "groups": ["group"] * len(weights),
    }[norm]
    vectors = [torch.zeros(len(weight)) for weight in weights]
    biases = [None if norm == "group" else vector for vector in vectors]
    norm_parameters = [None if name == "none" else vector for name, vector in zip(norms, vectors, strict=True)]
    parameters = weights, biases, norm_parameters, norm_parameters
    count = len(weights)
    geometry = (
        [torch.tensor([0, length], dtype=torch.int32) for length in lengths],
        lengths[1:],
        lengths[1:],
        list(strides),
        norms,
        [1e-5] * count,
        ["gelu"] * count,
    )
    out, conv_outs, statistics = strided_conv_fwd(x, *parameters, *geometry, True)
    strided_conv_bwd(out, x, *parameters, conv_outs, statistics, *geometry, needs_grad_x)
