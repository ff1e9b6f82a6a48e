"""Random numbers that depend on an utterance and not on its place in a batch.

Each number is a hash of the utterance's key and a counter. So it is the same on any rank, at any batch position, on any
device and after a restart. The hash is SplitMix64 (`kernels.splitmix`), which the kernels implement too.
"""

import math

import torch
from torch import Tensor

from fastssl.kernels import splitmix


def utterance_keys(seed: int, update: int, ids: Tensor) -> Tensor:
    """Compute the keys of utterances in one update; all their random numbers derive from these.

    Args:
        seed: Seed of the training run.
        update: Number of the optimiser update, from 0; -1 for validation, whose random numbers never change.
        ids: (B,) int64 numbers, each of which identifies an utterance.

    Returns:
        (B,) int64 keys on the device of `ids`.
    """
    start = int(splitmix.mix(torch.tensor(splitmix.signed(seed + splitmix.GOLDEN), device="cpu")))
    start = int(splitmix.mix(torch.tensor(splitmix.signed(start + (update + 1) * splitmix.GOLDEN), device="cpu")))
    return splitmix.mix(ids ^ start)


def draw_keys(batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Draw keys from a generator, for callers that do not number their utterances.

    Args:
        batch: B, the number of keys.
        generator: Generator on `device`; None uses PyTorch's global one.
        device: Device of the keys.

    Returns:
        (B,) int64 keys.
    """
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (batch,), generator=generator, device=device)


def noise_seeds(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Compute seeds for kernels that draw random numbers themselves, such as `ops.gumbel_quantize`.

    Number i of a seed is number counter + i of the key's stream.

    Args:
        keys: int64 keys, broadcast against `counters`.
        counters: int64, at least 0: index of the first number of the stream to draw.
        stream: Number of the stream. Use one stream per purpose: streams of the same key are independent.

    Returns:
        int64 seeds in the broadcast shape.
    """
    return splitmix.mix(keys + splitmix.signed((stream + 1) * splitmix.GOLDEN)) + counters * splitmix.GOLDEN


def uniform(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Draw uniform random numbers in (0, 1).

    Args:
        keys: int64 keys, broadcast against `counters`.
        counters: int64, at least 0: index of each number in the stream.
        stream: Number of the stream. Use one stream per purpose: streams of the same key are independent.

    Returns:
        fp32 in the broadcast shape, odd multiples of 2^-24. They are never 0 or 1, so their logarithms are finite.
    """
    return splitmix.uniform(noise_seeds(keys, counters, stream=stream), torch.zeros_like(counters))


def gumbel(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Draw standard Gumbel noise in fp32: -log(-log(u)) with u from `uniform`, which has the same arguments."""
    return -torch.log(-torch.log(uniform(keys, counters, stream=stream)))


def normal(keys: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Draw standard normal random numbers by the Box-Muller transform, each from two numbers of the stream.

    Args:
        keys: int64 keys, broadcast against `counters`.
        counters: int64, at least 0: index of each normal number; number i uses numbers 2i and 2i + 1 of the stream.
        stream: Number of the stream, as in `uniform`.

    Returns:
        fp32 in the broadcast shape, between -5.8 and 5.8.
    """
    radius, angle = (uniform(keys, 2 * counters + part, stream=stream).double() for part in (0, 1))
    return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)).float()
