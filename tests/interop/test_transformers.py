"""Test that accelerated Transformers encoders return what the original returns for each utterance alone."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastssl
from tests.interop.tiny_models import (
    ACCELERATED,
    BATCHES,
    CONFORMERS,
    EVERY_ACCELERATED_VARIANT,
    EVERY_TRAINED_VARIANT,
    LEAST_SQUEEZED,
    SQUEEZED,
    TINY,
    VARIANTS,
    Adapted,
    assert_close,
    assert_padded_by_last,
    padded_batch,
    transformers_model,
)

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("batch", BATCHES)
@EVERY_ACCELERATED_VARIANT
def test_equals_the_original_on_each_utterance_alone(variant: str, batch: str) -> None:
    original = transformers_model(variant)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch(BATCHES[batch])
    with torch.no_grad():
        found = model(waveforms, attention_mask=mask, output_hidden_states=True)
        for row, samples in enumerate(mask.sum(1).tolist()):
            if variant in SQUEEZED and samples < LEAST_SQUEEZED:
                assert not found.last_hidden_state[row].any()
                continue
            expected = original(waveforms[row : row + 1, :samples], output_hidden_states=True)
            assert type(found) is type(expected)
            assert found.keys() == expected.keys()
            frames = expected.hidden_states[0].shape[1]
            for layer, (ours, theirs) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
                assert_close(ours[row, :frames], theirs[0], 2e-4, f"hidden state {layer}")
                assert not ours[row, frames:].any()
            last = expected.last_hidden_state[0]
            assert_close(found.last_hidden_state[row, : len(last)], last, 2e-4, "last hidden state")
            assert_padded_by_last(found.last_hidden_state[row], len(last))


@pytest.mark.parametrize("batch", ["equal", "mixed"])
@EVERY_TRAINED_VARIANT
def test_training_gives_the_loss_and_gradients_of_each_utterance_alone(variant: str, batch: str) -> None:
    original = transformers_model(variant, apply_spec_augment=False).train()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch(BATCHES[batch])

    def score(frames: Tensor) -> Tensor:
        return (frames * torch.sin(torch.arange(frames.numel())).view_as(frames)).sum()

    together = model(waveforms, attention_mask=mask).last_hidden_state
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for row, samples in enumerate(mask.sum(1).tolist()):
        alone = original(waveforms[row : row + 1, :samples]).last_hidden_state[0]
        loss, expected_loss = loss + score(together[row, : len(alone)]), expected_loss + score(alone)
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-3)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    scale = max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None)
    for name, parameter in original.named_parameters():
        if parameter.grad is None:
            assert grads[name] is None, name
        else:
            found = grads[name]
            assert found is not None, name
            # Attention is invariant to a bias on the keys, so its exact gradient is zero: only rounding remains.
            allowed = 1e-3 * float(parameter.grad.abs().max()) + 1e-6 * scale
            assert (found - parameter.grad).abs().max() <= allowed, name


HEADS = {
    "Wav2Vec2": ["ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector", "ForPreTraining"],
    "Hubert": ["ForCTC", "ForSequenceClassification"],
    "WavLM": ["ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector"],
    "Data2VecAudio": ["ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector"],
    "SEW": ["ForCTC", "ForSequenceClassification"],
    "Wav2Vec2Conformer": [
        "ForCTC",
        "ForSequenceClassification",
        "ForAudioFrameClassification",
        "ForXVector",
        "ForPreTraining",
    ],
    "UniSpeech": ["ForCTC", "ForSequenceClassification", "ForPreTraining"],
    "UniSpeechSat": [
        "ForCTC",
        "ForSequenceClassification",
        "ForAudioFrameClassification",
        "ForXVector",
        "ForPreTraining",
    ],
}


BESIDES = ("wavlm base", "data2vec", "sew base", "conformer base")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("variant", "head"),
    [(variant, head) for variant, (family, options) in VARIANTS.items() if not options for head in HEADS[family]]
    + [(name, head) for name in BESIDES for head in HEADS[ACCELERATED[name][0]]],
)
def test_every_head_gives_the_same(variant: str, head: str, weighted: bool) -> None:
    original = transformers_model(variant, head, use_weighted_layer_sum=weighted)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([9000, 9000])
    with torch.no_grad():
        found, expected = (m(waveforms, output_hidden_states=True) for m in (model, original))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert_close(found[key], value, 1e-3, key)


def test_greedy_decoding_of_a_padded_batch_gives_the_text_of_each_utterance_alone() -> None:
    """Scripts decode whole padded rows, so padding must not add letters, and it must not receive gradients."""
    model = fastssl.accelerate(transformers_model("wav2vec2 large", "ForCTC"))
    waveforms, mask = padded_batch([9000, 900, 3300])
    logits = model(waveforms, attention_mask=mask).logits
    for row, samples in enumerate(mask.sum(1).tolist()):
        alone = model(waveforms[row : row + 1, :samples]).logits[0]
        assert torch.equal(logits[row].argmax(1).unique_consecutive(), alone.argmax(1).unique_consecutive())
    hidden = model.wav2vec2(waveforms, attention_mask=mask).last_hidden_state
    padding = torch.ones_like(hidden, dtype=torch.bool)
    for row, frames in enumerate((27, 2, 10)):
        padding[row, :frames] = False
    hidden[padding].sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_parameters_are_shared_and_restored() -> None:
    model = transformers_model("wav2vec2 base", "ForCTC")
    names, ids, kind = list(model.state_dict()), [id(p) for p in model.parameters()], type(model.wav2vec2)
    assert fastssl.accelerate(model) is model
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == ids
    assert isinstance(model.wav2vec2, kind)
    assert type(model.wav2vec2) is not kind
    fastssl.accelerate(model)  # a second call changes nothing
    assert fastssl.restore(model) is model
    assert type(model.wav2vec2) is kind
    assert not [key for key in vars(model.wav2vec2) if "fastssl" in key]


@pytest.mark.parametrize(
    ("way", "variant"),
    [("pickle", "data2vec"), *(("deepcopy", variant) for variant in ("wavlm base", "sew base", "conformer base"))],
)
def test_copies_are_accelerated(way: str, variant: str) -> None:
    """Only Data2Vec can be pickled: the others have weight norm, which PyTorch cannot pickle."""
    model = fastssl.accelerate(transformers_model(variant, "ForCTC"))
    again = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    waveforms, mask = padded_batch([5000, 900])
    with torch.no_grad():
        assert type(again.base_model) is type(model.base_model)
        assert torch.equal(again(waveforms, attention_mask=mask).logits, model(waveforms, attention_mask=mask).logits)


def test_save_pretrained_writes_what_the_original_writes(tmp_path: Path) -> None:
    model = transformers_model("hubert base")
    model.save_pretrained(tmp_path / "original")
    fastssl.accelerate(model).save_pretrained(tmp_path / "accelerated")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "original" / name).read_bytes() == (tmp_path / "accelerated" / name).read_bytes()
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "accelerated")) is transformers.HubertModel


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_masks_of_any_type(kind: torch.dtype) -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    waveforms, mask = padded_batch([5000, 900, 0])
    with torch.no_grad():
        expected = model(waveforms, attention_mask=mask).last_hidden_state
        assert torch.equal(model(waveforms, attention_mask=mask.to(kind)).last_hidden_state, expected)
        assert not expected[2].any()  # a row of padding only


def test_batch_mates_do_not_matter() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    waveforms, mask = padded_batch([5000, 900, 3300])
    with torch.no_grad():
        together = model(waveforms, attention_mask=mask).last_hidden_state
        alone = model(waveforms[1:2, :900]).last_hidden_state
    assert torch.equal(together[1:2, : alone.shape[1]], alone)


def test_bad_masks_are_named() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    waveforms, mask = padded_batch([5000, 900])
    hole = mask.clone()
    hole[1, 100] = 0
    cases = {
        r"attention_mask: row 1 has padding between samples": hole,
        r"attention_mask: expected \(2, 5000\).* got \(2, 4000\)": mask[:, :4000],
        r"attention_mask: must be 1 \(a sample\) or 0 \(padding\)": mask * 2,
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            model(waveforms, attention_mask=bad)
    with pytest.raises(ValueError, match=r"input_values: expected \(B, T\)"):
        model(waveforms.unsqueeze(1))


def test_attention_weights_come_from_the_original_code() -> None:
    original = transformers_model("wav2vec2 base", attn_implementation="eager")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch([5000, 900])
    with torch.no_grad(), pytest.warns(UserWarning, match="attention weights"):
        found = model(waveforms, attention_mask=mask, output_attentions=True)
    expected = original(waveforms, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(found.attentions, expected.attentions)


@pytest.mark.parametrize("recorded", ["before", "after"])
def test_a_model_that_has_recorded_its_layers_runs_packed(recorded: str) -> None:
    """Transformers leaves hooks on the layers of a model that has once returned hidden states or attentions."""
    model = transformers_model("wav2vec2 base", attn_implementation="eager")
    waveforms, mask = padded_batch([5000, 900])
    with torch.no_grad():
        expected = fastssl.accelerate(copy.deepcopy(model))(waveforms, attention_mask=mask).last_hidden_state
        if recorded == "before":
            model(waveforms, output_hidden_states=True)
        fastssl.accelerate(model)
        if recorded == "after":
            with pytest.warns(UserWarning, match="attention weights"):
                model(waveforms, output_attentions=True)
        assert torch.equal(model(waveforms, attention_mask=mask).last_hidden_state, expected)


def test_while_the_original_code_runs_other_threads_find_the_model_accelerated() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base", attn_implementation="eager"))
    kinds = []
    model.encoder.layer_norm.register_forward_hook(lambda *args: kinds.append(type(model)))
    with torch.no_grad(), pytest.warns(UserWarning, match="attention weights"):
        model(padded_batch([5000])[0], output_attentions=True)
    assert kinds == [type(model)]


def test_the_class_of_an_accelerated_model_makes_others(tmp_path: Path) -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    model.save_pretrained(tmp_path)
    for other in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        other.load_state_dict(model.state_dict())
        waveforms, mask = padded_batch([5000, 900])
        with torch.no_grad():
            found, expected = (m(waveforms, attention_mask=mask).last_hidden_state for m in (other.eval(), model))
        assert torch.equal(found, expected)
        assert type(fastssl.restore(other)) is transformers.Wav2Vec2Model


def test_tuples_and_chosen_hidden_states() -> None:
    original = transformers_model("wav2vec2 base")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    with torch.no_grad():
        for options in ({"return_dict": False}, {"return_dict": False, "output_hidden_states": True}):
            found, expected = (m(waveforms, **options) for m in (model, original))
            assert isinstance(found, tuple)
            assert len(found) == len(expected)
        found, expected = (m(waveforms, output_hidden_states=[0, -1]).hidden_states for m in (model, original))
    assert [state is None for state in found] == [state is None for state in expected]


def test_norm_over_padding_is_that_of_transformers() -> None:
    original = transformers_model("wav2vec2 base", attn_implementation="eager")
    model = fastssl.accelerate(copy.deepcopy(original), norm="padded")
    waveforms, mask = padded_batch([5000, 1900])
    with torch.no_grad():
        found = model(waveforms, attention_mask=mask).last_hidden_state
        expected = original(waveforms, attention_mask=mask).last_hidden_state
    frames = (1900 - 400) // 320 + 1
    assert_close(found[1, :frames], expected[1, :frames], 2e-4)
    with pytest.raises(ValueError, match="norm: must be 'valid' or 'padded'"):
        fastssl.accelerate(original, norm="batch")  # type: ignore[arg-type]


def test_what_is_not_known_or_not_served_is_named() -> None:
    with pytest.raises(ValueError, match=r"Linear has no encoder.*transformers\.Wav2Vec2Model"):
        fastssl.accelerate(nn.Linear(2, 2))
    model = transformers_model("hubert base", conv_pos_batch_norm=True)
    with pytest.raises(ValueError, match="conv_pos_batch_norm"):
        fastssl.accelerate(model)
    assert type(model) is transformers.HubertModel
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        fastssl.accelerate(transformers_model("wav2vec2 base", hidden_act="relu"))


@pytest.mark.parametrize(("family", "options"), [("Wav2Vec2Bert", {}), ("SEWD", {"conv_dim": [32] * 13})])
def test_architectures_that_are_not_served_are_refused(family: str, options: dict[str, Any]) -> None:
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**TINY | options))
    with pytest.raises(ValueError, match=f"{family}Model has no encoder that can be accelerated; expected") as caught:
        fastssl.accelerate(model)
    for name, _ in ACCELERATED.values():
        assert f" transformers.{name}Model," in str(caught.value)


@pytest.mark.parametrize("variant", ["wav2vec2 base", "hubert base", "wavlm large", "sew base"])
def test_random_draws_are_those_of_the_original(variant: str) -> None:
    """SpecAugment draws from NumPy's generator, layer drop from torch's."""
    options: dict[str, Any] = {"mask_time_prob": 0.5, "layerdrop": 0.4}
    if not variant.startswith("wavlm"):  # WavLM's config lacks mask_feature_min_masks
        options |= {"mask_feature_prob": 0.2, "mask_feature_length": 4}
    original = transformers_model(variant, **options).train()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([9000, 9000])
    outputs = []
    for m in (model, original):
        np.random.seed(3)  # noqa: NPY002 (the generator that Transformers draws from)
        torch.manual_seed(3)
        outputs.append(m(waveforms).last_hidden_state)
    assert_close(outputs[0], outputs[1], 2e-4)


def test_given_time_masks() -> None:
    original = transformers_model("wav2vec2 base").train()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000, 5000])
    masked = torch.zeros(2, 15, dtype=torch.bool)
    masked[0, 2:7] = masked[1, 10:] = True
    found, expected = (m(waveforms, mask_time_indices=masked).last_hidden_state for m in (model, original))
    assert_close(found, expected, 2e-4)


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wav2vec2 large", "sew base"])
def test_gradient_checkpointing_and_frozen_front_ends(variant: str) -> None:
    model = transformers_model(variant, "ForCTC", apply_spec_augment=False).train()
    fastssl.accelerate(model)
    model.freeze_feature_encoder()
    waveforms, mask = padded_batch([9000, 5000])
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(waveforms, attention_mask=mask, labels=labels).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert not [name for name in grads[0] if "feature_extractor" in name]
    torch.testing.assert_close(grads[1], grads[0])


def test_layers_in_the_place_of_linear_ones_are_called() -> None:
    """LoRA replaces linear layers this way."""

    original = transformers_model("wav2vec2 base")
    for layer in original.encoder.layers:
        layer.attention.q_proj = Adapted(layer.attention.q_proj)
        layer.feed_forward.intermediate_dense = Adapted(layer.feed_forward.intermediate_dense)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    with torch.no_grad():
        assert_close(model(waveforms).last_hidden_state, original(waveforms).last_hidden_state, 2e-4)


@pytest.mark.parametrize(
    "variant", ["wav2vec2 base, adapter", "wavlm large", "data2vec", "sew base", "conformer, layer norm, silu, adapter"]
)
def test_the_original_code_runs_where_a_module_that_is_not_called_has_a_hook(variant: str) -> None:
    original = transformers_model(variant)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    library = "transformers.models"
    names = [name for name, module in model.named_modules() if name and type(module).__module__.startswith(library)]
    names += [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    names = [name for name in names if not name.endswith("_feed_forward")]  # which the accelerated encoder calls
    if variant in CONFORMERS:
        names = [name for name in names if "pos_conv_embed" not in name]  # which the original does not call
    calls: list[str] = []
    with torch.no_grad():
        expected = original(waveforms).last_hidden_state
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(lambda *args, name=name: calls.append(name))
            with pytest.warns(UserWarning, match="has a hook.*, so the original code runs"):
                found = model(waveforms).last_hidden_state
            handle.remove()
            assert calls.pop() == name
            assert torch.equal(found, expected)
    assert not calls
    assert len(names) > 20


def test_layers_of_somebody_else_are_called() -> None:
    class Doubling(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    original = transformers_model("wav2vec2 base")
    block = original.feature_extractor.conv_layers[3]
    doubling = Doubling(32, 32, 3, stride=2, bias=False)
    doubling.load_state_dict(block.conv.state_dict())
    block.conv = doubling
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    with torch.no_grad(), pytest.warns(UserWarning, match=r"Doubling replaces a module of .* the original code runs"):
        assert torch.equal(model(waveforms).last_hidden_state, original(waveforms).last_hidden_state)
