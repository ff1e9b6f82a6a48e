"""Test that log-mel frames equal a short-time Fourier transform with mel filters, whatever the batch mates."""

import math

import pytest
import torch
from torch import Tensor

from fastssl.nn.log_mel import LogMel, mel_bands, normalize_over_time
from fastssl.packing import Layout, Packed


def waveforms_of(*lengths: int) -> Packed:
    generator = torch.Generator().manual_seed(2)
    return Packed.pack([0.1 * torch.randn(length, 1, generator=generator) for length in lengths])


def triangles(bands: int) -> Tensor:  # (201, bands)
    """Compute HTK's mel filter bank, one weight at a time."""

    def mel(frequency: float) -> float:
        return 2595 * math.log10(1 + frequency / 700)

    peaks = [700 * (10 ** (mel(8000) * band / (bands + 1) / 2595) - 1) for band in range(bands + 2)]
    bank = torch.zeros(201, bands, dtype=torch.float64)
    for row in range(201):
        for band in range(bands):
            below, peak, above = peaks[band : band + 3]
            frequency = 40.0 * row
            if below < frequency <= peak:
                bank[row, band] = (frequency - below) / (peak - below)
            elif peak < frequency < above:
                bank[row, band] = (above - frequency) / (above - peak)
    return bank


def test_equals_the_fourier_transform_of_each_utterance() -> None:
    waveforms = waveforms_of(16_000, 400, 399, 7_123, 0, 560)
    frames = LogMel(80)(waveforms)
    assert frames.layout.lengths == (98, 1, 0, 43, 0, 2)
    assert torch.equal(frames.layout.cu_seqlens, waveforms.layout.after_conv(400, 160).cu_seqlens)
    window = torch.hann_window(400, dtype=torch.float64)
    for found, waveform in zip(frames.unpack(), waveforms.unpack(), strict=True):
        if len(found):
            spectrum = torch.stft(
                waveform[:, 0].double(), 400, 160, window=window, center=False, return_complex=True
            )  # (201, T)
            expected = (spectrum.abs().square().t() @ triangles(80)).clamp(min=1e-8).log()
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bands", [80, 40])
def test_filter_bank(bands: int) -> None:
    bank = mel_bands(bands)
    torch.testing.assert_close(bank, triangles(bands).float(), rtol=0, atol=1e-6)
    assert bank.sum(0).gt(0.1).all(), "a mel band contains no frequency of the transform"
    torchaudio = pytest.importorskip("torchaudio")
    theirs = torchaudio.functional.melscale_fbanks(201, 0.0, 8000.0, bands, 16000, norm=None, mel_scale="htk")
    torch.testing.assert_close(bank, theirs, rtol=0, atol=1e-4)


def test_silence_is_finite() -> None:
    frames = LogMel(80)(Packed.pack([torch.zeros(1_000, 1)]))
    torch.testing.assert_close(frames.values, torch.full((4, 80), math.log(1e-8)))
    assert normalize_over_time(frames).values.abs().max() < 1e-3


@pytest.mark.parametrize("half", ["autocast", "model"])
def test_half_precision_does_not_reach_the_spectrum(half: str) -> None:
    waveforms = waveforms_of(4_000)
    log_mel = LogMel(80)
    expected = log_mel(waveforms).values
    if half == "model":
        log_mel = log_mel.to(torch.bfloat16).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        found = log_mel(waveforms).values
    assert torch.equal(found, expected)
    assert not LogMel(80).state_dict()


def test_mean_and_variance_of_each_utterance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(90, 5, generator=generator, dtype=torch.float64)
    frames = Packed(x.float(), Layout.from_lengths([0, 60, 1, 29, 0]))
    normalised = normalize_over_time(frames)
    assert normalised.values.dtype == torch.float32
    for found, values in zip(normalised.unpack(), frames.unpack(), strict=True):
        if len(values) > 1:
            expected = (values - values.mean(0)) / values.var(0, correction=0).sqrt()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        alone = normalize_over_time(Packed.pack([values.clone()])).values
        assert torch.equal(found, alone)
    assert normalised.unpack()[2].eq(0).all()


def test_batch_mates_do_not_matter() -> None:
    waveforms = waveforms_of(9_000, 401, 3_210, 16_000)
    log_mel = LogMel(80)
    for found, waveform in zip(log_mel(waveforms).unpack(), waveforms.unpack(), strict=True):
        assert torch.equal(found, log_mel(Packed.pack([waveform.clone()])).values)
