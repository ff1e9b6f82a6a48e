"""Attention within each sequence of a packed batch, in plain PyTorch: the specification."""

import torch
from torch import Tensor

from fastssl.kernels.randomness import dropout_threshold, kept_fraction
from fastssl.packing import Layout


def varlen_attention(
    q: Tensor,  # (N, H, E)
    k: Tensor,  # (N, H, E)
    v: Tensor,  # (N, H, E)
    layout: Layout,
    *,
    scale: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    distance_bias: Tensor | None,  # (H, 2R+1)
    gate: Tensor | None,  # (N, H)
) -> Tensor:  # (N, H, E)
    """Compute one sequence at a time, so that sequences cannot mix. Arguments as in `fastssl.ops.varlen_attention`."""
    accumulation = torch.promote_types(q.dtype, torch.float32)
    outputs = []
    begin = 0
    # For an empty batch, run one empty sequence, so that every input gets a gradient of zero.
    for length in layout.lengths or (0,):
        end = begin + length
        # (H, T, E), always a copy: the bits of a matrix product depend on the alignment of its operands.
        query, key, value = (
            x[begin:end].transpose(0, 1).to(accumulation, copy=True, memory_format=torch.contiguous_format)
            for x in (q, k, v)
        )
        logits = query @ key.transpose(1, 2) * scale
        if distance_bias is not None:
            bias = _biases(distance_bias.to(accumulation), length)
            logits = logits + (bias if gate is None else bias * gate[begin:end].to(accumulation).t().unsqueeze(2))
        probabilities = logits.softmax(2)
        if seed is not None:
            rows = torch.arange(begin, end, device=q.device)
            keep = dropout_mask(seed, rows, heads=q.shape[1], keys=length, dropout_p=dropout_p, randomness=randomness)
            probabilities = probabilities * keep
            value = value / kept_fraction(dropout_p, randomness)
        outputs.append((probabilities @ value).transpose(0, 1).to(q.dtype))
        begin = end
    return torch.cat(outputs)


def _biases(
    distance_bias: Tensor,  # (H, 2R+1)
    length: int,
) -> Tensor:  # (H, T, T)
    """Return the bias of each pair of a query and a key in a sequence of T = `length` frames."""
    reach = distance_bias.shape[1] // 2
    positions = torch.arange(length, device=distance_bias.device)
    distances = positions - positions.unsqueeze(1)  # key minus query
    return distance_bias[:, distances.clamp(-reach, reach) + reach]


def dropout_mask(
    seed: Tensor,  # ()
    rows: Tensor,  # (T,)
    *,
    heads: int,
    keys: int,
    dropout_p: float,
    randomness: int,
) -> Tensor:  # (H, T, keys)
    """Return which attention weights dropout keeps, from a hash of seed, query row, head and key (see README.md).

    The hash uses unsigned 32-bit arithmetic, done here in int32. Products wrap to the same bits, so only shifts and
    comparisons need to handle the sign.

    Args:
        seed: () int64 seed.
        rows: (T,) row numbers of the queries in the packed batch.
        heads: H, the number of heads.
        keys: Number of keys, numbered from 0 within their sequence.
        dropout_p: Probability of dropping a weight.
        randomness: Version of the random draws (`fastssl.kernels.randomness`).

    Returns:
        (H, T, keys) bool, True where a weight is kept.
    """
    state = _mix(seed.to(torch.int32) ^ (0x9E3779B9 - 2**32))
    state = _mix(state ^ (seed >> 32).to(torch.int32))
    state = _mix(state ^ rows.to(torch.int32))
    state = _mix(state ^ torch.arange(heads, dtype=torch.int32, device=rows.device).unsqueeze(1))
    key = torch.arange(keys, dtype=torch.int32, device=rows.device)
    if randomness == 1:
        draws = _mix(state.unsqueeze(2) ^ key)
    else:  # keys that differ in bit 3 share a hash; the upper 16 bits of a draw decide
        shared = _mixed_product(state.unsqueeze(2) ^ (key & ~8))
        draws = torch.where((key & 8) == 0, shared + (shared << 16), shared)
    # Flipping the highest bit maps uint32 to int32 and preserves the order.
    return (draws ^ -(2**31)) >= dropout_threshold(dropout_p, randomness) - 2**31


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of 32-bit MurmurHash3 to int32 numbers."""
    x = _mixed_product(x)
    return x ^ ((x >> 16) & 0xFFFF)


def _mixed_product(x: Tensor) -> Tensor:
    """Apply that finaliser without its last step."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * (0x85EBCA6B - 2**32)
    x = x ^ ((x >> 13) & 0x7FFFF)
    return x * (0xC2B2AE35 - 2**32)
