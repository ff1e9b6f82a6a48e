"""Test what accelerated encoders compute besides the model: tables of distances, SpecAugment's rows, packing."""

import copy
import gc
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.interop import encoders, spec_augment
from fastssl.packing import Layout, Packed
from tests.interop.tiny_models import ACCELERATED_FAMILIES, BATCHES, assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")


def wavlm() -> Any:
    return fastssl.accelerate(transformers_model("wavlm base"))


def expected_bias(attention: Any) -> Tensor:  # (H, 2R + 1)
    distances = torch.arange(-attention.max_distance, attention.max_distance + 1)
    weight: Tensor = attention.rel_attn_embed.weight
    return weight[attention._relative_positions_bucket(distances)].t()


def test_buckets_of_distances_are_computed_once_per_model() -> None:
    model, waveforms = wavlm(), padded_batch([5000])[0]
    attention = model.encoder.layers[0].attention
    compute = type(attention)._relative_positions_bucket
    with mock.patch.object(type(attention), "_relative_positions_bucket", autospec=True, side_effect=compute) as call:
        with torch.no_grad():
            first = model(waveforms).last_hidden_state
            assert torch.equal(model(waveforms).last_hidden_state, first)
        assert call.call_count == 1
        copy.deepcopy(model)(waveforms)
        assert call.call_count == 2


def test_kept_buckets_hold_no_weights_and_no_graph() -> None:
    model = wavlm()
    attention = model.encoder.layers[0].attention
    with torch.inference_mode():
        before = encoders.distance_bias(attention).clone()  # the table of an evaluation must serve training too
    with torch.no_grad():
        attention.rel_attn_embed.weight.add_(1.0)
    for _ in range(2):
        attention.rel_attn_embed.weight.grad = None
        bias = encoders.distance_bias(attention)
        assert torch.equal(bias, expected_bias(attention))
        assert_close(bias, before + 1.0, 1e-6)
        bias.sum().backward()
        assert attention.rel_attn_embed.weight.grad.sum() == bias.numel()
    attention.rel_attn_embed.weight = torch.nn.Parameter(torch.zeros_like(attention.rel_attn_embed.weight))
    assert not encoders.distance_bias(attention).any()


def test_buckets_follow_the_model_to_other_dtypes_devices_and_sizes() -> None:
    model = wavlm()
    attention = model.encoder.layers[0].attention
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        found = encoders.distance_bias(attention)
        assert found.dtype == dtype
        assert torch.equal(found, expected_bias(attention))
    elsewhere = copy.deepcopy(attention)
    encoders.distance_bias(elsewhere)
    assert encoders.distance_bias(elsewhere.to("meta")).is_meta
    elsewhere.to_empty(device="cpu").load_state_dict(attention.state_dict())
    assert torch.equal(encoders.distance_bias(elsewhere), expected_bias(attention))
    attention.max_distance = 40
    assert torch.equal(encoders.distance_bias(attention), expected_bias(attention))
    attention.num_buckets = 16
    assert torch.equal(encoders.distance_bias(attention), expected_bias(attention))


def test_buckets_are_neither_saved_nor_kept_after_the_model() -> None:
    gc.collect()
    known, names = len(encoders._tables), list(wavlm().state_dict())
    model = wavlm()
    model(padded_batch([5000])[0])
    assert len(encoders._tables) == known + 1
    assert list(model.state_dict()) == names
    del model
    gc.collect()
    assert len(encoders._tables) == known


def augmenting(variant: str) -> Any:
    original = transformers_model(variant, mask_time_prob=0.5, mask_feature_length=4)
    model = fastssl.accelerate(original).train()
    model.config.mask_feature_prob, model.config.mask_feature_min_masks = 0.2, 1  # WavLM's config lacks the second
    return model


def frames_of(lengths: tuple[int, ...], channels: int) -> Packed:
    values = torch.randn(sum(lengths), channels, generator=torch.Generator().manual_seed(0))
    return Packed(values.requires_grad_(), Layout.from_lengths(lengths))


def masked(model: Any, x: Packed, given: Tensor | None, padded_frames: int, *, by_original: bool) -> list[Tensor]:
    """Return masked frames and the gradients of the frames and of the embedding that replaces them."""
    np.random.seed(3)  # noqa: NPY002 (the generator that Transformers draws from)
    model.zero_grad()
    if by_original:
        valid = None if type(model).__name__ in ("HubertModel", "SEWModel") else x.layout.valid(padded_frames)
        padded = model._mask_hidden_states(x.to_padded(length=padded_frames), given, valid)
        values = Packed.from_padded(padded, x.layout).values
    else:
        values = spec_augment.mask_frames(model, x, given, padded_frames, has_padding=True).values
    (values * torch.sin(torch.arange(values.numel())).view_as(values)).sum().backward()
    assert x.values.grad is not None
    found = [values.detach(), x.values.grad.clone(), model.masked_spec_embed.grad.clone()]
    x.values.grad = None
    return found


@pytest.mark.parametrize("lengths", [(30, 30), (30, 7, 0, 18)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("variant", ACCELERATED_FAMILIES)
def test_packed_frames_are_masked_as_the_model_masks_padded_ones(
    variant: str, given: bool, lengths: tuple[int, ...]
) -> None:
    model = augmenting(variant)
    x = frames_of(lengths, model.config.hidden_size)
    mask = torch.rand(len(lengths), 33, generator=torch.Generator().manual_seed(1)) < 0.4 if given else None
    found, expected = (masked(model, x, mask, 33, by_original=original) for original in (False, True))
    assert not torch.equal(found[0], x.values)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # HuBERT's and SEW's own functions also mask padding, which adds zeros to the last gradient in another order.
    assert_close(found[2], expected[2], 1e-6)


def test_a_mask_that_the_host_does_not_know_gives_the_same() -> None:
    model = augmenting("wav2vec2 base")
    x = frames_of((12, 0, 5), model.config.hidden_size)
    mask = torch.rand(3, 14, generator=torch.Generator().manual_seed(1)) < 0.4
    model.config.mask_feature_prob = 0.0
    expected = spec_augment.mask_frames(model, x, mask, 14, has_padding=True).values
    assert torch.equal(spec_augment._embedded_where(x, mask, model.masked_spec_embed), expected)
    with pytest.raises(ValueError, match=r"mask_time_indices: expected \(3, 14\), one per frame, got \(3, 13\)"):
        spec_augment.mask_frames(model, x, mask[:, 1:], 14, has_padding=True)


def test_a_replaced_mask_function_runs() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base")).train()
    model._mask_hidden_states = mock.Mock(wraps=model._mask_hidden_states)
    with pytest.warns(UserWarning, match=r"replaced `_mask_hidden_states`, so the original code runs"):
        model(padded_batch([5000])[0])
    assert model._mask_hidden_states.call_count == 1


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("norm", ["valid", "padded"])
def test_gradients_reach_the_waveforms(norm: Any, batch: str) -> None:
    """Without gradients, waveforms are packed in another way; both must give the same."""
    model = fastssl.accelerate(transformers_model("wav2vec2 large"), norm=norm)
    waveforms, mask = padded_batch(BATCHES[batch])
    expected = model(waveforms, attention_mask=mask).last_hidden_state
    waveforms.requires_grad_()
    found = model(waveforms, attention_mask=mask).last_hidden_state
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert waveforms.grad is not None
    assert bool((waveforms.grad != 0).any(1).all())
    assert not waveforms.grad[mask == 0].any()
