"""Lengths of the batches that are measured, always the same ones, and batches of noise of these lengths."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastssl.packing import Packed

SAMPLE_RATE_HZ = 16000
FRAMES_PER_S = 50


def read_speech(utterances: int) -> list[float]:
    """Seconds, as in LibriSpeech: most 12 to 16 s, a tail from 1.5 s, at most 17 s; 12.2 s on average."""
    return _in_any_order(np.quantile(_read_speech_sample(), _middles(utterances)).tolist())


@cache
def _read_speech_sample() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    generator = np.random.default_rng(0)
    body, tail = generator.normal(14.2, 1.2, 72_000), generator.uniform(1.5, 13, 28_000)
    lengths_s: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.concatenate([body, tail]).clip(1.5, 17)
    return lengths_s


def short(utterances: int) -> list[float]:
    """Seconds, evenly from 1 to 5 s: commands and turns of a conversation."""
    return _in_any_order([1 + 4 * q for q in _middles(utterances)])


def equal(utterances: int) -> list[float]:
    """Seconds, all 15.6 s: nothing to pad."""
    return [15.6] * utterances


def long(utterances: int) -> list[float]:
    """Seconds, all 60 s."""
    return [60.0] * utterances


def even(utterances: int) -> list[float]:
    """Seconds, evenly from 1.5 to 17 s: a batch drawn without sorting by length."""
    return _in_any_order(np.linspace(1.5, 17, utterances).tolist())


def after_compression(utterances: int) -> list[float]:
    """Seconds, evenly from 25 to 200 frames: what is left after compression to a quarter."""
    return _in_any_order([(25 + 175 * q) / FRAMES_PER_S for q in _middles(utterances)])


#: Seconds of 12 crops, on which every study here trains the tiny model.
CROPS = [4.0] * 12
#: The batch on which the first profile was taken: 38 s of audio in 64 s of padded batch.
FOUR_UNEVEN = [3.0, 16.0, 7.0, 12.0]


def utterances_for(audio_s: float) -> int:
    """How many utterances of `read_speech` make so much audio."""
    return max(1, round(audio_s / float(_read_speech_sample().mean())))


def frames(lengths_s: Sequence[float]) -> list[int]:
    """Frames of a 50 Hz encoder for seconds of audio."""
    return [max(1, (samples - 80) // 320) for samples in samples_of(lengths_s)]


def samples_of(lengths_s: Sequence[float]) -> list[int]:
    return [round(seconds * SAMPLE_RATE_HZ) for seconds in lengths_s]


def waveforms(lengths_s: Sequence[float], device: torch.device) -> Packed:
    """Noise of unit variance at 16 kHz, (N, 1)."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(samples, 1, generator=generator) for samples in samples_of(lengths_s)]
    return Packed.pack(noise).to(device)


def padded(batch: Packed) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """The same waveforms padded, and Transformers' attention mask."""
    lengths = batch.layout.cu_seqlens.diff()
    mask = torch.arange(batch.layout.max_length, device=lengths.device) < lengths.unsqueeze(1)
    return batch.to_padded().squeeze(-1), mask.long()


def padding_factor(lengths_s: Sequence[float]) -> float:
    """Padded over valid audio."""
    return len(lengths_s) * max(lengths_s) / sum(lengths_s)


def _middles(count: int) -> list[float]:
    return [(i + 0.5) / count for i in range(count)]


def _in_any_order(lengths_s: list[float]) -> list[float]:
    order = np.random.default_rng(1).permutation(len(lengths_s))
    return [lengths_s[i] for i in order]
