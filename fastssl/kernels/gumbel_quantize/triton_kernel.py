"""Triton kernels of `gumbel_quantize`: deterministic, without atomics. README.md has the formulas.

A tile is BLOCK_M frames by all codes of one group. Several programs share a sum over frames: each writes its part, and
the parts are added in order. The number of parts depends on the number of frames only, so the bits do not depend on the
device.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
# Source of the noise: none, a tensor, or seeds.
_NO_NOISE, _NOISE, _SEEDS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Largest number of programs per group that share a sum over frames.
_MAX_SHARES = 64
_BLOCK_M = 16


@triton.jit
def _log(x):
    """Compute log(x) of positive normal numbers; the GPU's own is too coarse near 1, where the noise is largest."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    r = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    n = exponent.to(tl.float32)
    p = r * 7.0376836292e-2 - 1.1514610310e-1
    p = p * r + 1.1676998740e-1
    p = p * r - 1.2420140846e-1
    p = p * r + 1.4249322787e-1
    p = p * r - 1.6668057665e-1
    p = p * r + 2.0000714765e-1
    p = p * r - 2.4999993993e-1
    p = p * r + 3.3333331174e-1
    square = r * r
    return r + ((square * r * p - n * 2.12194440e-4) - 0.5 * square) + n * 0.693359375


@triton.jit
def _gumbel(seeds, counters):
    """Draw standard Gumbel noise from SplitMix64, as specified by `kernels/splitmix.py`."""
    x = seeds.to(tl.uint64, bitcast=True) + counters.to(tl.uint64) * _GOLDEN
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    x = x ^ (x >> 31)
    uniform = (x >> 41).to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 + 5.960464477539063e-08
    return -_log(-_log(uniform))


@triton.jit
def _load_logits(
    logits_ptr,
    noise_ptr,
    seeds_ptr,
    rows,
    frames,
    group,
    G: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """Load one group's logits without and with noise: (rows, BLOCK_V) each, minus infinity after the last code."""
    codes = tl.arange(0, BLOCK_V)
    there = (rows < frames)[:, None] & (codes < V)[None, :]
    offsets = (rows.to(tl.int64) * G + group)[:, None] * V + codes[None, :]
    plain = tl.load(logits_ptr + offsets, mask=there, other=0.0).to(tl.float32)
    plain = tl.where((codes < V)[None, :], plain, float("-inf"))
    noisy = plain
    if SOURCE == _NOISE:
        noisy = plain + tl.load(noise_ptr + offsets, mask=there, other=0.0)
    elif SOURCE == _SEEDS:
        seeds = tl.load(seeds_ptr + rows, mask=rows < frames, other=0)
        noisy = plain + _gumbel(seeds[:, None], group * V + codes[None, :])
    return plain, noisy


@triton.jit(do_not_specialize=["frames", "shares"])
def _forward_kernel(
    logits_ptr,
    noise_ptr,
    seeds_ptr,
    vectors_ptr,
    values_ptr,
    codes_ptr,
    sums_ptr,
    counts_ptr,
    frames,
    shares,
    G: tl.constexpr,
    V: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """Compute codes and vectors of a share of the frames in one group, and sum its probabilities and its counts."""
    share, group = tl.program_id(0), tl.program_id(1)
    codes = tl.arange(0, BLOCK_V)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    counts = tl.zeros((BLOCK_V,), tl.int32)
    for block in range(share, tl.cdiv(frames, BLOCK_M), shares):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        there = rows < frames
        plain, noisy = _load_logits(logits_ptr, noise_ptr, seeds_ptr, rows, frames, group, G, V, BLOCK_V, SOURCE)
        # Like torch.argmax, choose the first NaN if there is one. An argmax over NaN may leave the range of the codes.
        is_nan = noisy != noisy
        largest = tl.argmax(tl.where(is_nan, float("-inf"), noisy), 1, tie_break_left=True)
        first_nan = tl.min(tl.where(is_nan, codes[None, :], BLOCK_V), 1)
        chosen = tl.where(first_nan < BLOCK_V, first_nan, largest)
        exponentials = tl.exp(plain - tl.max(plain, 1)[:, None])
        probabilities = exponentials / tl.sum(exponentials, 1)[:, None]
        sums += tl.sum(tl.where(there[:, None], probabilities, 0.0), 0)
        counts += tl.sum(((chosen[:, None] == codes[None, :]) & there[:, None]).to(tl.int32), 0)
        targets = rows.to(tl.int64) * G + group
        tl.store(codes_ptr + targets, chosen.to(tl.int64), mask=there)
        for first in range(0, E, BLOCK_E):
            width = first + tl.arange(0, BLOCK_E)
            mask = there[:, None] & (width < E)[None, :]
            vectors = tl.load(vectors_ptr + (group * V + chosen)[:, None] * E + width[None, :], mask=mask)
            tl.store(values_ptr + targets[:, None] * E + width[None, :], vectors, mask=mask)
    part = (share * G + group) * V + codes
    tl.store(sums_ptr + part, sums, mask=codes < V)
    tl.store(counts_ptr + part, counts, mask=codes < V)


@triton.jit(do_not_specialize=["frames", "temperature"])
def _backward_logits_kernel(
    grad_values_ptr,
    grad_sums_ptr,
    logits_ptr,
    noise_ptr,
    seeds_ptr,
    vectors_ptr,
    grad_logits_ptr,
    frames,
    temperature,
    G: tl.constexpr,
    V: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """Compute the gradient of one group's logits for BLOCK_M frames, through the softmax with and without noise."""
    group = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    codes = tl.arange(0, BLOCK_V)
    there = rows < frames
    targets = rows.to(tl.int64) * G + group
    grad_soft = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for first in range(0, E, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        grads = tl.load(
            grad_values_ptr + targets[:, None] * E + k[None, :], mask=there[:, None] & (k < E)[None, :], other=0.0
        )
        vectors = tl.load(
            vectors_ptr + (group * V + codes)[None, :] * E + k[:, None],
            mask=(codes < V)[None, :] & (k < E)[:, None],
            other=0.0,
        )
        grad_soft = tl.dot(grads, vectors, grad_soft, input_precision="ieee")
    plain, noisy = _load_logits(logits_ptr, noise_ptr, seeds_ptr, rows, frames, group, G, V, BLOCK_V, SOURCE)
    noisy = tl.exp((noisy - tl.max(noisy, 1)[:, None]) / temperature)
    noisy = noisy / tl.sum(noisy, 1)[:, None]
    grad = noisy * (grad_soft - tl.sum(noisy * grad_soft, 1)[:, None]) / temperature
    plain = tl.exp(plain - tl.max(plain, 1)[:, None])
    plain = plain / tl.sum(plain, 1)[:, None]
    grad_sums = tl.load(grad_sums_ptr + group * V + codes, mask=codes < V, other=0.0)[None, :]
    grad += plain * (grad_sums - tl.sum(plain * grad_sums, 1)[:, None])
    tl.store(
        grad_logits_ptr + targets[:, None] * V + codes[None, :],
        grad.to(grad_logits_ptr.dtype.element_ty),
        mask=there[:, None] & (codes < V)[None, :],
    )


@triton.jit(do_not_specialize=["frames", "shares"])
def _backward_vectors_kernel(
    grad_values_ptr,
    codes_ptr,
    parts_ptr,
    frames,
    shares,
    G: tl.constexpr,
    V: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sum the codevectors' gradient over a share of the frames, as a product with the one-hot matrix of the codes."""
    share, group = tl.program_id(0), tl.program_id(2)
    codes = tl.program_id(1) // tl.cdiv(E, BLOCK_E) * BLOCK_V + tl.arange(0, BLOCK_V)
    width = tl.program_id(1) % tl.cdiv(E, BLOCK_E) * BLOCK_E + tl.arange(0, BLOCK_E)
    sums = tl.zeros((BLOCK_V, BLOCK_E), tl.float32)
    for block in range(share, tl.cdiv(frames, BLOCK_M), shares):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        there = rows < frames
        targets = rows.to(tl.int64) * G + group
        chosen = tl.load(codes_ptr + targets, mask=there, other=-1)
        grads = tl.load(
            grad_values_ptr + targets[:, None] * E + width[None, :],
            mask=there[:, None] & (width < E)[None, :],
            other=0.0,
        )
        one_hot = (codes[:, None] == chosen[None, :]).to(tl.float32).to(grads.dtype)
        sums = tl.dot(one_hot, grads, sums, input_precision="ieee")
    tl.store(
        parts_ptr + ((share * G + group) * V + codes)[:, None] * E + width[None, :],
        sums,
        mask=(codes < V)[:, None] & (width < E)[None, :],
    )


def _source(noise: Tensor | None, seeds: Tensor | None) -> int:
    """Return the value of SOURCE for the arguments of a call."""
    source = _SEEDS if seeds is not None else _NOISE if noise is not None else _NO_NOISE
    value: int = source.value
    return value


def _shares(frames: int, block: int) -> int:
    """Return the number of programs per group that share a sum over frames."""
    shares: int = max(1, min(_MAX_SHARES, triton.cdiv(frames, block)))
    return shares


def _warps(codes: int) -> int:
    """Return the warps for a tile of `_BLOCK_M` frames by `codes`; for 512, 8 warps spill at 128 registers a thread."""
    return 16 if codes >= 512 else 8


def gumbel_quantize_fwd(
    logits: Tensor,  # (M, G, V)
    codevectors: Tensor,  # (G, V, E)
    noise: Tensor | None,  # (M, G, V)
    seeds: Tensor | None,  # (M,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (M, G * E), (M, G), (G, V), (G, V)
    """Return the fields of `GumbelQuantized`. Arguments are contiguous."""
    frames, groups, codes = logits.shape
    width = codevectors.shape[2]
    values = codevectors.new_empty((frames, groups * width))
    chosen = torch.empty((frames, groups), dtype=torch.int64, device=logits.device)
    shares = _shares(frames, _BLOCK_M)
    sums = torch.empty((shares, groups, codes), dtype=torch.float32, device=logits.device)
    counts = torch.empty((shares, groups, codes), dtype=torch.int32, device=logits.device)
    block_v = max(16, triton.next_power_of_2(codes))
    with torch.cuda.device_of(logits):
        _forward_kernel[shares, groups](
            logits,
            noise,
            seeds,
            codevectors,
            values,
            chosen,
            sums,
            counts,
            frames,
            shares,
            G=groups,
            V=codes,
            E=width,
            BLOCK_M=_BLOCK_M,
            BLOCK_V=block_v,
            BLOCK_E=min(128, max(16, triton.next_power_of_2(width))),
            SOURCE=_source(noise, seeds),
            num_warps=_warps(block_v),
        )
    return values, chosen, sums.sum(0), counts.sum(0, dtype=torch.int64)


def gumbel_quantize_bwd(
    grad_values: Tensor,  # (M, G * E)
    grad_probability_sums: Tensor,  # (G, V)
    logits: Tensor,  # (M, G, V)
    codevectors: Tensor,  # (G, V, E)
    noise: Tensor | None,  # (M, G, V)
    seeds: Tensor | None,  # (M,)
    codes: Tensor,  # (M, G)
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `logits` and `codevectors`. Arguments are contiguous."""
    frames, groups, code_count = logits.shape
    width = codevectors.shape[2]
    grad_logits = torch.empty_like(logits)
    if frames == 0:
        return grad_logits, torch.zeros_like(codevectors)
    all_codes = max(16, triton.next_power_of_2(code_count))
    block_v, block_m, block_e = 64, 32, min(64, max(16, triton.next_power_of_2(width)))
    shares = _shares(frames, block_m)
    parts = torch.empty((shares, *codevectors.shape), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _backward_logits_kernel[triton.cdiv(frames, _BLOCK_M), groups](
            grad_values,
            grad_probability_sums,
            logits,
            noise,
            seeds,
            codevectors,
            grad_logits,
            frames,
            temperature,
            G=groups,
            V=code_count,
            E=width,
            BLOCK_M=_BLOCK_M,
            BLOCK_V=all_codes,
            BLOCK_K=16,
            SOURCE=_source(noise, seeds),
            num_warps=_warps(all_codes),
        )
        _backward_vectors_kernel[shares, triton.cdiv(code_count, block_v) * triton.cdiv(width, block_e), groups](
            grad_values,
            codes,
            parts,
            frames,
            shares,
            G=groups,
            V=code_count,
            E=width,
            BLOCK_M=block_m,
            BLOCK_V=block_v,
            BLOCK_E=block_e,
            num_warps=8,
        )
    return grad_logits, parts.sum(0).to(codevectors.dtype)


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Return calls by label; tests/ops/ahead_of_time.py compiles the kernels that each call would launch."""
    cases: dict[str, Callable[[], object]] = {
        f"{dtype}, {source}, V={codes}, E={width}".replace("torch.", ""): partial(
            _forward_and_backward, dtype, source, codes, width
        )
        for source in ("seeds", "noise", "neither")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for codes, width in ((320, 128), (320, 384), (64, 32))
    }
    # Under autocast, a product computes the logits, and the vectors stay fp32.
    for dtype in (torch.bfloat16, torch.float16):
        for source, width in (("seeds", 128), ("seeds", 384), ("noise", 128), ("neither", 128)):
            label = f"{dtype}, {source}, V=320, E={width}, vectors in float32".replace("torch.", "")
            cases[label] = partial(_forward_and_backward, dtype, source, 320, width, vectors_dtype=torch.float32)
    return cases


def _forward_and_backward(
    dtype: torch.dtype, source: str, codes: int, width: int, vectors_dtype: torch.dtype | None = None
) -> None:
    logits = torch.zeros(100, 2, codes, dtype=dtype)
    vectors = torch.zeros(2, codes, width, dtype=vectors_dtype or dtype)
    noise = torch.zeros(logits.shape) if source == "noise" else None
    seeds = torch.zeros(100, dtype=torch.int64) if source == "seeds" else None
    values, chosen, sums, _ = gumbel_quantize_fwd(logits, vectors, noise, seeds)
    gumbel_quantize_bwd(values, sums, logits, vectors, noise, seeds, chosen, 2.0)
