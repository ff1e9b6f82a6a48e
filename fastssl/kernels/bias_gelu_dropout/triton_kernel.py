"""Triton kernels of `bias_gelu_dropout`. A tile is a block of frames by a block of channels, read and written once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.gelu_triton import gelu_derivative, normal_at
from fastssl.kernels.philox_triton import keep_mask
from fastssl.kernels.randomness import RANDOMNESS, dropout_threshold, kept_fraction

#: Arguments that change from call to call. Triton must not specialise on them, or it would recompile for new values.
_CHANGING = ["rows", "rows_per_program", "offset", "threshold"]
#: The backward pass splits the rows into at most this many shares. Each has a partial sum of the bias's gradient.
_MAX_SHARES = 128


@triton.jit
def _load_bias(bias_ptr, columns, in_width, HAS_BIAS: tl.constexpr):
    """Load some columns of the bias as (1, columns); zeros if there is no bias."""
    if HAS_BIAS:
        return tl.load(bias_ptr + columns, mask=in_width, other=0)[None, :]
    return tl.zeros_like(columns).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=_CHANGING)
def _forward_kernel(
    x_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    rows,
    offset,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANDOMNESS: tl.constexpr,
):
    """Compute one tile of dropout(GELU(x + bias)). RANDOMNESS is its version, 0 without dropout."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = tl.program_id(1) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
    in_width = columns < WIDTH
    inside = (row < rows)[:, None] & in_width[None, :]
    index = row[:, None] * WIDTH + columns[None, :]
    x = tl.load(x_ptr + index, mask=inside, other=0).to(tl.float32)
    x += _load_bias(bias_ptr, columns, in_width, HAS_BIAS)
    below, _ = normal_at(x, x_ptr.dtype.element_ty == tl.float32)
    out = x * below
    if RANDOMNESS:
        keep = keep_mask(seed_ptr, offset, row * WIDTH + first_column, threshold, BLOCK_D, WIDTH, RANDOMNESS)
        out = tl.where(keep, out * keep_scale, 0.0)
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def _backward_kernel(
    grad_out_ptr,
    x_ptr,
    bias_ptr,
    seed_ptr,
    grad_x_ptr,
    partial_bias_ptr,
    rows,
    rows_per_program,
    offset,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANDOMNESS: tl.constexpr,
):
    """Compute the gradient of x for a share of the rows and BLOCK_D columns; sum it over these rows for the bias."""
    share = tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
    in_width = columns < WIDTH
    bias = _load_bias(bias_ptr, columns, in_width, HAS_BIAS)
    grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    begin = share.to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for step in range(0, rows_per_program, BLOCK_N):
        row = begin + step + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & in_width[None, :]
        index = row[:, None] * WIDTH + columns[None, :]
        grad = tl.load(grad_out_ptr + index, mask=inside, other=0).to(tl.float32)
        if RANDOMNESS:
            keep = keep_mask(seed_ptr, offset, row * WIDTH + first_column, threshold, BLOCK_D, WIDTH, RANDOMNESS)
            grad = tl.where(keep, grad * keep_scale, 0.0)
        x = tl.load(x_ptr + index, mask=inside, other=0).to(tl.float32) + bias
        below, bell = normal_at(x, x_ptr.dtype.element_ty == tl.float32)
        grad *= gelu_derivative(x, below, bell)
        tl.store(grad_x_ptr + index, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            grad_bias += tl.sum(grad, 0)
    if HAS_BIAS:
        tl.store(partial_bias_ptr + share.to(tl.int64) * WIDTH + columns, grad_bias, mask=in_width)


class _Blocks(NamedTuple):
    """Rows and columns of a tile, and warps per program."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int


def _blocks(width: int) -> _Blocks:
    """Return a tile of 2048 elements, 16 per thread."""
    block_d = min(max(triton.next_power_of_2(width), 16), 256)
    return _Blocks(2048 // block_d, block_d, 4)


def bias_gelu_dropout_fwd(
    x: Tensor,  # (N, D)
    bias: Tensor | None,  # (D,)
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
) -> Tensor:
    """Return dropout(GELU(x + bias)), (N, D) in the dtype of `x`. Arguments are contiguous."""
    rows, width = x.shape
    out = torch.empty_like(x)
    blocks = _blocks(width)
    if out.numel() > 0:
        with torch.cuda.device_of(x):
            _forward_kernel[triton.cdiv(rows, blocks.BLOCK_N), triton.cdiv(width, blocks.BLOCK_D)](
                x,
                bias,
                seed,
                out,
                rows,
                offset,
                dropout_threshold(dropout_p, randomness),
                1 / kept_fraction(dropout_p, randomness),
                WIDTH=width,
                HAS_BIAS=bias is not None,
                RANDOMNESS=0 if seed is None else randomness,
                **blocks._asdict(),
            )
    return out


def bias_gelu_dropout_bwd(
    grad_out: Tensor,  # (N, D)
    x: Tensor,  # (N, D)
    bias: Tensor | None,  # (D,)
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and `bias` (empty if it is None). Arguments are contiguous."""
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    blocks = _blocks(width)
    # Give every share the same number of whole tiles.
    tiles = triton.cdiv(rows, blocks.BLOCK_N)
    rows_per_program = max(triton.cdiv(tiles, _MAX_SHARES), 1) * blocks.BLOCK_N
    shares = triton.cdiv(rows, rows_per_program)
    partial_bias = x.new_empty(0) if bias is None else bias.new_empty(shares, width)
    if grad_x.numel() > 0:
        with torch.cuda.device_of(x):
            _backward_kernel[shares, triton.cdiv(width, blocks.BLOCK_D)](
                grad_out,
                x,
                bias,
                seed,
                grad_x,
                partial_bias,
                rows,
                rows_per_program,
                offset,
                dropout_threshold(dropout_p, randomness),
                1 / kept_fraction(dropout_p, randomness),
                WIDTH=width,
                HAS_BIAS=bias is not None,
                RANDOMNESS=0 if seed is None else randomness,
                **blocks._asdict(),
            )
    return grad_x, partial_bias if bias is None else partial_bias.sum(0)


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Return calls by label; tests/ops/ahead_of_time.py compiles the kernels that each call would launch."""

    def call(width: int, dtype: torch.dtype, *, dropout: bool, with_bias: bool, randomness: int = RANDOMNESS) -> None:
        x = torch.empty(1000, width, dtype=dtype)
        bias = torch.empty(width) if with_bias else None
        dropout_p, seed = (0.1, torch.tensor(0)) if dropout else (0.0, None)
        bias_gelu_dropout_fwd(x, bias, dropout_p, randomness, seed, 0)
        bias_gelu_dropout_bwd(x, x, bias, dropout_p, randomness, seed, 0)

    cases: dict[str, Callable[[], object]] = {}
    for width in (3072, 194):
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for with_bias in (True, False):
                for dropout in (True, False):
                    label = f"D={width}, {dtype}{', bias' * with_bias}{', dropout' * dropout}".replace("torch.", "")
                    cases[label] = partial(call, width, dtype, dropout=dropout, with_bias=with_bias)
    cases["D=3072, bfloat16, bias, dropout of version 1"] = partial(
        call, 3072, torch.bfloat16, dropout=True, with_bias=True, randomness=1
    )
    return cases
