"""Random numbers that depend on an utterance and not on its place in a batch.

A counter is hashed, so every draw of an utterance is a function of its key alone: the same on any rank, at any batch
position, on any device, and after a restart. The mixer is SplitMix64 (`kernels.splitmix`), which kernels know too.
"""

import math

import torch
from torch import Tensor

from fastssl.kernels import splitmix


def utterance_keys(seed: int, update: int, ids: Tensor) -> Tensor:
    """Keys from which everything random about an utterance in one update derives.

    Args:
        seed: Of the run.
        update: Optimiser update, from 0; -1 for validation, which is the same every time.
        ids: (B,) int64, the identity of each utterance.

    Returns:
        (B,) int64 on the device of `ids`.
    """
    start = int(splitmix.mix(torch.tensor(splitmix.signed(seed + splitmix.GOLDEN))))
    start = int(splitmix.mix(torch.tensor(splitmix.signed(start + (update + 1) * splitmix.GOLDEN))))
    return splitmix.mix(ids ^ start)


def draw_keys(batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """(batch,) int64 keys drawn from a generator, for callers who keep no utterance identities."""
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (batch,), generator=generator, device=device)


def noise_seeds(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Seeds for a kernel that draws by itself, as `ops.gumbel_quantize`: number i of one is counter + i of its key.

    Args:
        keys: int64, broadcast against `counters`.
        counters: int64, not negative: the first number of the stream to draw.
        stream: What the numbers are for; streams of one key are independent.

    Returns:
        int64 of the broadcast shape.
    """
    return splitmix.mix(keys + splitmix.signed((stream + 1) * splitmix.GOLDEN)) + counters * splitmix.GOLDEN


def uniform(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Uniform numbers in (0, 1).

    Args:
        keys: int64, broadcast against `counters`.
        counters: int64, not negative: which number of the stream.
        stream: What the numbers are for; streams of one key are independent.

    Returns:
        fp32 odd multiples of 2^-24: neither 0 nor 1 is among them, so their logarithms are finite.
    """
    return splitmix.uniform(noise_seeds(keys, counters, stream=stream), torch.zeros_like(counters))


def gumbel(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Standard Gumbel noise, -log(-log(u)). Arguments as in `uniform`."""
    return -torch.log(-torch.log(uniform(keys, counters, stream=stream)))


def normal(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Standard normal numbers, fp32 up to 5.8 from 0 (Box and Muller's transform). Arguments as in `uniform`."""
    radius, angle = (uniform(keys, 2 * counters + part, stream=stream).double() for part in (0, 1))
    return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)).float()
