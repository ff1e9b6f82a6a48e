"""Triton kernels of `dropout_add_layer_norm`. A row is read once, stays in registers, and is written once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.philox_triton import keep_mask
from fastssl.kernels.randomness import RANDOMNESS, dropout_threshold, kept_fraction

#: Arguments that change from call to call. Triton must not specialise on them, or it would recompile for new values.
_CHANGING = ["rows", "rows_per_program", "offset", "threshold"]
#: Largest number of programs in the backward pass; each computes a partial sum of the parameters' gradients.
_MAX_PROGRAMS = 1024


@triton.jit
def _sum_of_branches(
    x_ptr, residual_ptr, index, inside, keep, keep_scale, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr
):
    """Load residual + dropout(x) in fp32; without a residual, `x_ptr` points to the sum itself."""
    x = tl.load(x_ptr + index, mask=inside, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        if DROPOUT:
            x = tl.where(keep, x * keep_scale, 0.0)
        x += tl.load(residual_ptr + index, mask=inside, other=0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=_CHANGING)
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    offset,
    threshold,
    keep_scale,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRENORM: tl.constexpr,
    RANDOMNESS: tl.constexpr,
):
    """Compute the sum, its mean and 1 / standard deviation, and the normalised sum for BLOCK_N rows.

    RANDOMNESS is the version of the dropout's draws, 0 without dropout.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    in_width = columns < WIDTH
    inside = (row < rows)[:, None] & in_width[None, :]
    index = row[:, None] * WIDTH + columns[None, :]
    keep = inside
    if RANDOMNESS:
        keep = keep_mask(seed_ptr, offset, row * WIDTH, threshold, BLOCK_D, WIDTH, RANDOMNESS)
    total = _sum_of_branches(x_ptr, residual_ptr, index, inside, keep, keep_scale, True, RANDOMNESS != 0)
    if PRENORM:
        rounded = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + index, rounded, mask=inside)
        total = rounded.to(tl.float32)
    mean = tl.sum(total, 1) / WIDTH
    centred = tl.where(inside, total - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=in_width, other=0)
    bias = tl.load(bias_ptr + columns, mask=in_width, other=0)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=_CHANGING)
def _backward_kernel(
    grad_out_ptr,
    grad_sum_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    rows,
    rows_per_program,
    offset,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRENORM: tl.constexpr,
    RANDOMNESS: tl.constexpr,
):
    """Compute the gradients of x and residual for a range of rows, and their part of the parameters' gradients."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    in_width = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=in_width, other=0)[None, :]
    grad_weight = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    begin = program.to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for step in range(0, rows_per_program, BLOCK_N):
        row = begin + step + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & in_width[None, :]
        index = row[:, None] * WIDTH + columns[None, :]
        keep = inside
        if RANDOMNESS:
            keep = keep_mask(seed_ptr, offset, row * WIDTH, threshold, BLOCK_D, WIDTH, RANDOMNESS)
        total = _sum_of_branches(x_ptr, residual_ptr, index, inside, keep, keep_scale, not PRENORM, RANDOMNESS != 0)
        mean = tl.load(mean_ptr + row, mask=row < end, other=0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < end, other=0)[:, None]
        normalised = tl.where(inside, (total - mean) * rstd, 0.0)
        grad = tl.load(grad_out_ptr + index, mask=inside, other=0).to(tl.float32)
        grad_weight += tl.sum(grad * normalised, 0)
        grad_bias += tl.sum(grad, 0)
        grad *= weight
        mean_grad = (tl.sum(grad, 1) / WIDTH)[:, None]
        mean_product = (tl.sum(grad * normalised, 1) / WIDTH)[:, None]
        grad = (grad - mean_grad - normalised * mean_product) * rstd
        if WIDTH == 1:  # the norm is constant; a fused multiply-add would leave the rounding of a product here
            grad = tl.zeros_like(grad)
        if PRENORM:
            grad += tl.load(grad_sum_ptr + index, mask=inside, other=0).to(tl.float32)
        tl.store(grad_residual_ptr + index, grad.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        if RANDOMNESS:
            grad = tl.where(keep, grad * keep_scale, 0.0)
            tl.store(grad_x_ptr + index, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    place = program.to(tl.int64) * WIDTH + columns
    tl.store(partial_weight_ptr + place, grad_weight, mask=in_width)
    tl.store(partial_bias_ptr + place, grad_bias, mask=in_width)


class _Blocks(NamedTuple):
    """Rows and columns of a tile, and warps per program."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int


def _blocks(width: int) -> _Blocks:
    """Return a tile of whole rows with about 2048 elements, 16 per thread."""
    block_d = max(triton.next_power_of_2(width), 16)
    return _Blocks(max(1, 2048 // block_d), block_d, min(max(block_d // 512, 4), 16))


def dropout_add_layer_norm_fwd(
    x: Tensor,  # (N, D)
    residual: Tensor,  # (N, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
    prenorm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalised sum, the sum (empty without `prenorm`), and each row's mean and 1 / standard deviation."""
    rows, width = x.shape
    out = torch.empty_like(residual)
    total = residual.new_empty(x.shape if prenorm else 0)
    mean, rstd = weight.new_empty(rows), weight.new_empty(rows)
    blocks = _blocks(width)
    if rows > 0:
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(rows, blocks.BLOCK_N),)](
                x,
                residual,
                weight,
                bias,
                seed,
                out,
                total,
                mean,
                rstd,
                rows,
                offset,
                dropout_threshold(dropout_p, randomness),
                1 / kept_fraction(dropout_p, randomness),
                eps,
                WIDTH=width,
                PRENORM=prenorm,
                RANDOMNESS=0 if seed is None else randomness,
                **blocks._asdict(),
            )
    return out, total, mean, rstd


def dropout_add_layer_norm_bwd(
    grad_out: Tensor,  # (N, D)
    grad_sum: Tensor | None,  # (N, D)
    x: Tensor,  # (N, D)
    residual: Tensor | None,  # (N, D)
    weight: Tensor,  # (D,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of `x` (empty without dropout), `residual`, `weight` and `bias`. Arguments are contiguous."""
    rows, width = x.shape
    grad_residual = torch.empty_like(x if residual is None else residual)
    grad_x = x.new_empty(x.shape if seed is not None else 0)
    blocks = _blocks(width)
    # Give every program the same number of whole tiles.
    tiles = triton.cdiv(rows, blocks.BLOCK_N)
    rows_per_program = max(triton.cdiv(tiles, _MAX_PROGRAMS), 1) * blocks.BLOCK_N
    programs = triton.cdiv(rows, rows_per_program)
    partial_sums = weight.new_empty(2, programs, width)  # of the gradients of weight and bias
    if rows > 0:
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                grad_out,
                grad_sum,
                x,
                residual,
                weight,
                mean,
                rstd,
                seed,
                grad_x,
                grad_residual,
                partial_sums[0],
                partial_sums[1],
                rows,
                rows_per_program,
                offset,
                dropout_threshold(dropout_p, randomness),
                1 / kept_fraction(dropout_p, randomness),
                WIDTH=width,
                PRENORM=residual is None,
                RANDOMNESS=0 if seed is None else randomness,
                **blocks._asdict(),
            )
    # Two sums, because the results of an operator may not share memory.
    grad_weight, grad_bias = (one.sum(0) for one in partial_sums)
    return grad_x, grad_residual, grad_weight, grad_bias


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Return calls by label; tests/ops/ahead_of_time.py compiles the kernels that each call would launch."""

    def call(
        width: int,
        dtype: torch.dtype,
        *,
        dropout: bool,
        prenorm: bool,
        residual_dtype: torch.dtype | None = None,
        randomness: int = RANDOMNESS,
    ) -> None:
        x, residual = torch.empty(1000, width, dtype=dtype), torch.empty(1000, width, dtype=residual_dtype or dtype)
        weight = torch.empty(width)
        dropout_p, seed = (0.1, torch.tensor(0)) if dropout else (0.0, None)
        out, total, mean, rstd = dropout_add_layer_norm_fwd(
            x, residual, weight, weight, 1e-5, dropout_p, randomness, seed, 0, prenorm
        )
        grad_sum, saved, added = (total, total, None) if prenorm else (None, x, residual)
        dropout_add_layer_norm_bwd(out, grad_sum, saved, added, weight, mean, rstd, dropout_p, randomness, seed, 0)

    cases: dict[str, Callable[[], object]] = {}
    for width in (768, 194, 8192):
        for dtype in (torch.bfloat16, torch.float32):
            cases[f"D={width}, {dtype}, dropout".replace("torch.", "")] = partial(
                call, width, dtype, dropout=True, prenorm=False
            )
    cases["D=768, bfloat16, dropout of version 1"] = partial(
        call, 768, torch.bfloat16, dropout=True, prenorm=False, randomness=1
    )
    same = [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for dtype, residual_dtype in (*same, (torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        beside = "" if residual_dtype == dtype else " beside an fp32 residual"
        for prenorm in (True, False):
            for dropout in (True, False):
                label = f"D=768, {dtype}{beside}{', prenorm' * prenorm}{', dropout' * dropout}".replace("torch.", "")
                cases[label] = partial(
                    call, 768, dtype, dropout=dropout, prenorm=prenorm, residual_dtype=residual_dtype
                )
    return cases
