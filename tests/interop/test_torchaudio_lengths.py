"""Test that accelerated torchaudio encoders take lengths as the original does: of any dtype, and beyond the batch."""

import copy
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastssl
from fastssl.interop.lengths import frame_lengths, frames_after, valid_samples
from tests.interop.tiny_models import assert_close
from tests.interop.tiny_torchaudio import TINY, batch_of, make

CONVOLUTIONS = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]
LARGE = "wav2vec2 large"  # without a group norm, so that only the number of valid frames matters
INF, NAN = math.inf, math.nan
LENGTHS = {
    "float32": torch.tensor([5000.0, 900.0, 3300.0]),
    "float64 with fractions": torch.tensor([4999.9, 1040.5, 719.99], dtype=torch.float64),
    "float16": torch.tensor([5000.0, 901.0, 3333.0], dtype=torch.float16),
    "bfloat16": torch.tensor([5000.0, 901.0, 3333.0], dtype=torch.bfloat16),
    "int16": torch.tensor([5000, 900, 3300], dtype=torch.int16),
    "int32, beyond": torch.tensor([5001, 900, 2_000_000], dtype=torch.int32),
    "uint8, which wraps": torch.tensor([250, 9, 0], dtype=torch.uint8),
    "int64, below zero": torch.tensor([5000, -100, 3300]),
    "float, not finite": torch.tensor([INF, -INF, 3300.0]),
    "NaN": torch.tensor([NAN, 900.0, 3300.0]),
    "zeros": torch.zeros(3),
    "one for all": torch.tensor([2000]),
    "one for all, beyond": torch.tensor([9000.0]),
}


@pytest.mark.parametrize("norm", ["valid", "padded"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths_are_taken_and_returned_as_by_the_original(lengths: Tensor, norm: Literal["valid", "padded"]) -> None:
    original = make(LARGE)
    model = fastssl.accelerate(copy.deepcopy(original), norm=norm)
    waveforms, _ = batch_of([5000, 5000, 5000])
    before = lengths.clone()
    with torch.no_grad():
        (found, frames), (expected, expected_frames) = (m(waveforms, lengths) for m in (model, original))
        layers, layer_frames = model.extract_features(waveforms, lengths)
    torch.testing.assert_close(frames, expected_frames, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(layer_frames, expected_frames, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lengths, before, rtol=0, atol=0, equal_nan=True)
    assert found.shape == expected.shape
    padding = torch.arange(found.shape[1]) >= expected_frames[:, None]  # the original's mask
    for row in range(3):
        count = int((~padding.expand(3, -1)[row]).sum())
        assert not layers[-1][row, count:].any()
        if count > 1:
            # The original's convolutions see one frame of what follows an utterance at most, ours none.
            assert_close(found[row, :count], expected[row, :count], 2e-4, f"row {row}")
            assert layers[-1][row, count - 1].any()


def test_a_length_beyond_the_batch_is_the_whole_row() -> None:
    model = fastssl.accelerate(make("wavlm base"))
    waveforms, _ = batch_of([5000, 5000])
    with torch.no_grad():
        whole, _ = model(waveforms)
        found, frames = model(waveforms, torch.tensor([5320, 16_000]))
    assert torch.equal(found, whole)
    assert frames.tolist() == [16, 49]  # although a row has 15


def test_in_a_mixed_batch_a_float_is_the_integer_below() -> None:
    model = fastssl.accelerate(make("wav2vec2 base, logits"))
    waveforms, lengths = batch_of([5000, 900, 399])
    with torch.no_grad():
        expected, frames = model(waveforms, lengths)
        for given in (lengths.float(), lengths.double() + 0.75):
            found, found_frames = model(waveforms, given)
            assert torch.equal(found, expected)
            assert torch.equal(found_frames, frames.to(given.dtype))


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(-10, 6000), min_size=1, max_size=5),
    samples=st.integers(0, 6000),
    convolutions=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_the_samples_have_the_frames(lengths: list[int], samples: int, convolutions: list[tuple[int, int]]) -> None:
    given_lengths = torch.tensor(lengths)
    frames = frame_lengths(given_lengths, convolutions)
    used = valid_samples(given_lengths, frames, samples, convolutions)
    most = frames_after(samples, convolutions)
    for length, count, use in zip(lengths, frames.tolist(), used.tolist(), strict=True):
        assert 0 <= use <= samples
        assert frames_after(use, convolutions) == min(count, most)
        if 0 <= length <= samples:
            assert use == length


def test_the_arithmetic_is_that_of_the_original() -> None:
    extractor = make("wav2vec2 base").feature_extractor
    assert [(k, s) for _, k, s in TINY["extractor_conv_layer_config"]] == CONVOLUTIONS
    waveforms, _ = batch_of([5000, 5000, 5000])
    for lengths in LENGTHS.values():
        with torch.no_grad():
            expected = extractor(waveforms, lengths)[1]
        found = frame_lengths(lengths, CONVOLUTIONS)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
