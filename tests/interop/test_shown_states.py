"""Test that the outputs of an accelerated model depend on the hidden states that it returns, as in the original."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.interop.shown_states import ShownStates
from fastssl.nn import SequenceCompressor
from tests.interop.tiny_models import EVERY_FAMILY, TINY, assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")
LENGTHS = [5000, 2000]


def score(frames: Tensor) -> Tensor:  # (F, D) -> ()
    return (frames * torch.sin(torch.arange(frames.numel())).view_as(frames)).sum()


@EVERY_FAMILY
def test_gradients_of_hidden_states_are_those_of_the_utterance_alone(variant: str) -> None:
    original = transformers_model(variant)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch(LENGTHS)
    output = model(waveforms, attention_mask=mask, output_hidden_states=True)
    alone = [original(waveforms[row : row + 1, :n], output_hidden_states=True) for row, n in enumerate(LENGTHS)]
    frames = [one.last_hidden_state.shape[1] for one in alone]
    total = torch.stack([score(output.last_hidden_state[row, :count]) for row, count in enumerate(frames)]).sum()
    found = torch.autograd.grad(total, output.hidden_states)
    for row, one in enumerate(alone):
        expected = torch.autograd.grad(score(one.last_hidden_state[0]), one.hidden_states, allow_unused=True)
        for ours, theirs in zip(found, expected, strict=True):
            if theirs is not None:  # the original's last state is another tensor than the one it returns last
                assert_close(ours[row, : frames[row]], theirs[0], 1e-3)
            assert not ours[row, frames[row] :].any()


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large"])
def test_gradients_of_torchaudio_s_layers(variant: str) -> None:
    from tests.interop.tiny_torchaudio import batch_of, make

    original = make(variant)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of(LENGTHS)
    states, frames = model.extract_features(waveforms, lengths)
    alone = [original.extract_features(waveforms[row : row + 1, :n])[0] for row, n in enumerate(LENGTHS)]
    total = torch.stack([score(states[-1][row, :count]) for row, count in enumerate(frames.tolist())]).sum()
    found = torch.autograd.grad(total, states[:-1])
    for row, layers in enumerate(alone):
        expected = torch.autograd.grad(score(layers[-1][0]), layers[:-1])
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours[row, : frames[row]], theirs[0], 1e-3)
            assert not ours[row, frames[row] :].any()


def gradients(model: Any, **options: Any) -> list[Tensor]:
    model.zero_grad()
    waveforms, mask = padded_batch(LENGTHS)
    output = model(waveforms, attention_mask=mask, **options)
    output.last_hidden_state.square().sum().backward()
    return [output.last_hidden_state, *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large"])
def test_asking_for_states_changes_no_bit(variant: str) -> None:
    model = fastssl.accelerate(transformers_model(variant, apply_spec_augment=False)).train()
    plain, shown = gradients(model), gradients(model, output_hidden_states=True)
    assert len(plain) == len(shown) > 40
    assert all(map(torch.equal, plain, shown))


def test_states_of_a_compressor_are_repeated_ones() -> None:
    compressor = SequenceCompressor(TINY["hidden_size"], kind="average", factor=2)
    model = fastssl.accelerate(transformers_model("hubert base"), compressor=compressor)
    output = model(padded_batch([5000])[0], output_hidden_states=True)
    (state,) = (one for one in output.hidden_states[:1])
    assert torch.equal(state[:, 0], state[:, 1])


def test_nothing_is_padded_before_it_is_needed_without_gradients() -> None:
    padded: list[Tensor] = []

    def pad(values: Tensor) -> Tensor:
        padded.append(values)
        return values.unsqueeze(0)

    shown = ShownStates(pad)
    frames = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert shown.through(frames) is frames
    assert shown.through(frames.detach()).requires_grad is False
    assert not padded
    assert shown.through(frames) is not frames
    assert shown.padded(frames) is shown.padded(frames)
    assert len(padded) == 1
