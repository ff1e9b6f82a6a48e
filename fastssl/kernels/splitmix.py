"""SplitMix64 in plain PyTorch: the specification of random numbers that are a function of a seed and a counter alone.

The mixer is that of Steele, Lea and Flood (OOPSLA 2014). Number i of a seed is made of mix(seed + i * GOLDEN), so a
seed with a counter added, seed + c * GOLDEN, is again a seed: its number i is number c + i of the first.
"""

import torch
from torch import Tensor


def signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser, on int64."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), fp32 odd multiples of 2^-24; `seeds` and `counters` are int64 and broadcast."""
    # The exclusive or hides an arange from Inductor (2.14), which would take the product for an index and overflow.
    bits = mix(seeds + (counters ^ 0) * GOLDEN)
    return _shift_right(bits, 41).to(torch.float32) * 2.0**-23 + 2.0**-24


def gumbel(seeds: Tensor, counters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), computed in `dtype` from the same u. Arguments as in `uniform`."""
    return -torch.log(-torch.log(uniform(seeds, counters).to(dtype)))
