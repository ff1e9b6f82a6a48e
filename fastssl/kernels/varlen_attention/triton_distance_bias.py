"""Triton kernels of `varlen_attention` for the gradient of the distance bias. README.md has the method."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.varlen_attention.triton_tiles import LOG2E, SIZES, biases_at, is_kept, load_rows

# Largest number of programs that share the sequences of a batch, per head and band of distances.
_MAX_SHARES = 16


@triton.jit(do_not_specialize=SIZES)
def _backward_bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    states_ptr,
    partial_ptr,
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
    biases = biases_at(bias_ptr + head * (2 * reach + 1), (places + ahead * BLOCK)[None, :] - places[:, None], reach)
    biases *= LOG2E

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for sequence in range(tl.program_id(2), batch, shares):
        begin = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
        offset = begin.to(tl.int64) * stride + head * E
        per_row = head.to(tl.int64) * total + begin
        blocks = tl.where(length > 1, tl.cdiv(length, BLOCK), 0)
        for block in range(tl.maximum(0, -ahead), tl.minimum(blocks, blocks - ahead)):
            rows = block * BLOCK + places
            first_key = (block + ahead) * BLOCK
            keys = first_key + places
            q = load_rows(q_ptr + offset, rows, length, stride, E, BLOCK_E)
            k = load_rows(k_ptr + offset, keys, length, stride, E, BLOCK_E)
            logsumexp = tl.load(logsumexp_ptr + per_row + rows, mask=rows < length, other=float("inf"))
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if gate_ptr is not None:
                per_gate = (begin + rows).to(tl.int64) * heads + head
                gate = tl.load(gate_ptr + per_gate, mask=rows < length, other=0.0).to(tl.float32)[:, None]
                logits += gate * biases
            else:
                logits += biases
            weights = tl.where((keys < length)[None, :], tl.exp2(logits - logsumexp[:, None]), 0.0)
            grad_out = load_rows(grad_out_ptr + offset, rows, length, stride, E, BLOCK_E)
            v = load_rows(v_ptr + offset, keys, length, stride, E, BLOCK_E)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            if states_ptr is not None:
                states = tl.load(states_ptr + per_row + rows, mask=rows < length, other=0).to(tl.uint32)
                kept = is_kept(states[:, None], first_key, places[None, :], threshold, RANDOMNESS)
                grad_weights = tl.where(kept, grad_weights, 0.0) * keep_factor
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


def distance_bias_grad(
    grad_bias: Tensor,  # (H, 2R+1)
    inputs: tuple[Tensor | None, ...],
    arguments: dict[str, Any],
    max_length: int,
    block: int,
    options: dict[str, int],
) -> None:
    """Compute the gradient of the distance bias.

    Args:
        grad_bias: (H, 2R+1) result.
        inputs: q, k, v and grad_out (N, H, E), then logsumexp, D and the states of the dropout hash (H, N).
        arguments: The arguments that all kernels of the op share, by name.
        max_length: Length of the longest sequence in frames.
        block: Queries, and keys, of a tile.
        options: Launch options of the kernel that computes tiles.
    """
    heads = arguments["heads"]
    bands = 2 * triton.cdiv(max_length, block) - 1
    shares = min(arguments["batch"], _MAX_SHARES)
    partial_sums = grad_bias.new_empty((shares, heads, bands, 2, block), dtype=torch.float32)
    _backward_bias_kernel[bands, heads, shares](*inputs, partial_sums, **arguments, BLOCK=block, **options)
    _reduce_bias_kernel[triton.cdiv(grad_bias.shape[1], block), heads](
        partial_sums, grad_bias, arguments["reach"], shares, bands, heads, BLOCK=block
    )
