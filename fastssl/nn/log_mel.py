"""Log-mel spectrograms of packed waveforms, and normalisation over each utterance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastssl.nn.linear import packed_linear
from fastssl.nn.waveforms import as_samples
from fastssl.packing import Layout, Packed

_SAMPLE_RATE_HZ = 16000
#: Length of a window (25 ms) and step from one window to the next (10 ms), in samples.
WINDOW_SAMPLES, HOP_SAMPLES = 400, 160
#: Lower limit of the power of a mel band, about the rounding noise of 16-bit audio. It keeps digital silence from
#: becoming an outlier.
_FLOOR = 1e-8
#: Added to the variance, so that a band that never changes becomes zero.
_EPS = 1e-5


class LogMel(nn.Module):
    """Computes log-mel frames: the natural logarithm of the power in each mel band.

    A frame is computed from a Hann window of 25 ms, and a window begins every 10 ms. The bands follow HTK's mel scale,
    from 0 to 8 kHz. Waveforms are not padded: a frame depends on samples of its own utterance only, and an utterance
    shorter than one window has no frame. Computation is in fp32 (fp64 for fp64 waveforms), also under autocast and in
    half-precision models.

    Example:
        >>> import torch
        >>> from fastssl import Packed
        >>> from fastssl.nn import LogMel
        >>> waveforms = Packed.pack([torch.randn(16_000, 1), torch.randn(52_000, 1)])  # 16 kHz
        >>> frames = LogMel(80)(waveforms)
        >>> frames.layout.lengths, frames.values.shape
        ((98, 323), torch.Size([421, 80]))

    Args:
        bands: Number of mel bands.
    """

    fourier: Tensor  # (2F, 400) for F = 201 frequencies
    bands: Tensor  # (bands, 2F)

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.register_buffer("fourier", _windowed_fourier(), persistent=False)
        self.register_buffer("bands", mel_bands(bands).t().repeat(1, 2).contiguous(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LogMel":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.fourier.dtype in (torch.float16, torch.bfloat16):
            # Half precision is too coarse for a spectrum, so recompute the buffers in fp32.
            self.fourier = _windowed_fourier().to(self.fourier.device)
            self.bands = mel_bands(len(self.bands)).t().repeat(1, 2).contiguous().to(self.bands.device)
        return self

    def forward(self, waveforms: Packed) -> Packed:
        """Compute log-mel frames.

        Args:
            waveforms: (N samples,) or (N samples, 1) packed 16 kHz waveforms.

        Returns:
            (N frames, bands) in fp32, or fp64 for fp64 waveforms: 98 frames for one second.
        """
        waveforms = as_samples(waveforms)
        dtype = torch.promote_types(waveforms.values.dtype, torch.float32)
        with torch.autocast(waveforms.values.device.type, enabled=False):
            windows, layout = _windows(waveforms)
            parts = packed_linear(windows.to(dtype), self.fourier.to(dtype), None)
            # Real and imaginary parts are side by side, so one product adds their squares and weights them by band.
            power = packed_linear(parts.square(), self.bands.to(dtype), None)
        return Packed(power.clamp(min=_FLOOR).log(), layout)


def mel_layout(layout: Layout) -> Layout:
    """Compute the layout of the log-mel frames from the layout of the samples."""
    return layout.after_conv(WINDOW_SAMPLES, HOP_SAMPLES)


def _windows(waveforms: Packed) -> Packed:  # (N samples, 1) -> (N frames, 400)
    """Return the samples of each window."""
    layout = mel_layout(waveforms.layout)
    begin = waveforms.layout.rows(layout.sequence_ids, HOP_SAMPLES * layout.positions)
    samples = begin.unsqueeze(1) + torch.arange(WINDOW_SAMPLES, device=begin.device)
    return Packed(waveforms.values.squeeze(1)[samples], layout)


def normalize_over_time(frames: Packed) -> Packed:
    """Normalise each channel of each utterance to zero mean and unit variance.

    Args:
        frames: (N, C) packed frames.

    Returns:
        (N, C) in the dtype of `frames`; computed in fp64.
    """
    x, layout = frames
    counts = layout.divisors.unsqueeze(1)
    sequence = layout.sequence_ids
    centred = x.double()
    centred = centred - (layout.sums(centred) / counts)[sequence]
    variance = layout.sums(centred.square()) / counts
    return Packed((centred * (variance + _EPS).rsqrt()[sequence]).to(x.dtype), layout)


def _windowed_fourier() -> Tensor:  # (2F, 400)
    """Return the matrix of the Hann window and Fourier transform: F rows of real parts, then F of imaginary parts."""
    sample = torch.arange(WINDOW_SAMPLES, device="cpu")
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * sample.double() / WINDOW_SAMPLES)
    frequency = torch.arange(WINDOW_SAMPLES // 2 + 1, device="cpu")
    angles = 2 * math.pi / WINDOW_SAMPLES * (frequency.unsqueeze(1) * sample % WINDOW_SAMPLES).double()
    return (torch.cat([angles.cos(), -angles.sin()]) * window).float()


def mel_bands(bands: int) -> Tensor:  # (F, bands)
    """Compute triangular filters of equal width on HTK's mel scale, 2595 log10(1 + f / 700).

    Each filter rises from the peak of the previous one to its own peak and falls to the peak of the next.

    Args:
        bands: Number of filters between 0 and 8 kHz.

    Returns:
        (201, bands) fp32 weight of each frequency of a window (0 to 8 kHz in steps of 40 Hz) in each band.
    """
    frequencies = torch.linspace(0, _SAMPLE_RATE_HZ / 2, WINDOW_SAMPLES // 2 + 1, dtype=torch.float64, device="cpu")
    highest = 2595 * math.log10(1 + _SAMPLE_RATE_HZ / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, highest, bands + 2, dtype=torch.float64, device="cpu") / 2595) - 1)
    widths = corners.diff()
    distances = frequencies.unsqueeze(1) - corners  # (F, bands + 2)
    rising, falling = distances[:, :-2] / widths[:-1], -distances[:, 2:] / widths[1:]
    return torch.minimum(rising, falling).clamp(min=0).float()
