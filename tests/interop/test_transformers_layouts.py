"""Test accelerated encoders with all kinds of batches, masks and memory formats."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastssl
from tests.interop.tiny_models import assert_padded_by_last, transformers_model

_VARIANTS = ["wav2vec2 base", "wavlm large", "data2vec", "sew base", "conformer base"]
lengths_of_batches = st.lists(
    st.one_of(st.just(0), st.integers(1, 3000), st.integers(395, 405)), min_size=1, max_size=4
)
mask_types = st.sampled_from([torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32])


@cache
def accelerated(variant: str) -> Any:
    return fastssl.accelerate(transformers_model(variant))


def features_alone(model: Any, waveform: Tensor) -> Tensor:
    """Return the (F, D) features of one utterance without padding."""
    out: Tensor = model(waveform.unsqueeze(0)).last_hidden_state[0]
    return out


@pytest.mark.parametrize("variant", _VARIANTS)
@settings(max_examples=25, deadline=None)
@given(lengths=lengths_of_batches, padding=st.integers(0, 700), kind=mask_types, seed=st.integers(0, 9), data=st.data())
def test_any_layout_gives_every_utterance_as_if_it_were_alone(
    variant: str, lengths: list[int], padding: int, kind: torch.dtype, seed: int, data: st.DataObject
) -> None:
    model = accelerated(variant)
    samples = max(lengths) + padding
    generator = torch.Generator().manual_seed(seed)
    waveforms = torch.randn(len(lengths), samples, generator=generator)  # the padding is noise too
    mask = (torch.arange(samples) < torch.tensor(lengths).unsqueeze(1)).to(kind)
    left = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    mask = torch.where(left.unsqueeze(1), mask.flip(1), mask)
    given_waveforms, given_mask = waveforms, mask
    form = data.draw(st.sampled_from(["contiguous", "transposed", "every second sample"]))
    if form == "transposed":
        given_waveforms, given_mask = waveforms.t().contiguous().t(), mask.t().contiguous().t()
    elif form == "every second sample":
        given_waveforms = torch.stack([waveforms, -waveforms], dim=2).flatten(1)[:, ::2]
        given_mask = torch.stack([mask, mask], dim=2).flatten(1)[:, ::2]
    with torch.no_grad():
        found = model(given_waveforms, attention_mask=given_mask).last_hidden_state
        assert found.shape[:2] == (len(lengths), max(0, (samples - 400) // 320 + 1))
        for row, length in enumerate(lengths):
            if left[row]:
                expected = features_alone(model, waveforms[row, samples - length :]).flip(0)
                frames = found[row].flip(0)
            else:
                expected, frames = features_alone(model, waveforms[row, :length]), found[row]
            assert torch.equal(frames[: len(expected)], expected)
            assert_padded_by_last(frames, len(expected))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=3),
    kind=mask_types,
    place=st.floats(0, 1, exclude_max=True),
    row=st.integers(0, 2),
    padded=st.integers(1, 60),
)
def test_masks_with_holes_are_refused(
    lengths: list[int], kind: torch.dtype, place: float, row: int, padded: int
) -> None:
    """Flip one element of a row's mask: padding before the last sample, or a sample after the first padding."""
    row, samples = row % len(lengths), max(lengths) + padded + 2
    mask = torch.arange(samples) < torch.tensor(lengths).unsqueeze(1)
    position = int(place * (lengths[row] - 1)) if lengths[row] > 1 else lengths[row] + 1
    mask[row, position] = ~mask[row, position]
    with pytest.raises(ValueError, match=rf'attention_mask: row {row} has padding between.*norm="padded"'):
        accelerated("wav2vec2 base")(torch.randn(len(lengths), samples), attention_mask=mask.to(kind))


@pytest.mark.parametrize("variant", _VARIANTS)
def test_nothing_but_padding(variant: str) -> None:
    model = accelerated(variant)
    for samples, frames in ((2000, 6), (300, 0), (0, 0)):
        for batch in (0, 1, 3):
            mask = torch.zeros(batch, samples)
            out = model(torch.randn(batch, samples), attention_mask=mask, output_hidden_states=True)
            assert out.last_hidden_state.shape == (batch, frames, 48)
            assert not out.last_hidden_state.any()
            out.last_hidden_state.sum().backward()
    model.zero_grad()
