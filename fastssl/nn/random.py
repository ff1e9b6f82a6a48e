"""Random numbers that depend on an utterance and not on its place in a batch.

A counter is hashed, so every draw of an utterance is a function of its key alone: the same on any rank, at any batch
position, on any device, and after a restart. The mixer is SplitMix64 (Steele, Lea, Flood 2014).
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def utterance_keys(seed: int, update: int, ids: Tensor) -> Tensor:
    """Keys from which everything random about an utterance in one update derives.

    Args:
        seed: Of the run.
        update: Optimiser update, from 0; -1 for validation, which is the same every time.
        ids: (B,) int64, the identity of each utterance.

    Returns:
        (B,) int64 on the device of `ids`.
    """
    start = int(_mix(torch.tensor(_signed(seed + _GOLDEN))))
    start = int(_mix(torch.tensor(_signed(start + (update + 1) * _GOLDEN))))
    return _mix(ids ^ start)


def draw_keys(batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """(batch,) int64 keys drawn from a generator, for callers who keep no utterance identities."""
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (batch,), generator=generator, device=device)


def uniform(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Uniform numbers in (0, 1).

    Args:
        keys: int64, broadcast against `counters`.
        counters: int64, not negative: which number of the stream.
        stream: What the numbers are for; streams of one key are independent.

    Returns:
        fp32 odd multiples of 2^-24: neither 0 nor 1 is among them, so their logarithms are finite.
    """
    bits = _mix(_mix(keys + _signed((stream + 1) * _GOLDEN)) + counters * _GOLDEN)
    return _shift_right(bits, 41).to(torch.float32) * 2.0**-23 + 2.0**-24


def gumbel(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Standard Gumbel noise, -log(-log(u)). Arguments as in `uniform`."""
    return -torch.log(-torch.log(uniform(keys, counters, stream=stream)))
