"""Test that HuBERT's objective equals a plain implementation, and does not depend on the rest of the batch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_hubert_step, rivals
from benchmarks.recipes import recipe_model
from fastssl.models.hubert import HubertConfig, HubertForPreTraining
from fastssl.nn.masking import sample_span_mask
from fastssl.packing import Packed
from tests.device_waits import device_waits

_TINY = HubertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    feat_proj_dropout=0.0,
    layerdrop=0.0,
    do_normalize=True,
    feature_grad_mult=1.0,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    num_clusters=11,
    final_dim=8,
)

_LENGTHS = (9000, 4000, 400, 100, 12345)


@pytest.fixture
def model() -> HubertForPreTraining:
    torch.manual_seed(0)
    return HubertForPreTraining(_TINY)


def _batch(lengths: tuple[int, ...] = _LENGTHS) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return waveforms, a label for each of their frames, and a key for each waveform."""
    generator = torch.Generator().manual_seed(1)
    waveforms = [torch.randn(length, 1, generator=generator) for length in lengths]
    frames = [max(0, (length - 400) // 320 + 1) for length in lengths]
    labels = [torch.randint(0, 11, (count,), generator=generator) for count in frames]
    return waveforms, labels, torch.arange(len(lengths)) * 7919 + 5


def test_loss_equals_the_plain_formula(model: HubertForPreTraining) -> None:
    waveforms, labels, keys = _batch()
    output = model(Packed.pack(waveforms), keys=keys, labels=torch.cat(labels))

    expected, correct, penalty, masked = torch.zeros(()), 0, torch.zeros(()), 0
    for waveform, targets, key in zip(waveforms, labels, keys, strict=True):
        frames = model.hubert.extract_features(Packed.pack([waveform]))
        mask = sample_span_mask(frames.layout, key[None], probability=0.8, length=10, min_spans=2)
        x, _ = model.hubert.feature_projection(frames.values)
        x = torch.where(mask[:, None], model.hubert.masked_spec_embed, x)
        x = model.hubert.encoder(Packed(x, frames.layout))[-1].values
        for row in mask.nonzero().squeeze(1).tolist():
            projected = model.final_proj(x)[row]
            scores = torch.stack([F.cosine_similarity(projected, code, dim=0) / 0.1 for code in model.label_embeddings])
            expected = expected - (scores[targets[row]] - torch.logsumexp(scores, 0))
            correct += int(scores.argmax() == targets[row])
        if len(targets):
            penalty = penalty + frames.values.square().mean() * mask.sum()
        masked += int(mask.sum())
    assert output.masked_frames == masked > 20
    torch.testing.assert_close(output.prediction_loss, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss, expected + 10 * penalty, rtol=1e-5, atol=0)
    assert output.correct == correct
    assert output.code_counts.tolist() == torch.bincount(torch.cat(labels), minlength=11).tolist()
    assert output.scores()["chance"] == pytest.approx(masked / 11)


def test_batch_mates_do_not_matter(model: HubertForPreTraining) -> None:
    waveforms, labels, keys = _batch()
    together = model(Packed.pack(waveforms), keys=keys, labels=torch.cat(labels)).features.unpack()
    for index, waveform in enumerate(waveforms):
        alone = model(Packed.pack([waveform]), keys=keys[index : index + 1], labels=labels[index])
        assert torch.equal(alone.features.values, together[index])


def test_every_parameter_learns_and_unmasked_frames_teach_nothing(model: HubertForPreTraining) -> None:
    waveforms, labels, keys = _batch()
    targets = torch.cat(labels)
    output = model(Packed.pack(waveforms), keys=keys, labels=targets)
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())

    layout = output.features.layout
    mask = sample_span_mask(layout, keys, probability=0.8, length=10, min_spans=2)
    other = torch.where(mask, targets, (targets + 1) % 11)
    again = model(Packed.pack(waveforms), keys=keys, labels=other)
    assert torch.equal(again.loss, output.loss)


def test_empty_batch_has_zero_loss_and_gradients(model: HubertForPreTraining) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    output = model(Packed.pack([torch.zeros(100, 1)]), keys=torch.zeros(1, dtype=torch.int64), labels=empty)
    assert output.loss == 0
    output.loss.backward()
    assert output.masked_frames == 0


def test_bf16_keeps_the_cosines_in_fp32(model: HubertForPreTraining) -> None:
    waveforms, labels, keys = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(Packed.pack(waveforms), keys=keys, labels=torch.cat(labels))
    assert output.loss.dtype == torch.float32
    full = model(Packed.pack(waveforms), keys=keys, labels=torch.cat(labels))
    torch.testing.assert_close(output.prediction_loss, full.prediction_loss, rtol=0.05, atol=0)


def test_presets_and_errors(model: HubertForPreTraining) -> None:
    assert recipe_model("hubert-base").num_clusters == 100
    waveforms, labels, keys = _batch()
    with pytest.raises(ValueError, match="labels: expected one for each"):
        model(Packed.pack(waveforms), keys=keys, labels=torch.cat(labels)[1:])
    for wrong in ({"num_clusters": 1}, {"mask_time_prob": 1.5}, {"logit_temperature": 0.0}, {"model_type": "wavlm"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HubertConfig(**wrong)


def test_loss_and_gradients_equal_those_of_torchaudio(model: HubertForPreTraining) -> None:
    pytest.importorskip("torchaudio", exc_type=ImportError)
    device = torch.device("cpu")
    gate = bench_hubert_step._Gate(model, device)
    expected = gate.theirs(rivals.in_double(rivals.torchaudio_hubert(model)))
    model.config = dataclasses.replace(_TINY, features_penalty_weight=0.0)
    found = gate.ours(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = 1e-5 * float(tensor.abs().max())
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.gpu
def test_the_host_waits_for_the_device_once() -> None:
    """That wait reads the number of masked frames."""
    torch.manual_seed(0)
    model = HubertForPreTraining(_TINY).cuda().train()
    waveforms, labels, keys = _batch()
    packed, targets, keys = Packed.pack(waveforms).to("cuda"), torch.cat(labels).cuda(), keys.cuda()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(packed, keys=keys, labels=targets)
        output.loss.backward()

    waits = device_waits(step)
    assert len(waits) == 1, waits
