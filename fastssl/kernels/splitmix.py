"""SplitMix64 in plain PyTorch: the specification of random numbers that depend only on a seed and a counter.

From Steele, Lea and Flood (OOPSLA 2014). Number i of a seed is computed from mix(seed + i * GOLDEN). So
seed + c * GOLDEN is also a seed: its number i is number c + i of the original seed.
"""

import torch
from torch import Tensor


def signed(value: int) -> int:
    """Convert to int64: the signed number with the low 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift the bits of int64 numbers to the right as if they were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser, which maps int64 numbers of any shape to int64 hashes, one to one."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Draw uniform random numbers in (0, 1).

    Args:
        seeds: int64 seeds, broadcast against `counters`.
        counters: int64 index of each number.

    Returns:
        fp32 in the broadcast shape, odd multiples of 2^-24.
    """
    # The exclusive or hides an arange from Inductor (PyTorch 2.14), which would treat the product as an index and
    # overflow.
    bits = mix(seeds + (counters ^ 0) * GOLDEN)
    return _shift_right(bits, 41).to(torch.float32) * 2.0**-23 + 2.0**-24


def gumbel(seeds: Tensor, counters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard Gumbel noise: -log(-log(u)) with u from `uniform`.

    Args:
        seeds: int64 seeds, broadcast against `counters`.
        counters: int64 index of each number.
        dtype: Dtype of the logarithms and the result; u is the same for every dtype.

    Returns:
        Noise in the broadcast shape.
    """
    return -torch.log(-torch.log(uniform(seeds, counters).to(dtype)))
