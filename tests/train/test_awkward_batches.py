"""Test batches without frames, and batches in which one utterance is not finite, in every model and system."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.data.batches import AudioBatch
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.folder import MODEL_CLASSES
from fastssl.models.pretraining import StepContext
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.models.wavlm import WavLMConfig, mix_utterances
from fastssl.nn import SequenceCompressor
from fastssl.nn.compression import KINDS
from fastssl.packing import Layout, Packed
from fastssl.train.systems import SYSTEMS, build_model
from tests.interop.tiny_models import (
    ACCELERATED_FAMILIES,
    BUCKETS,
    LARGE,
    TINY,
    TRAINED,
    WITH_ADAPTERS,
    transformers_model,
)
from tests.train.conftest import model_of

#: Batches of whose utterances none has a frame: no utterance, one without samples, some that are too short.
WITHOUT_FRAMES: tuple[tuple[int, ...], ...] = ((), (0,), (3, 100))
COMPRESSORS = ("none", *KINDS)
EVERY_COMPRESSOR = pytest.mark.parametrize("compressor", COMPRESSORS)


def waveforms_of(lengths: Sequence[int]) -> Packed:
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(length, 1, generator=generator) for length in lengths]
    return Packed(torch.cat([torch.empty(0, 1), *samples]), Layout.from_lengths(lengths))


def settings_of(compressor: str) -> dict[str, Any]:
    return {"compressor": compressor, "compressor_factor": 3 if compressor in ("average", "strided") else 1}


def encoders(compressor: str) -> list[SpeechEncoder]:
    """Return a tiny encoder of every architecture."""
    torch.manual_seed(0)
    shapes = [{"model_type": name} for name in MODEL_CLASSES] + [{"model_type": "wavlm"} | LARGE | BUCKETS, LARGE]
    made: list[SpeechEncoder] = [
        Encoder(EncoderConfig.from_dict(TINY | {"num_conv_pos_embeddings": 3} | shape | settings_of(compressor)))
        for shape in shapes
    ]
    small: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    small |= {"num_hidden_layers": 2, "conv_dim": (16, 16), "conv_depthwise_kernel_size": 7, "hidden_dropout": 0.0}
    small |= {"attention_dropout": 0.0, "activation_dropout": 0.0}
    return [*made, ConformerEncoder(ConformerConfig(**small, **settings_of(compressor)))]


class Teacher:
    """Gives zeros as the target of each of two layers."""

    def of(self, batch: AudioBatch) -> tuple[None, list[Tensor]]:
        return None, [torch.zeros(frames_of(batch.waveforms), 32)] * 3


def frames_of(waveforms: Packed) -> int:
    return sum(max(0, (length - 400) // 320 + 1) for length in waveforms.layout.lengths)


@EVERY_COMPRESSOR
def test_encoders_serve_batches_without_frames(compressor: str) -> None:
    for encoder in encoders(compressor):
        for lengths in WITHOUT_FRAMES:
            for training in (False, True):
                waveforms = waveforms_of(lengths)
                output = encoder.train(training)(Packed(waveforms.values.requires_grad_(), waveforms.layout))
                assert output.features.values.shape == (0, encoder.config.hidden_size)
                assert output.features.layout.lengths == (0,) * len(lengths)
                sum(state.values.sum() for state in output.hidden_states).backward()
                assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


@EVERY_COMPRESSOR
@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_serve_batches_without_frames(system: str, compressor: str) -> None:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(model_of(system), **settings_of(compressor)))
    for lengths in WITHOUT_FRAMES:
        waveforms = waveforms_of(lengths)
        ids = torch.arange(len(lengths))
        labels = torch.empty(0, dtype=torch.int64)
        batch = AudioBatch(waveforms, ids, tuple(map(str, lengths)), 0, (), labels=labels, noise=None)
        for training in (True, False):
            output = model.train(training).step(batch, StepContext(ids, 0, teacher=Teacher()))
            assert output.loss.item() == 0.0
            assert output.masked_frames == 0
            assert all(math.isfinite(score) for score in output.scores().values())
            if training:
                output.loss.backward()
                assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_take_samples_without_a_channel_and_do_not_normalise_them_again(system: str) -> None:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(model_of(system), do_normalize=True))
    column = waveforms_of((5_000, 3_000))
    column = Packed(0.1 * column.values + 0.3, column.layout)
    ids, labels = torch.arange(2), torch.zeros(frames_of(column), dtype=torch.int64)
    losses = []
    for do_normalize in (True, False):
        # A data worker has normalised already, if the config says so. WavLM's mixtures are another matter.
        model.config = model.speech_encoder.config = dataclasses.replace(model.config, do_normalize=do_normalize)
        for training in (False,) if system == "wavlm" else (False, True):
            for waveforms in (column, Packed(column.values.squeeze(1), column.layout)):
                batch = AudioBatch(waveforms, ids, ("a", "b"), 0, (), labels=labels, noise=None)
                output = model.train(training).step(batch, StepContext(ids, 0, teacher=Teacher()))
                losses.append((training, output.loss.item()))
    assert all(math.isfinite(loss) for _, loss in losses)
    assert len(set(losses)) == len({training for training, _ in losses})


def test_utterances_without_a_channel_are_mixed_alike() -> None:
    config, column = model_of("wavlm"), waveforms_of((5_000, 3_000))
    assert isinstance(config, WavLMConfig)
    config, keys = dataclasses.replace(config, mixing_prob=1.0, do_normalize=True), torch.arange(2)
    flat = Packed(column.values.squeeze(1), column.layout)
    noise = waveforms_of((0, 2_000))
    for ours, theirs in ((None, None), (noise, Packed(noise.values.squeeze(1), noise.layout))):
        found, expected = (mix_utterances(x, keys, config, noise=y) for x, y in ((flat, theirs), (column, ours)))
        assert torch.equal(found.values, expected.values)
        assert not torch.equal(found.values, column.values)


@pytest.mark.parametrize("compressor", ["none", "integrate-and-fire"])
@pytest.mark.parametrize("norm", ["valid", "padded"])
@pytest.mark.parametrize("variant", [*ACCELERATED_FAMILIES, *WITH_ADAPTERS])
def test_accelerated_models_serve_batches_without_frames(variant: str, norm: Any, compressor: Any) -> None:
    model = fastssl.accelerate(transformers_model(variant), norm=norm)
    if compressor != "none":
        fastssl.accelerate(model, norm=norm, compressor=SequenceCompressor(48, kind=compressor))
    for rows, samples in ((0, 6000), (2, 100)):
        for training in (False, True) if variant in TRAINED else (False,):
            mask = torch.ones(rows, samples, dtype=torch.long)
            output = model.train(training)(torch.randn(rows, samples), attention_mask=mask, output_hidden_states=True)
            assert output.last_hidden_state.numel() == 0
            sum(state.sum() for state in output.hidden_states).backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@EVERY_COMPRESSOR
@torch.no_grad()
def test_an_utterance_that_is_not_finite_leaves_its_batch_mates_alone(compressor: str, bad: float) -> None:
    lengths = (4_000, 9_000, 5_000)
    for encoder in encoders(compressor):
        for training in (False, True):
            encoder.train(training)
            good = waveforms_of(lengths).unpack()
            alone = encoder(Packed.pack([good[0], good[2]]))
            broken = good[1].clone()
            broken[4_500] = bad
            together = encoder(Packed.pack([good[0], broken, good[2]]))
            for one, other in zip(together.hidden_states, alone.hidden_states, strict=True):
                first, middle, last = one.unpack()
                assert torch.equal(first, other.unpack()[0])
                assert torch.equal(last, other.unpack()[1])
            assert not middle.isfinite().any()


@pytest.mark.parametrize("compressor", ["none", "integrate-and-fire"])
@pytest.mark.parametrize(
    "variant", ["wav2vec2 base", "hubert large", "wavlm base", "data2vec", "sew base", "conformer base"]
)
@torch.no_grad()
def test_rows_of_an_accelerated_model_do_not_share_nan(variant: str, compressor: Any) -> None:
    given = None if compressor == "none" else SequenceCompressor(48, kind=compressor)
    model = fastssl.accelerate(transformers_model(variant), compressor=given)
    samples = torch.randn(3, 6000)
    alone = model(samples[[0, 2]]).last_hidden_state
    samples[1, 3000] = math.nan
    together = model(samples).last_hidden_state
    assert torch.equal(together[[0, 2]], alone)
    assert together[1].isnan().any()
