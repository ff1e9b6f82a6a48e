"""Triton kernels of `varlen_attention`: packed, not causal, deterministic. README.md has the formulas.

A tile is BLOCK_M queries by BLOCK_N keys of one sequence and head. Blocks are counted from the start of their sequence,
and block sizes do not change the order of a sum, so a sequence has the same bits in any batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.precision import fp32_precision, precision_of
from fastssl.kernels.varlen_attention.triton_launch import launches_for

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Largest number of programs that share the sequences of a batch, per head and band of distances.
_MAX_SHARES = 16
#: Arguments that change from call to call. Triton must not specialise on them, or it would recompile for new values.
_SIZES = ["total", "batch", "reach", "threshold"]


@triton.jit
def _mix(x):
    """Apply the finaliser of 32-bit MurmurHash3 to uint32 numbers."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _row_states(seed_ptr, rows, head):
    """Return the state of the dropout hash after seed, packed row and head; only the key is missing."""
    seed = tl.load(seed_ptr)
    state = _mix(seed.to(tl.uint32) ^ 0x9E3779B9)
    state = _mix(state ^ (seed >> 32).to(tl.uint32))
    return _mix(_mix(state ^ rows.to(tl.uint32)) ^ head.to(tl.uint32))


@triton.jit
def _kept(states, keys, threshold):
    """Return whether dropout keeps the weights of some keys, from the results of `_row_states`."""
    return _mix(states ^ keys.to(tl.uint32)) >= threshold.to(tl.uint32)


@triton.jit
def _biases(bias_ptr, distances, reach):
    """Load the bias of one head in fp32 at some distances, which are clamped to the table."""
    return tl.load(bias_ptr + tl.minimum(tl.maximum(distances, -reach), reach) + reach).to(tl.float32)


@triton.jit
def _block_of(tile, cu_seqlens_ptr, batch, BLOCK: tl.constexpr):
    """Locate block `tile`: return the first row and length of its sequence, and the block's first row in it.

    The blocks of sequence b start at number cu_seqlens[b] // BLOCK + b. They cover its rows, and at most one of them
    starts after its end. So N // BLOCK + B programs cover all sequences, and the host need not know the lengths.
    """
    sequence = -1
    for start in range(0, batch, 128):
        index = start + tl.arange(0, 128)
        begins = tl.load(cu_seqlens_ptr + index, mask=index < batch, other=0)
        sequence += tl.sum(((index < batch) & (begins // BLOCK + index <= tile)).to(tl.int32))
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    return begin, length, (tile - begin // BLOCK - sequence) * BLOCK


@triton.jit
def _load_rows(ptr, rows, length, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load (rows, BLOCK_E) of one sequence and head; zeros for rows after its end, which belong to other sequences."""
    columns = tl.arange(0, BLOCK_E)
    mask = (rows < length)[:, None]
    if E < BLOCK_E:
        mask = mask & (columns < E)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, x, rows, length, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    columns = tl.arange(0, BLOCK_E)
    mask = (rows < length)[:, None]
    if E < BLOCK_E:
        mask = mask & (columns < E)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    logsumexp_ptr,
    cu_seqlens_ptr,
    seed_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the output of a block of queries in a loop over blocks of keys, with a running softmax in base 2."""
    begin, length, first = _block_of(tl.program_id(0), cu_seqlens_ptr, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    stride = heads * E
    offset = begin.to(tl.int64) * stride + head * E
    rows = first + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
    bias_factor = tl.full([BLOCK_M], _LOG2E, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + (begin + rows).to(tl.int64) * heads + head, mask=rows < length, other=0.0)
        bias_factor *= gate.to(tl.float32)
    if bias_ptr is not None:
        bias_ptr += head * (2 * reach + 1)
    if seed_ptr is not None:
        states = _row_states(seed_ptr, begin + rows, head)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr + offset, keys, length, stride, E, BLOCK_E)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        if bias_ptr is not None:
            logits += bias_factor[:, None] * _biases(bias_ptr, keys[None, :] - rows[:, None], reach)
        logits = tl.where((keys < length)[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        shift = tl.where(new_highest > float("-inf"), new_highest, 0.0)  # all biases of a block may be -inf
        rescale = tl.exp2(highest - shift)
        weights = tl.exp2(logits - shift[:, None])
        sums = sums * rescale + tl.sum(weights, 1)
        if seed_ptr is not None:
            weights = tl.where(_kept(states[:, None], keys[None, :], threshold), weights, 0.0)
        v = _load_rows(v_ptr + offset, keys, length, stride, E, BLOCK_E)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        highest = new_highest

    _store_rows(out_ptr + offset, acc * (keep_factor / sums)[:, None], rows, length, stride, E, BLOCK_E)
    logsumexp = (highest + tl.log2(sums)) * _LN2
    tl.store(logsumexp_ptr + head.to(tl.int64) * total + begin + rows, logsumexp, mask=rows < length)


@triton.jit(do_not_specialize=_SIZES)
def _backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    grad_q_ptr,
    grad_gate_ptr,
    cu_seqlens_ptr,
    seed_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute grad_q and grad_gate of a block of queries in a loop over keys; also D (H, N), for later kernels."""
    begin, length, first = _block_of(tl.program_id(0), cu_seqlens_ptr, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    stride = heads * E
    offset = begin.to(tl.int64) * stride + head * E
    rows = first + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
    grad_out = _load_rows(grad_out_ptr + offset, rows, length, stride, E, BLOCK_E)
    out = _load_rows(out_ptr + offset, rows, length, stride, E, BLOCK_E)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    per_row = head.to(tl.int64) * total + begin + rows
    tl.store(delta_ptr + per_row, delta, mask=rows < length)
    logsumexp = tl.load(logsumexp_ptr + per_row, mask=rows < length, other=float("inf")) * _LOG2E
    per_gate = (begin + rows).to(tl.int64) * heads + head
    bias_factor = tl.full([BLOCK_M], _LOG2E, tl.float32)
    if gate_ptr is not None:
        bias_factor *= tl.load(gate_ptr + per_gate, mask=rows < length, other=0.0).to(tl.float32)
        grad_gate = tl.zeros([BLOCK_M], tl.float32)
    if bias_ptr is not None:
        bias_ptr += head * (2 * reach + 1)
    if seed_ptr is not None:
        states = _row_states(seed_ptr, begin + rows, head)

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    # The softmax of a single logit is constant, so skip the loop: the gradient is exactly zero, without rounding.
    for start in range(0, tl.where(length > 1, length, 0), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr + offset, keys, length, stride, E, BLOCK_E)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        if bias_ptr is not None:
            biases = _biases(bias_ptr, keys[None, :] - rows[:, None], reach)
            logits += bias_factor[:, None] * biases
        weights = tl.where((keys < length)[None, :], tl.exp2(logits - logsumexp[:, None]), 0.0)
        v = _load_rows(v_ptr + offset, keys, length, stride, E, BLOCK_E)
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if seed_ptr is not None:
            kept = _kept(states[:, None], keys[None, :], threshold)
            grad_weights = tl.where(kept, grad_weights * keep_factor, 0.0)
        grad_logits = weights * (grad_weights - delta[:, None])
        if gate_ptr is not None:
            grad_gate += tl.sum(grad_logits * biases, 1)
        acc = tl.dot(grad_logits.to(k.dtype), k, acc, input_precision=PRECISION)

    _store_rows(grad_q_ptr + offset, acc * scale, rows, length, stride, E, BLOCK_E)
    if gate_ptr is not None:
        tl.store(grad_gate_ptr + per_gate, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=rows < length)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cu_seqlens_ptr,
    seed_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute grad_k and grad_v of a block of keys in a loop over queries; tiles are transposed, keys by queries."""
    begin, length, first = _block_of(tl.program_id(0), cu_seqlens_ptr, batch, BLOCK_N)
    if first >= length:
        return
    head = tl.program_id(1)
    stride = heads * E
    offset = begin.to(tl.int64) * stride + head * E
    keys = first + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr + offset, keys, length, stride, E, BLOCK_E)
    v = _load_rows(v_ptr + offset, keys, length, stride, E, BLOCK_E)
    per_row = head.to(tl.int64) * total + begin
    if bias_ptr is not None:
        bias_ptr += head * (2 * reach + 1)

    acc_k = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in range(0, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
        # Infinity after the last query makes the weights there zero.
        logsumexp = tl.load(logsumexp_ptr + per_row + rows, mask=rows < length, other=float("inf")) * _LOG2E
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E)
        if bias_ptr is not None:
            biases = _biases(bias_ptr, keys[:, None] - rows[None, :], reach) * _LOG2E
            if gate_ptr is not None:
                per_gate = (begin + rows).to(tl.int64) * heads + head
                biases *= tl.load(gate_ptr + per_gate, mask=rows < length, other=0.0).to(tl.float32)[None, :]
            logits += biases
        weights = tl.exp2(logits - logsumexp[None, :])
        grad_out = _load_rows(grad_out_ptr + offset, rows, length, stride, E, BLOCK_E)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        if seed_ptr is not None:
            kept = _kept(_row_states(seed_ptr, begin + rows, head)[None, :], keys[:, None], threshold)
            grad_weights = tl.where(kept, grad_weights * keep_factor, 0.0)
            kept_weights = tl.where(kept, weights, 0.0)
        else:
            kept_weights = weights
        acc_v = tl.dot(kept_weights.to(grad_out.dtype), grad_out, acc_v, input_precision=PRECISION)
        delta = tl.load(delta_ptr + per_row + rows, mask=rows < length, other=0.0)
        grad_logits = weights * (grad_weights - delta[None, :])
        acc_k = tl.dot(grad_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)

    _store_rows(grad_k_ptr + offset, acc_k * tl.where(length > 1, scale, 0.0), keys, length, stride, E, BLOCK_E)
    _store_rows(grad_v_ptr + offset, acc_v * keep_factor, keys, length, stride, E, BLOCK_E)


@triton.jit(do_not_specialize=_SIZES)
def _backward_bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    partial_ptr,
    cu_seqlens_ptr,
    seed_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum grad_logits by distance, for one head and one band of square tiles along a diagonal.

    Each program handles one sequence in every `shares`. All tiles of a band contain the same distances at the same
    places, so they are added element by element, and only their total is summed along diagonals.
    """
    bands, shares = tl.num_programs(0), tl.num_programs(2)
    head = tl.program_id(1)
    ahead = tl.program_id(0) - bands // 2  # key block minus query block of a tile
    stride = heads * E
    places = tl.arange(0, BLOCK)
    biases = _biases(bias_ptr + head * (2 * reach + 1), (places + ahead * BLOCK)[None, :] - places[:, None], reach)
    biases *= _LOG2E

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for sequence in range(tl.program_id(2), batch, shares):
        begin = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
        offset = begin.to(tl.int64) * stride + head * E
        per_row = head.to(tl.int64) * total + begin
        blocks = tl.where(length > 1, tl.cdiv(length, BLOCK), 0)
        for block in range(tl.maximum(0, -ahead), tl.minimum(blocks, blocks - ahead)):
            rows = block * BLOCK + places
            keys = rows + ahead * BLOCK
            q = _load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
            k = _load_rows(k_ptr + offset, keys, length, stride, E, BLOCK_E)
            logsumexp = tl.load(logsumexp_ptr + per_row + rows, mask=rows < length, other=float("inf")) * _LOG2E
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
            if gate_ptr is not None:
                per_gate = (begin + rows).to(tl.int64) * heads + head
                gate = tl.load(gate_ptr + per_gate, mask=rows < length, other=0.0).to(tl.float32)[:, None]
                logits += gate * biases
            else:
                logits += biases
            weights = tl.where((keys < length)[None, :], tl.exp2(logits - logsumexp[:, None]), 0.0)
            grad_out = _load_rows(grad_out_ptr + offset, rows, length, stride, E, BLOCK_E)
            v = _load_rows(v_ptr + offset, keys, length, stride, E, BLOCK_E)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            if seed_ptr is not None:
                kept = _kept(_row_states(seed_ptr, begin + rows, head)[:, None], keys[None, :], threshold)
                grad_weights = tl.where(kept, grad_weights * keep_factor, 0.0)
            delta = tl.load(delta_ptr + per_row + rows, mask=rows < length, other=0.0)
            grad_logits = weights * (grad_weights - delta[:, None])
            if gate_ptr is not None:
                grad_logits *= gate
            acc += grad_logits

    # Rotate row i left by i places. Column c then contains distance c, or c - BLOCK for elements that wrapped around.
    turned = tl.gather(acc, (places[None, :] + places[:, None]) % BLOCK, 1)
    around = places[None, :] + places[:, None] >= BLOCK
    band = (tl.program_id(2) * heads + head) * bands + tl.program_id(0)
    partial_ptr += band.to(tl.int64) * 2 * BLOCK + places
    tl.store(partial_ptr, tl.sum(tl.where(around, turned, 0.0), 0))
    tl.store(partial_ptr + BLOCK, tl.sum(tl.where(around, 0.0, turned), 0))


@triton.jit
def _at_distance(partial_ptr, distances, head, heads, shares, bands, BLOCK: tl.constexpr):
    """Sum the partial results at some distances, over all shares and the two bands that contain each distance."""
    slots = distances + (bands // 2 + 1) * BLOCK
    acc = tl.zeros(distances.shape, tl.float32)
    for share in range(shares):
        for half in tl.static_range(2):
            band = slots // BLOCK - half
            index = ((share * heads + head) * bands + band).to(tl.int64) * 2 * BLOCK + half * BLOCK + slots % BLOCK
            acc += tl.load(partial_ptr + index, mask=(slots >= 0) & (band >= 0) & (band < bands), other=0.0)
    return acc


@triton.jit(do_not_specialize=["reach", "shares", "bands"])
def _reduce_bias_kernel(partial_ptr, grad_bias_ptr, reach, shares, bands, heads, BLOCK: tl.constexpr):
    """Compute grad_distance_bias from sums by distance; its first and last entries include all distances beyond R."""
    head = tl.program_id(1)
    places = tl.arange(0, BLOCK)
    bins = tl.program_id(0) * BLOCK + places
    acc = _at_distance(partial_ptr, bins - reach, head, heads, shares, bands, BLOCK)
    farthest = (bands // 2 + 1) * BLOCK
    if tl.program_id(0) == 0:
        beyond = tl.zeros([BLOCK], tl.float32)
        for distance in range(reach + 1, farthest + 1, BLOCK):
            beyond += _at_distance(partial_ptr, -distance - places, head, heads, shares, bands, BLOCK)
        acc += tl.where(bins == 0, tl.sum(beyond), 0.0)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        beyond = tl.zeros([BLOCK], tl.float32)
        for distance in range(reach + 1, farthest + 1, BLOCK):
            beyond += _at_distance(partial_ptr, distance + places, head, heads, shares, bands, BLOCK)
        acc += tl.where(bins == 2 * reach, tl.sum(beyond), 0.0)
    grad_bias_ptr += head * (2 * reach + 1) + bins
    tl.store(grad_bias_ptr, acc.to(grad_bias_ptr.dtype.element_ty), mask=bins <= 2 * reach)


def _arguments(
    q: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    distance_bias: Tensor | None,
    gate: Tensor | None,
) -> dict[str, Any]:
    """Return the arguments that all kernels share, by name."""
    total, heads, width = q.shape
    threshold = int(dropout_p * 2**32)
    return {
        "cu_seqlens_ptr": cu_seqlens,
        "seed_ptr": seed if dropout_p else None,
        "bias_ptr": distance_bias,
        "gate_ptr": gate,
        "total": total,
        "batch": cu_seqlens.shape[0] - 1,
        "heads": heads,
        "reach": 0 if distance_bias is None else distance_bias.shape[1] // 2,
        "scale": scale,
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,  # as an int32 with the same bits
        "keep_factor": 1 / (1 - dropout_p),
        "E": width,
        "PRECISION": precision_of("varlen_attention", q),
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
    seed: Tensor | None,  # ()
    distance_bias: Tensor | None,  # (H, 2R+1)
    gate: Tensor | None,  # (N, H)
) -> tuple[Tensor, Tensor]:  # (N, H, E), (H, N)
    """Return the attention output and each query's logsumexp of the logits. Arguments are contiguous."""
    total, heads, _ = q.shape
    out, logsumexp = torch.empty_like(q), q.new_empty((heads, total), dtype=torch.float32)
    if q.numel() == 0:
        return out, logsumexp
    arguments = _arguments(q, cu_seqlens, scale, dropout_p, seed, distance_bias, gate)
    launch = launches_for(q, distance_bias is not None, max_length).forward
    with torch.cuda.device_of(q):
        _forward_kernel[launch.grid(launch.block_m, arguments)](
            q, k, v, out, logsumexp, **arguments, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, **launch.options
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
    seed: Tensor | None,  # ()
    distance_bias: Tensor | None,  # (H, 2R+1)
    gate: Tensor | None,  # (N, H)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k`, `v`, `distance_bias` and `gate` (empty for None). Arguments are contiguous."""
    heads = q.shape[1]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_bias, grad_gate = (q.new_empty(0) if x is None else torch.zeros_like(x) for x in (distance_bias, gate))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v, grad_bias, grad_gate
    arguments = _arguments(q, cu_seqlens, scale, dropout_p, seed, distance_bias, gate)
    launches = launches_for(q, distance_bias is not None, max_length)
    delta = torch.empty_like(logsumexp)
    with torch.cuda.device_of(q):
        launch = launches.backward_q
        _backward_q_kernel[launch.grid(launch.block_m, arguments)](
            q,
            k,
            v,
            out,
            grad_out,
            logsumexp,
            delta,
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
            grad_k,
            grad_v,
            **arguments,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            **launch.options,
        )
        if distance_bias is not None:
            launch = launches.backward_bias
            block = launch.block_m
            bands = 2 * triton.cdiv(max_length, block) - 1
            shares = min(arguments["batch"], _MAX_SHARES)
            partial = logsumexp.new_empty((shares, heads, bands, 2, block))
            _backward_bias_kernel[bands, heads, shares](
                q, k, v, grad_out, logsumexp, delta, partial, **arguments, BLOCK=block, **launch.options
            )
            _reduce_bias_kernel[triton.cdiv(grad_bias.shape[1], block), heads](
                partial, grad_bias, arguments["reach"], shares, bands, heads, BLOCK=block
            )
    return grad_q, grad_k, grad_v, grad_bias, grad_gate


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Return calls by label; tests/ops/ahead_of_time.py compiles the kernels that each call would launch."""
    plain, everything = _forward_and_backward, partial(_forward_and_backward, dropout_p=0.1, biased=True)
    return {
        "bfloat16, E=64, dropout and gated bias": partial(everything, 64, torch.bfloat16),
        "bfloat16, E=64": partial(plain, 64, torch.bfloat16),
        "bfloat16, E=64, dropout": partial(plain, 64, torch.bfloat16, dropout_p=0.1),
        "float16, E=64, dropout and gated bias": partial(everything, 64, torch.float16),
        "bfloat16, E=32": partial(plain, 32, torch.bfloat16),
        "bfloat16, E=32, dropout and gated bias": partial(everything, 32, torch.bfloat16),
        "bfloat16, E=80, dropout and gated bias": partial(everything, 80, torch.bfloat16),
        "bfloat16, E=128": partial(plain, 128, torch.bfloat16),
        "bfloat16, E=128, dropout and gated bias": partial(everything, 128, torch.bfloat16),
        "float32, E=64, dropout and gated bias": partial(everything, 64, torch.float32),
        "float32, E=128, dropout and gated bias": partial(everything, 128, torch.float32),
        "TF32, E=64, dropout and gated bias": partial(_in_tf32, partial(everything, 64, torch.float32)),
        "TF32, E=128, dropout and gated bias": partial(_in_tf32, partial(everything, 128, torch.float32)),
    }


def _in_tf32(call: Callable[[], object]) -> None:
    with fp32_precision(matrix_products="tf32"):
        call()


def _forward_and_backward(width: int, dtype: torch.dtype, dropout_p: float = 0.0, biased: bool = False) -> None:
    q = torch.zeros(800, 12, width, dtype=dtype)
    bias, gate = (torch.zeros(12, 1601), torch.zeros(800, 12)) if biased else (None, None)
    inputs = (torch.tensor([0, 800], dtype=torch.int32), 800, 0.125, dropout_p, torch.tensor(0), bias, gate)
    out, logsumexp = varlen_attention_fwd(q, q, q, *inputs)
    varlen_attention_bwd(out, q, q, q, out, logsumexp, *inputs)
