"""The fixed sets of utterance lengths that all benchmarks use, and batches of noise with these lengths."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastssl.packing import Packed

SAMPLE_RATE_HZ = 16000
FRAMES_PER_S = 50


def read_speech(utterances: int) -> list[float]:
    """Return lengths in seconds like those of LibriSpeech: most from 12 to 16 s, some down to 1.5 s, none above 17 s.

    The mean length is about 12.2 s.
    """
    return _in_any_order(np.quantile(_read_speech_sample(), _middles(utterances)).tolist())


@cache
def _read_speech_sample() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    generator = np.random.default_rng(0)
    body, tail = generator.normal(14.2, 1.2, 72_000), generator.uniform(1.5, 13, 28_000)
    lengths_s: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.concatenate([body, tail]).clip(1.5, 17)
    return lengths_s


def short(utterances: int) -> list[float]:
    """Return lengths in seconds spread evenly from 1 to 5 s, like voice commands and turns of a conversation."""
    return _in_any_order([1 + 4 * q for q in _middles(utterances)])


def equal(utterances: int) -> list[float]:
    """Return equal lengths of 15.6 s, so that a batch needs no padding."""
    return [15.6] * utterances


def long(utterances: int) -> list[float]:
    """Return equal lengths of 60 s."""
    return [60.0] * utterances


def even(utterances: int) -> list[float]:
    """Return lengths in seconds spread evenly from 1.5 to 17 s, like a batch drawn without sorting by length."""
    return _in_any_order(np.linspace(1.5, 17, utterances).tolist())


def after_compression(utterances: int) -> list[float]:
    """Return lengths in seconds spread evenly over 25 to 200 frames of 20 ms, like sequences compressed fourfold."""
    return _in_any_order([(25 + 175 * q) / FRAMES_PER_S for q in _middles(utterances)])


#: Lengths in seconds of the 12 crops that make up a batch of the tiny model in every study.
CROPS = [4.0] * 12
#: Lengths in seconds of an uneven batch: 38 s of audio, 64 s when padded.
FOUR_UNEVEN = [3.0, 16.0, 7.0, 12.0]


def utterances_for(audio_s: float) -> int:
    """Return how many utterances of `read_speech` add up to about `audio_s` seconds."""
    return max(1, round(audio_s / float(_read_speech_sample().mean())))


def frames(lengths_s: Sequence[float]) -> list[int]:
    """Return the number of frames of an encoder with 50 frames per second, for lengths in seconds."""
    return [max(1, (samples - 80) // 320) for samples in samples_of(lengths_s)]


def samples_of(lengths_s: Sequence[float]) -> list[int]:
    """Return the number of samples at 16 kHz, for lengths in seconds."""
    return [round(seconds * SAMPLE_RATE_HZ) for seconds in lengths_s]


def waveforms(lengths_s: Sequence[float], device: torch.device) -> Packed:
    """Return a packed batch of Gaussian noise with unit variance, (N, 1) fp32 at 16 kHz; always the same noise."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(samples, 1, generator=generator) for samples in samples_of(lengths_s)]
    return Packed.pack(noise).to(device)


def padded(batch: Packed) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """Return the same waveforms padded with zeros, and an int64 attention mask as Transformers takes it."""
    lengths = batch.layout.cu_seqlens.diff()
    mask = torch.arange(batch.layout.max_length, device=lengths.device) < lengths.unsqueeze(1)
    return batch.to_padded().squeeze(-1), mask.long()


def padding_factor(lengths_s: Sequence[float]) -> float:
    """Return the ratio of padded to valid audio if the utterances are padded to the longest."""
    return len(lengths_s) * max(lengths_s) / sum(lengths_s)


def _middles(count: int) -> list[float]:
    return [(i + 0.5) / count for i in range(count)]


def _in_any_order(lengths_s: list[float]) -> list[float]:
    order = np.random.default_rng(1).permutation(len(lengths_s))
    return [lengths_s[i] for i in order]
