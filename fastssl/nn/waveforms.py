"""Waveforms as encoders take them: the shape of a packed batch of samples, and zero mean and unit variance."""

import torch
from torch import Tensor

from fastssl.data.waveforms import EPS
from fastssl.packing import Packed


def as_samples(waveforms: Packed, name: str = "waveforms") -> Packed:
    """Return packed waveforms with one channel.

    Args:
        waveforms: (N,) or (N, 1) samples.
        name: Name of the argument, for the error message.

    Returns:
        (N, 1) samples, a view of the same memory.

    Raises:
        ValueError: `waveforms` is not packed, or the samples have another shape or are not floating-point numbers.
    """
    given: object = waveforms
    if not isinstance(given, tuple) or len(given) != 2:
        raise ValueError(
            f"{name}: expected a fastssl.Packed, got {type(given).__name__}; give "
            "fastssl.Packed.pack([waveform, ...]), with one tensor per utterance and without padding"
        )
    values, layout = waveforms
    if values.dim() == 1:
        values = values.unsqueeze(1)
    if values.dim() != 2 or values.shape[1] != 1:
        raise ValueError(f"{name}: expected (N,) or (N, 1) samples, got {tuple(values.shape)}")
    if len(values) != layout.total:
        raise ValueError(f"{name}: expected {layout.total} samples for this layout, got {len(values)}")
    if not values.is_floating_point():
        raise ValueError(f"{name}: expected floating-point samples, got {values.dtype}; divide 16-bit audio by 32768")
    return Packed(values, layout)


def normalize_waveforms(waveforms: Packed) -> Packed:
    """Scale each utterance to zero mean and unit variance, as Transformers' `Wav2Vec2FeatureExtractor` does.

    Each utterance is computed alone, so its bits do not depend on the batch. Gradients flow through mean and variance.

    Args:
        waveforms: (N,) or (N, 1) samples; an utterance may be empty.

    Returns:
        (N, 1) samples in the same dtype; computed in fp64. A constant utterance becomes zeros.
    """
    samples, layout = as_samples(waveforms)
    parts = [standardized(part) for part in Packed(samples, layout).unpack()]
    return Packed(torch.cat(parts) if parts else samples, layout)


def standardized(waveform: Tensor) -> Tensor:  # (T, 1) -> (T, 1)
    """Scale one waveform to zero mean and unit variance, in fp64: (x - mean) / sqrt(variance + 1e-7)."""
    exact = waveform.double()
    centred = exact - exact.mean()
    return (centred / (centred.square().mean() + EPS).sqrt()).to(waveform.dtype)
