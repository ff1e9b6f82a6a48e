"""Triton kernels of `varlen_attention`: packed, not causal, deterministic. README.md has the formulas.

A tile is BLOCK_M queries by BLOCK_N keys of one sequence and head. Helpers of the kernels are in triton_tiles.py, and
the gradient of the distance bias is in triton_distance_bias.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.precision import precision_of
from fastssl.kernels.randomness import RANDOMNESS, dropout_threshold, kept_fraction
from fastssl.kernels.varlen_attention.triton_distance_bias import distance_bias_grad
from fastssl.kernels.varlen_attention.triton_launch import launches_for
from fastssl.kernels.varlen_attention.triton_tiles import (
    LOG2E,
    SIZES,
    biases_at,
    block_of,
    is_kept,
    load_rows,
    row_states,
    store_rows,
    unknown_zero,
)


@triton.jit
def _attend(
    running,
    q,
    k,
    v,
    rows,
    start,
    places,
    end,
    bias,
    dropout,
    scale,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    RANDOMNESS: tl.constexpr,
):
    """Add a block of keys to a running softmax in base 2: (highest logit, sum, weighted sum of values) of each query.

    `bias` is (pointer, factor per query, reach), and `dropout` is (state per query, threshold, zero). Keys from `end`
    on are left out if MASKED; otherwise there must not be any.
    """
    highest, sums, acc = running
    keys = start + places
    bias_ptr, bias_factor, reach = bias
    states, threshold, dropped = dropout
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if bias_ptr is not None:
        logits = logits * scale + bias_factor[:, None] * biases_at(bias_ptr, keys[None, :] - rows[:, None], reach)
        scale = 1.0
    if MASKED:
        logits = tl.where((keys < end)[None, :], logits, float("-inf"))
    # Without a bias, the logits are not scaled yet, so that one instruction scales and shifts them.
    new_highest = tl.maximum(highest, tl.max(logits, 1) * scale)
    shift = new_highest
    if bias_ptr is not None:
        shift = tl.where(new_highest > float("-inf"), new_highest, 0.0)  # all biases of a block may be -inf
    rescale = tl.exp2(highest - shift)
    weights = tl.exp2(logits * scale - shift[:, None])
    if MASKED:
        weights = tl.where((keys < end)[None, :], weights, 0.0)  # a scale of 0 times -inf is NaN
    sums = sums * rescale + tl.sum(weights, 1)
    if RANDOMNESS:
        weights = tl.where(is_kept(states[:, None], start, places[None, :], threshold, RANDOMNESS), weights, dropped)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return new_highest, sums, acc


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seed_ptr,
    out_ptr,
    logsumexp_ptr,
    cu_seqlens_ptr,
    bias_ptr,
    gate_ptr,
    total,
    batch,
    heads,
    reach,
    scale,
    threshold,
    keep_factor,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    RANDOMNESS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """Compute the output of a block of queries in a loop over blocks of keys, with a running softmax in base 2."""
    begin, length, first = block_of(tl.program_id(0), cu_seqlens_ptr, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    stride = heads * E
    offset = begin.to(tl.int64) * stride + head * E
    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
    factor = scale * LOG2E
    if NEGATIVE:  # the largest product must give the largest logit
        q, factor = -q, -factor
    bias_factor = tl.full([BLOCK_M], LOG2E, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + (begin + rows).to(tl.int64) * heads + head, mask=rows < length, other=0.0)
        bias_factor *= gate.to(tl.float32)
    if bias_ptr is not None:
        bias_ptr += head * (2 * reach + 1)
    states = rows  # not read without dropout
    if seed_ptr is not None:
        states = row_states(seed_ptr, begin + rows, head)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    # The last block of keys, which may have keys after the end, comes before the loop, which then needs no masks. (With
    # the last block after the loop, ptxas would run all products one after the other.)
    places = tl.arange(0, BLOCK_N)
    last = (length - 1) // BLOCK_N * BLOCK_N
    k = load_rows(k_ptr + (offset + last * stride), places, length - last, stride, E, BLOCK_E)
    v = load_rows(v_ptr + (offset + last * stride), places, length - last, stride, E, BLOCK_E)
    highest, sums, acc = _attend(
        (highest, sums, acc),
        q,
        k,
        v,
        rows,
        last,
        places,
        length,
        (bias_ptr, bias_factor, reach),
        (states, threshold, unknown_zero(total)),
        factor,
        PRECISION,
        MASKED=True,
        RANDOMNESS=RANDOMNESS,
    )
    for start in range(0, last, BLOCK_N):
        k = load_rows(k_ptr + (offset + start * stride), places, BLOCK_N, stride, E, BLOCK_E)
        v = load_rows(v_ptr + (offset + start * stride), places, BLOCK_N, stride, E, BLOCK_E)
        highest, sums, acc = _attend(
            (highest, sums, acc),
            q,
            k,
            v,
            rows,
            start,
            places,
            length,
            (bias_ptr, bias_factor, reach),
            (states, threshold, unknown_zero(total)),
            factor,
            PRECISION,
            MASKED=False,
            RANDOMNESS=RANDOMNESS,
        )

    # In units of ln 2, as the backward needs it.
    logsumexp = highest + tl.log2(sums)
    tl.store(logsumexp_ptr + head.to(tl.int64) * total + begin + rows, logsumexp, mask=rows < length)
    store_rows(out_ptr + offset, acc * (keep_factor / sums)[:, None], rows, length, stride, E, BLOCK_E)


@triton.jit
def _add_to_grad_q(
    grads,
    q,
    k,
    v,
    grad_out,
    logsumexp,
    delta,
    rows,
    start,
    places,
    end,
    bias,
    dropout,
    scale,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    RANDOMNESS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Add a block of keys to the gradients of queries and gates.

    `bias` is as in `_attend`, and `dropout` is (state per query, threshold, factor of kept weights). Keys from `end` on
    are left out if MASKED; otherwise there must not be any.
    """
    acc, grad_gate = grads
    keys = start + places
    bias_ptr, bias_factor, reach = bias
    states, threshold, keep_factor = dropout
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if bias_ptr is not None:
        biases = biases_at(bias_ptr, keys[None, :] - rows[:, None], reach)
        logits += bias_factor[:, None] * biases
    weights = tl.exp2(logits - logsumexp[:, None])
    if MASKED:
        weights = tl.where((keys < end)[None, :], weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    if RANDOMNESS:
        kept = is_kept(states[:, None], start, places[None, :], threshold, RANDOMNESS)
        grad_weights = tl.where(kept, grad_weights, 0.0) * keep_factor
    grad_logits = weights * (grad_weights - delta[:, None])
    if GATED:
        grad_gate += tl.sum(grad_logits * biases, 1)
    return tl.dot(grad_logits.to(k.dtype), k, acc, input_precision=PRECISION), grad_gate


@triton.jit(do_not_specialize=SIZES)
def _backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    seed_ptr,
    delta_ptr,
    states_ptr,
    grad_q_ptr,
    grad_gate_ptr,
    cu_seqlens_ptr,
    bias_ptr,
    gate_ptr,
    total,
    batch,
    heads,
    reach,
    scale,
    threshold,
    keep_factor,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    RANDOMNESS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute grad_q and grad_gate of a block of queries in a loop over keys.

    Later kernels read two more results, D (H, N), and under dropout the states (H, N) of its hash.
    """
    begin, length, first = block_of(tl.program_id(0), cu_seqlens_ptr, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    stride = heads * E
    offset = begin.to(tl.int64) * stride + head * E
    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
    grad_out = load_rows(grad_out_ptr + offset, rows, length, stride, E, BLOCK_E)
    out = load_rows(out_ptr + offset, rows, length, stride, E, BLOCK_E)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    per_row = head.to(tl.int64) * total + begin + rows
    tl.store(delta_ptr + per_row, delta, mask=rows < length)
    logsumexp = tl.load(logsumexp_ptr + per_row, mask=rows < length, other=float("inf"))
    per_gate = (begin + rows).to(tl.int64) * heads + head
    bias_factor = tl.full([BLOCK_M], LOG2E, tl.float32)
    if gate_ptr is not None:
        bias_factor *= tl.load(gate_ptr + per_gate, mask=rows < length, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias_ptr += head * (2 * reach + 1)
    states = rows  # not read without dropout
    if seed_ptr is not None:
        states = row_states(seed_ptr, begin + rows, head)
        tl.store(states_ptr + per_row, states.to(tl.int32, bitcast=True), mask=rows < length)

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    grad_gate = tl.zeros([BLOCK_M], tl.float32)
    places = tl.arange(0, BLOCK_N)
    k_ptr += offset
    v_ptr += offset
    factor = scale * LOG2E
    # The last block of keys comes first, as in the forward.
    last = (length - 1) // BLOCK_N * BLOCK_N
    keys = last + places
    k = load_rows(k_ptr, keys, length, stride, E, BLOCK_E)
    v = load_rows(v_ptr, keys, length, stride, E, BLOCK_E)
    acc, grad_gate = _add_to_grad_q(
        (acc, grad_gate),
        q,
        k,
        v,
        grad_out,
        logsumexp,
        delta,
        rows,
        last,
        places,
        length,
        (bias_ptr, bias_factor, reach),
        (states, threshold, keep_factor),
        factor,
        PRECISION,
        MASKED=True,
        RANDOMNESS=RANDOMNESS,
        GATED=gate_ptr is not None,
    )
    for start in range(0, last, BLOCK_N):
        k = load_rows(k_ptr + start * stride, places, BLOCK_N, stride, E, BLOCK_E)
        v = load_rows(v_ptr + start * stride, places, BLOCK_N, stride, E, BLOCK_E)
        acc, grad_gate = _add_to_grad_q(
            (acc, grad_gate),
            q,
            k,
            v,
            grad_out,
            logsumexp,
            delta,
            rows,
            start,
            places,
            length,
            (bias_ptr, bias_factor, reach),
            (states, threshold, keep_factor),
            factor,
            PRECISION,
            MASKED=False,
            RANDOMNESS=RANDOMNESS,
            GATED=gate_ptr is not None,
        )

    # The softmax of a single logit is constant, so its gradients are exactly zero, without rounding.
    grad_q = tl.where(length > 1, acc * scale, 0.0)
    store_rows(grad_q_ptr + offset, grad_q, rows, length, stride, E, BLOCK_E)
    if gate_ptr is not None:
        grad_gate = tl.where(length > 1, grad_gate, 0.0)
        tl.store(grad_gate_ptr + per_gate, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=rows < length)


@triton.jit(do_not_specialize=SIZES)
def _backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    states_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cu_seqlens_ptr,
    bias_ptr,
    gate_ptr,
    total,
    batch,
    heads,
    reach,
    scale,
    threshold,
    keep_factor,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    RANDOMNESS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute grad_k and grad_v of a block of keys in a loop over queries; tiles are transposed, keys by queries."""
    begin, length, first = block_of(tl.program_id(0), cu_seqlens_ptr, batch, BLOCK_N)
    if first >= length:
        return
    head = tl.program_id(1)
    stride = heads * E
    offset = begin.to(tl.int64) * stride + head * E
    places = tl.arange(0, BLOCK_N)
    keys = first + places
    k = load_rows(k_ptr + offset, keys, length, stride, E, BLOCK_E)
    v = load_rows(v_ptr + offset, keys, length, stride, E, BLOCK_E)
    per_row = head.to(tl.int64) * total + begin
    if bias_ptr is not None:
        bias_ptr += head * (2 * reach + 1)

    acc_k = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in range(0, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
        # Infinity after the last query makes the weights there zero.
        logsumexp = tl.load(logsumexp_ptr + per_row + rows, mask=rows < length, other=float("inf"))
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        if bias_ptr is not None:
            biases = biases_at(bias_ptr, keys[:, None] - rows[None, :], reach) * LOG2E
            if gate_ptr is not None:
                per_gate = (begin + rows).to(tl.int64) * heads + head
                biases *= tl.load(gate_ptr + per_gate, mask=rows < length, other=0.0).to(tl.float32)[None, :]
            logits += biases
        weights = tl.exp2(logits - logsumexp[None, :])
        grad_out = load_rows(grad_out_ptr + offset, rows, length, stride, E, BLOCK_E)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        if states_ptr is not None:
            states = tl.load(states_ptr + per_row + rows, mask=rows < length, other=0).to(tl.uint32)
            kept = is_kept(states[None, :], first, places[:, None], threshold, RANDOMNESS)
            grad_weights = tl.where(kept, grad_weights, 0.0) * keep_factor
            kept_weights = tl.where(kept, weights, unknown_zero(total))
        else:
            kept_weights = weights
        acc_v = tl.dot(kept_weights.to(grad_out.dtype), grad_out, acc_v, input_precision=PRECISION)
        delta = tl.load(delta_ptr + per_row + rows, mask=rows < length, other=0.0)
        grad_logits = weights * (grad_weights - delta[None, :])
        acc_k = tl.dot(grad_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)

    store_rows(grad_k_ptr + offset, acc_k * tl.where(length > 1, scale, 0.0), keys, length, stride, E, BLOCK_E)
    store_rows(grad_v_ptr + offset, acc_v * keep_factor, keys, length, stride, E, BLOCK_E)


def _arguments(
    q: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    randomness: int,
    distance_bias: Tensor | None,
    gate: Tensor | None,
) -> dict[str, Any]:
    """Return the arguments that all kernels share, by name."""
    total, heads, width = q.shape
    threshold = dropout_threshold(dropout_p, randomness)
    return {
        "cu_seqlens_ptr": cu_seqlens,
        "bias_ptr": distance_bias,
        "gate_ptr": gate,
        "total": total,
        "batch": cu_seqlens.shape[0] - 1,
        "heads": heads,
        "reach": 0 if distance_bias is None else distance_bias.shape[1] // 2,
        "scale": scale,
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,  # as an int32 with the same bits
        "keep_factor": 1 / kept_fraction(dropout_p, randomness),
        "E": width,
        "PRECISION": precision_of("varlen_attention", q),
        "RANDOMNESS": randomness if dropout_p else 0,
        "BLOCK_E": max(16, triton.next_power_of_2(width)),
    }


def varlen_attention_fwd(
    q: Tensor,  # (N, H, E)
    k: Tensor,  # (N, H, E)
    v: Tensor,  # (N, H, E)
    cu_seqlens: Tensor,  # (B+1,)
    max_length: int,
    scale: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    distance_bias: Tensor | None,  # (H, 2R+1)
    gate: Tensor | None,  # (N, H)
) -> tuple[Tensor, Tensor]:  # (N, H, E), (H, N)
    """Return the attention output and each query's logsumexp of the logits, in units of ln 2."""
    total, heads, _ = q.shape
    out, logsumexp = torch.empty_like(q), q.new_empty((heads, total), dtype=torch.float32)
    if q.numel() == 0:
        return out, logsumexp
    arguments = _arguments(q, cu_seqlens, scale, dropout_p, randomness, distance_bias, gate)
    launch = launches_for(q, distance_bias is not None, max_length).forward
    with torch.cuda.device_of(q):
        _forward_kernel[launch.grid(launch.block_m, arguments)](
            q,
            k,
            v,
            seed if dropout_p else None,
            out,
            logsumexp,
            **arguments,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            NEGATIVE=scale < 0,
            **launch.options,
        )
    return out, logsumexp


def varlen_attention_bwd(
    grad_out: Tensor,  # (N, H, E)
    q: Tensor,  # (N, H, E)
    k: Tensor,  # (N, H, E)
    v: Tensor,  # (N, H, E)
    out: Tensor,  # (N, H, E)
    logsumexp: Tensor,  # (H, N)
    cu_seqlens: Tensor,  # (B+1,)
    max_length: int,
    scale: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    distance_bias: Tensor | None,  # (H, 2R+1)
    gate: Tensor | None,  # (N, H)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k`, `v`, `distance_bias` and `gate` (empty for None). Arguments are contiguous."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_bias, grad_gate = (q.new_empty(0) if x is None else torch.zeros_like(x) for x in (distance_bias, gate))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v, grad_bias, grad_gate
    arguments = _arguments(q, cu_seqlens, scale, dropout_p, randomness, distance_bias, gate)
    launches = launches_for(q, distance_bias is not None, max_length)
    delta = torch.empty_like(logsumexp)
    states = torch.empty_like(logsumexp, dtype=torch.int32) if dropout_p else None
    with torch.cuda.device_of(q):
        launch = launches.backward_q
        _backward_q_kernel[launch.grid(launch.block_m, arguments)](
            q,
            k,
            v,
            out,
            grad_out,
            logsumexp,
            seed if dropout_p else None,
            delta,
            states,
            grad_q,
            grad_gate,
            **arguments,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            **launch.options,
        )
        launch = launches.backward_kv
        _backward_kv_kernel[launch.grid(launch.block_n, arguments)](
            q,
            k,
            v,
            grad_out,
            logsumexp,
            delta,
            states,
            grad_k,
            grad_v,
            **arguments,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            **launch.options,
        )
        if distance_bias is not None:
            launch = launches.backward_bias
            inputs = q, k, v, grad_out, logsumexp, delta, states
            distance_bias_grad(grad_bias, inputs, arguments, max_length, launch.block_m, launch.options)
    return grad_q, grad_k, grad_v, grad_bias, grad_gate


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Return calls by label; tests/ops/ahead_of_time.py compiles the kernels that each call would launch."""
    plain, biased = _forward_and_backward, partial(_forward_and_backward, bias_dtype=torch.float32)
    everything = partial(biased, dropout_p=0.1)
    cases: dict[str, Callable[[], object]] = {
        "bfloat16, E=64, dropout and gated bias": partial(everything, 64, torch.bfloat16),
        "bfloat16, E=64": partial(plain, 64, torch.bfloat16),
        "bfloat16, E=64, dropout": partial(plain, 64, torch.bfloat16, dropout_p=0.1),
        "bfloat16, E=64, dropout of version 1": partial(plain, 64, torch.bfloat16, dropout_p=0.1, randomness=1),
        "bfloat16, E=64, gated bias": partial(biased, 64, torch.bfloat16),
        "float16, E=64, dropout and gated bias": partial(everything, 64, torch.float16),
        "float16, E=64": partial(plain, 64, torch.float16),
        "float16, E=64, dropout": partial(plain, 64, torch.float16, dropout_p=0.1),
        "float16, E=64, gated bias": partial(biased, 64, torch.float16),
        "bfloat16, E=32": partial(plain, 32, torch.bfloat16),
        "bfloat16, E=32, dropout and gated bias": partial(everything, 32, torch.bfloat16),
        "bfloat16, E=80, dropout and gated bias": partial(everything, 80, torch.bfloat16),
        "bfloat16, E=128": partial(plain, 128, torch.bfloat16),
        "bfloat16, E=128, dropout and gated bias": partial(everything, 128, torch.bfloat16),
        "float32, E=64, dropout and gated bias": partial(everything, 64, torch.float32),
        "float32, E=64": partial(plain, 64, torch.float32),
        "float32, E=64, dropout": partial(plain, 64, torch.float32, dropout_p=0.1),
        "float32, E=64, gated bias": partial(biased, 64, torch.float32),
        "float32, E=128, dropout and gated bias": partial(everything, 128, torch.float32),
    }
    # Bias and gate are fp32 under autocast, but 16-bit in an encoder that is 16-bit as a whole, and in `fastssl check`.
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        cases[f"{name}, E=64, gated bias in {name}"] = partial(plain, 64, dtype, bias_dtype=dtype)
    return cases


def _forward_and_backward(
    width: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    bias_dtype: torch.dtype | None = None,
    randomness: int = RANDOMNESS,
) -> None:
    """Launch all kernels; with `bias_dtype`, with a distance bias and gates in that dtype."""
    q = torch.zeros(800, 12, width, dtype=dtype)
    bias, gate = None, None
    if bias_dtype is not None:
        bias, gate = torch.zeros(12, 1601, dtype=bias_dtype), torch.zeros(800, 12, dtype=bias_dtype)
    inputs = (torch.tensor([0, 800], dtype=torch.int32), 800, 0.125, dropout_p, randomness, torch.tensor(0), bias, gate)
    out, logsumexp = varlen_attention_fwd(q, q, q, *inputs)
    varlen_attention_bwd(out, q, q, q, out, logsumexp, *inputs)
