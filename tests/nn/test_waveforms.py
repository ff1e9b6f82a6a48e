"""Test the shape and the normalisation of packed waveforms."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.data.waveforms import pack_waveforms
from fastssl.nn import FeatureExtractor, LogMel
from fastssl.nn.waveforms import as_samples, normalize_waveforms
from fastssl.packing import Layout, Packed


def raw(*lengths: int, dtype: torch.dtype = torch.float32) -> Packed:
    """Return quiet noise with an offset, (N,)."""
    generator = torch.Generator().manual_seed(1)
    samples = [0.3 + 0.05 * torch.randn(length, generator=generator, dtype=dtype) for length in lengths]
    return Packed(torch.cat([torch.empty(0, dtype=dtype), *samples]), Layout.from_lengths(lengths))


def test_both_shapes_become_one_column() -> None:
    flat = raw(5, 0, 3)
    column = Packed(flat.values.unsqueeze(1), flat.layout)
    for waveforms in (flat, column):
        samples = as_samples(waveforms)
        assert samples.values.shape == (8, 1)
        assert samples.values.data_ptr() == flat.values.data_ptr()
        assert samples.layout is flat.layout
    for shape in ((8, 2), (8, 1, 1), ()):
        with pytest.raises(ValueError, match=r"noise: expected \(N,\) or \(N, 1\) samples, got"):
            as_samples(Packed(torch.zeros(shape), flat.layout), "noise")
    with pytest.raises(ValueError, match=r"waveforms: expected floating-point samples, got torch.int16; divide 16-bit"):
        as_samples(Packed(torch.zeros(8, dtype=torch.int16), flat.layout))
    for number in (7, 9):
        with pytest.raises(ValueError, match=rf"waveforms: expected 8 samples for this layout, got {number}"):
            as_samples(Packed(torch.zeros(number), flat.layout))
    wrong: list[Any] = [torch.zeros(1, 8), torch.zeros(2, 8), [torch.zeros(8)], [torch.zeros(8), torch.zeros(8)]]
    for waveforms in wrong:
        with pytest.raises(ValueError, match=r"waveforms: expected a fastssl.Packed, got .*; give fastssl.Packed.pack"):
            as_samples(waveforms)


def test_front_ends_take_both_shapes() -> None:
    flat = raw(1_000, 400, 0)
    for front_end in (FeatureExtractor([8, 8], [10, 3], [5, 2], bias=False, norm="group"), LogMel(20)):
        found, expected = front_end(flat), front_end(Packed(flat.values.unsqueeze(1), flat.layout))
        assert torch.equal(found.values, expected.values)
        assert found.values.numel()


def test_equals_what_data_workers_and_transformers_compute() -> None:
    flat = raw(16_000, 1, 0, 801)
    found = normalize_waveforms(flat).unpack()
    packed = pack_waveforms([part.numpy() for part in flat.unpack()], normalize=True)
    torch.testing.assert_close(torch.cat(found).squeeze(1), torch.from_numpy(packed), rtol=3e-7, atol=1e-9)
    extractor = pytest.importorskip("transformers").Wav2Vec2FeatureExtractor(do_normalize=True)
    expected = extractor(flat.unpack()[0].numpy(), sampling_rate=16_000)["input_values"][0]
    torch.testing.assert_close(found[0].squeeze(1), torch.as_tensor(expected), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=5))
def test_batch_mates_do_not_matter(lengths: list[int]) -> None:
    together = normalize_waveforms(raw(*lengths))
    assert together.values.shape == (sum(lengths), 1)
    for found, part in zip(together.unpack(), raw(*lengths).unpack(), strict=True):
        assert torch.equal(found, normalize_waveforms(Packed.pack([part])).values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_silence_becomes_zeros_and_the_dtype_stays(dtype: torch.dtype) -> None:
    parts = [torch.zeros(50), torch.full((50,), 0.3), torch.empty(0), torch.ones(1), torch.randn(4_000) * 0.01]
    found = normalize_waveforms(Packed.pack([part.to(dtype) for part in parts]))
    assert found.values.dtype == dtype
    assert found.values.isfinite().all()
    *constant, noise = found.unpack()
    assert all(part.abs().max() < 1e-6 for part in constant if len(part))
    assert noise.double().square().mean().item() == pytest.approx(1, rel=1e-2)


def test_a_bad_waveform_spoils_no_other() -> None:
    first, second = torch.randn(50), torch.randn(60)
    first[3] = torch.nan
    found = normalize_waveforms(Packed.pack([first, second])).unpack()
    assert found[0].isnan().all()
    assert torch.equal(found[1], normalize_waveforms(Packed.pack([second])).values)


def test_gradients_flow_through_mean_and_variance() -> None:
    waveforms = raw(7, 0, 1, 4, dtype=torch.float64)

    def scaled(values: Tensor) -> Tensor:
        return normalize_waveforms(Packed(values, waveforms.layout)).values

    torch.autograd.gradcheck(scaled, waveforms.values.requires_grad_())
    torch.autograd.gradcheck(scaled, torch.zeros(12, dtype=torch.float64, requires_grad=True), eps=1e-9, atol=1e-3)
