"""Test wav2vec 2.0: equality with Transformers, independence of batch mates, and the pre-training objective."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.recipes import recipe_model
from fastssl.interop import load_encoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.wav2vec2 import GumbelTemperature, Wav2Vec2Config, Wav2Vec2ForPreTraining
from fastssl.nn.masking import sample_negatives, sample_span_mask
from fastssl.nn.random import gumbel, utterance_keys
from fastssl.packing import Layout, Packed
from tests.device_waits import device_waits

transformers = pytest.importorskip("transformers")

SMALL = Wav2Vec2Config(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    layerdrop=0.0,
    conv_dim=(32,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    num_codevectors_per_group=20,
    codevector_dim=16,
    proj_codevector_dim=24,
    features_penalty_weight=0.0,
    feat_proj_dropout=0.0,
    feat_quantizer_dropout=0.0,
    do_normalize=True,
    feature_grad_mult=1.0,
)

VARIANTS = {
    "group": SMALL,
    "layer": replace(SMALL, feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True),
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def waveforms_of(*lengths: int) -> Packed:
    generator = torch.Generator().manual_seed(1)
    return Packed.pack([torch.randn(length, 1, generator=generator) for length in lengths])


def make_model(variant: str) -> Wav2Vec2ForPreTraining:
    torch.manual_seed(0)
    return Wav2Vec2ForPreTraining(VARIANTS[variant])


def make_transformers_model(config: Wav2Vec2Config) -> Any:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    theirs = transformers.Wav2Vec2Config(**values, final_dropout=0.0, attn_implementation="eager")
    return transformers.Wav2Vec2ForPreTraining(theirs)


@EVERY_VARIANT
def test_loss_and_every_gradient_equal_transformers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(variant).train()
    theirs = make_transformers_model(model.config).train()
    theirs.load_state_dict(model.state_dict())
    waveforms = waveforms_of(24_000)
    keys = utterance_keys(0, 0, torch.tensor([7]))
    frames = model.wav2vec2.extract_features(waveforms, normalize=False)
    mask = sample_span_mask(frames.layout, keys, probability=0.65, length=10, min_spans=2)
    negatives = sample_negatives(mask, frames.layout, keys, count=25)
    rows = mask.nonzero().squeeze(1)
    noise = gumbel(keys, torch.arange(frames.layout.total * 40).view(-1, 40), stream=3)

    def gumbel_softmax(logits: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
        noisy = logits + noise.view_as(logits)
        soft = F.softmax(noisy / tau, -1)
        return F.one_hot(noisy.argmax(-1), logits.shape[-1]) + (soft - soft.detach())

    monkeypatch.setattr(F, "gumbel_softmax", gumbel_softmax)
    theirs.set_gumbel_temperature(1.7)
    sampled = torch.zeros(1, frames.layout.total, 25, dtype=torch.long)
    sampled[0, rows] = rows[negatives]
    expected = theirs(
        waveforms.values.view(1, -1), mask_time_indices=mask.view(1, -1), sampled_negative_indices=sampled
    )
    ours = model.compare(frames, mask=mask, negatives=negatives, gumbel_noise=noise[rows], gumbel_temperature=1.7)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.contrastive_loss, expected.contrastive_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.prob_perplexity.sum(), expected.codevector_perplexity, rtol=1e-4, atol=0)
    ours.loss.backward()
    expected.loss.backward()
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert their_grads.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        theirs_grad = their_grads[name]
        assert parameter.grad is not None, name
        # Attention is invariant to a bias on the keys, so in both models its gradient is only rounding.
        scale = their_grads[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        assert scale > 0, f"{name} gets no gradient, so the comparison shows nothing"
        assert (parameter.grad - theirs_grad).abs().max() <= 1e-4 * scale, name


@EVERY_VARIANT
def test_features_of_mixed_batches_equal_transformers_on_each_alone(variant: str) -> None:
    model = make_model(variant).eval()
    theirs = make_transformers_model(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    waveforms = waveforms_of(16_000, 4_321, 400, 30_011)
    with torch.no_grad():
        output = model.wav2vec2(waveforms, normalize=False)
        for b, waveform in enumerate(waveforms.unpack()):
            expected = theirs.wav2vec2(waveform.view(1, -1), output_hidden_states=True)
            assert len(output.hidden_states) == len(expected.hidden_states)
            # With pre-norm, our last hidden state comes after the final norm; in Transformers 5 it comes before it.
            theirs_states = [*expected.hidden_states[:-1], expected.last_hidden_state]
            for ours, hidden in zip(output.hidden_states, theirs_states, strict=True):
                scale = hidden.abs().max().item()
                torch.testing.assert_close(ours.unpack()[b], hidden[0], rtol=0, atol=1e-4 * scale)
            assert torch.equal(output.features.values, output.hidden_states[-1].values)


@EVERY_VARIANT
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 12_000), min_size=2, max_size=5))
def test_features_alone_and_in_any_batch_are_equal_bit_for_bit(variant: str, lengths: list[int]) -> None:
    encoder = make_model(variant).wav2vec2.eval()
    waveforms = waveforms_of(*lengths)
    with torch.no_grad():
        together = encoder(waveforms)
        for b, waveform in enumerate(waveforms.unpack()):
            alone = encoder(Packed.pack([waveform]))
            for ours, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
                assert torch.equal(ours.unpack()[b], expected.values)


@pytest.mark.parametrize("preset", ["wav2vec2-tiny"])
def test_presets_are_bit_exact_too(preset: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(recipe_model(preset)).eval()
    waveforms = waveforms_of(3_200, 64_000, 1_000, 31_337, 4_000)
    with torch.no_grad():
        together = encoder(waveforms).features.unpack()
        for ours, waveform in zip(together, waveforms.unpack(), strict=True):
            assert torch.equal(ours, encoder(Packed.pack([waveform])).features.values)


def test_sizes_of_recipes() -> None:
    parameters = {}
    for name in ("wav2vec2-base", "wav2vec2-large", "wav2vec2-tiny"):
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in Wav2Vec2ForPreTraining(recipe_model(name)).parameters()) / 1e6
    # Base and large have the published 95 M and 317 M parameters, pre-training heads included.
    assert parameters["wav2vec2-base"] == pytest.approx(95.05, abs=0.05)
    assert parameters["wav2vec2-large"] == pytest.approx(317.4, abs=0.5)
    assert parameters["wav2vec2-tiny"] == pytest.approx(2.25, abs=0.05)


class _DataDependentSizes(TorchDispatchMode):
    """Counts operators whose output size depends on data, so that the host would have to wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or func in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
        return func(*args, **(kwargs or {}))


def test_masked_frames_are_looked_for_once() -> None:
    model = make_model("group").train()
    with _DataDependentSizes() as sizes:
        model(waveforms_of(9_000), keys=utterance_keys(0, 3, torch.tensor([5])), gumbel_temperature=2.0)
    assert sizes.count == 1


@EVERY_VARIANT
def test_losses_of_utterances_add_up(variant: str) -> None:
    model = make_model(variant).train()
    model.config = replace(model.config, diversity_loss_weight=0.0, features_penalty_weight=10.0)
    waveforms, keys = waveforms_of(9_000, 16_000, 3_000), utterance_keys(0, 3, torch.tensor([5, 6, 7]))
    together = model(waveforms, keys=keys, gumbel_temperature=2.0)
    alone = [
        model(Packed.pack([waveform]), keys=keys[b : b + 1], gumbel_temperature=2.0)
        for b, waveform in enumerate(waveforms.unpack())
    ]
    assert together.masked_frames == sum(output.masked_frames for output in alone)
    assert together.correct == sum(output.correct for output in alone)
    torch.testing.assert_close(together.loss, torch.stack([output.loss for output in alone]).sum(), rtol=1e-5, atol=0)


@EVERY_VARIANT
def test_an_empty_batch_costs_nothing_and_reaches_every_parameter(variant: str) -> None:
    model = make_model(variant).train()
    empty = Packed(torch.zeros(0, 1), Layout.from_lengths([]))
    output = model(empty, keys=torch.zeros(0, dtype=torch.int64), gumbel_temperature=2.0)
    assert output.masked_frames == 0
    assert output.loss.item() == 0.0
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.eq(0).all(), name


def test_accuracy_at_chance_counts_the_negatives_there_are() -> None:
    model = make_model("group").train()
    output = model(waveforms_of(3_000), keys=torch.tensor([3]), gumbel_temperature=2.0)
    assert output.chance.item() / output.masked_frames == pytest.approx(1 / 101)


@EVERY_VARIANT
def test_a_saved_encoder_opens_in_transformers_with_the_same_features(variant: str, tmp_path: Path) -> None:
    encoder = make_model(variant).wav2vec2.eval()
    encoder.save_pretrained(tmp_path)
    theirs, report = transformers.Wav2Vec2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    preprocessor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert preprocessor.do_normalize == encoder.config.do_normalize
    waveform = waveforms_of(9_999)
    with torch.no_grad():
        expected = theirs.eval()(waveform.values.view(1, -1)).last_hidden_state[0]
        torch.testing.assert_close(encoder(waveform, normalize=False).features.values, expected, rtol=0, atol=1e-4)
        again = load_encoder(tmp_path)
        assert again.config == EncoderConfig.from_dict(vars(encoder.config))
        assert torch.equal(again(waveform).features.values, encoder(waveform).features.values)


@pytest.mark.parametrize("name", ["Wav2Vec2Model", "Wav2Vec2ForPreTraining", "Wav2Vec2ForCTC"])
def test_loads_what_transformers_saves(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(make_transformers_model(SMALL).config).eval()
    theirs.save_pretrained(tmp_path)
    waveform = waveforms_of(5_000)
    base = theirs if name == "Wav2Vec2Model" else theirs.wav2vec2
    with torch.no_grad():
        expected = base(waveform.values.view(1, -1)).last_hidden_state[0]
        for source in (tmp_path, theirs):
            features = load_encoder(source)(waveform).features.values
            torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
    model = Wav2Vec2ForPreTraining.from_pretrained(tmp_path)
    if name == "Wav2Vec2ForPreTraining":
        assert torch.equal(model.quantizer.codevectors, theirs.quantizer.codevectors)


def test_the_schedule_of_the_temperature_stays_out_of_the_folder(tmp_path: Path) -> None:
    config = replace(SMALL, gumbel_temperature=GumbelTemperature(end=0.25))
    Wav2Vec2ForPreTraining(config).wav2vec2.save_pretrained(tmp_path)
    exported = json.loads((tmp_path / "config.json").read_text())
    assert exported["num_negatives"] == SMALL.num_negatives
    assert "gumbel_temperature" not in exported
    # A run's config.yaml, however, contains the schedule.
    assert Wav2Vec2Config.from_dict(asdict(config)) == config
    assert Wav2Vec2Config.from_dict({"gumbel_temperature": {"end": 0.25, "later": 1}}).gumbel_temperature.end == 0.25
    with pytest.raises(ValueError, match="gumbel_temperature: must be of type GumbelTemperature, got 3"):
        Wav2Vec2Config.from_dict({"gumbel_temperature": 3})


def test_rejects_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no model \(looked for .*config\.json"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(ValueError, match="model_type is 'whisper'"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"Linear cannot be loaded; expected .*Transformers model"):
        load_encoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="hidden_act='relu' is not supported"):
        EncoderConfig.from_dict({"hidden_act": "relu"})
    with pytest.raises(ValueError, match="conv_dim, conv_kernel, conv_stride"):
        EncoderConfig(conv_dim=(32,))
    with pytest.raises(ValueError, match=r"waveforms: expected \(N,\) or \(N, 1\)"):
        make_model("group").wav2vec2(Packed(torch.zeros(400, 2), Layout.from_lengths([400])))
    encoder = make_model("group").wav2vec2
    encoder.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 48', '"hidden_size": 32'))
    with pytest.raises(ValueError, match=r"has shape .*, expected"):
        load_encoder(tmp_path)


@pytest.mark.gpu
@EVERY_VARIANT
def test_the_host_waits_for_the_device_once(variant: str) -> None:
    """That wait reads the number of masked frames."""
    torch.manual_seed(0)
    config = replace(VARIANTS[variant], hidden_dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)
    model = Wav2Vec2ForPreTraining(config).cuda().train()
    waveforms, keys = waveforms_of(16000, 9000, 400).to("cuda"), utterance_keys(0, 0, torch.arange(3)).cuda()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(waveforms, keys=keys, gumbel_temperature=1.0)
        output.loss.backward()

    waits = device_waits(step)
    assert len(waits) == 1, waits


def fairseq_code_perplexity(logits: torch.Tensor) -> torch.Tensor:
    """Count as fairseq's quantiser does, from logits (M, G, V) without noise: () the sum over the groups."""
    hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(0)
    return torch.exp(-torch.sum(hard * torch.log(hard + 1e-7), dim=-1)).sum()


def test_code_perplexity_is_also_counted_as_in_fairseq() -> None:
    """Noise hides a collapse: every frame may have the same largest logit, and the choices still look varied."""
    model = make_model("group").train()
    waveforms, keys = waveforms_of(24_000, 20_000), utterance_keys(0, 0, torch.tensor([7, 8]))
    logits: list[torch.Tensor] = []
    model.quantizer.weight_proj.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    shape = (model.config.num_codevector_groups, model.config.num_codevectors_per_group)
    output = model(waveforms, keys=keys, gumbel_temperature=1.0)
    expected = fairseq_code_perplexity(logits.pop().unflatten(1, shape))
    torch.testing.assert_close(output.argmax_perplexity.sum(), expected)
    assert not torch.allclose(output.argmax_perplexity, output.code_perplexity)
    scores = output.scores()
    for group in range(shape[0]):
        for kind in ("code", "prob", "argmax"):
            value = getattr(output, f"{kind}_perplexity")[group] * output.masked_frames
            torch.testing.assert_close(scores[f"{kind}_perplexity_{group}"], value, rtol=0, atol=0)
    assert tuple(scores) == model.score_names

    # Collapsed: one logit is a little larger than the others in every frame.
    with torch.no_grad():
        model.quantizer.weight_proj.weight.zero_()
        model.quantizer.weight_proj.bias[:: shape[1]] = 0.1
    collapsed = model(waveforms, keys=keys, gumbel_temperature=1.0)
    torch.testing.assert_close(collapsed.argmax_perplexity, torch.ones(shape[0]), rtol=1e-4, atol=0)
    assert (collapsed.code_perplexity > 5).all()
    # Without noise, both are the same count.
    scored = model.eval()(waveforms, keys=keys, gumbel_temperature=1.0)
    assert torch.equal(scored.argmax_perplexity, scored.code_perplexity)
    # A batch without masked frames.
    nothing = model.train()(waveforms_of(100), keys=keys[:1], gumbel_temperature=1.0)
    assert nothing.masked_frames == 0
    assert torch.isfinite(nothing.argmax_perplexity).all()
