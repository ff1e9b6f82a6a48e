"""Test the random choices that data loaders make for a step."""

import dataclasses
from typing import Any

import pytest
import torch

from fastssl.data.batches import AudioBatch, BatchSpec
from fastssl.models.draws import Draws
from fastssl.models.pretraining import StepContext
from fastssl.nn.random import utterance_keys
from fastssl.packing import Packed
from fastssl.train.data import DrawnDataset, PretrainDataModule
from fastssl.train.module import VALIDATION_UPDATE
from fastssl.train.systems import SYSTEMS, build_model
from tests.train.conftest import MakeConfig, model_of

MASKED = [system for system in SYSTEMS if system != "distillation"]
LENGTHS = (9_000, 300, 6_000)


def batch_of(update: int) -> AudioBatch:
    waveforms = Packed.pack([torch.randn(length, 1, generator=torch.Generator().manual_seed(1)) for length in LENGTHS])
    frames = sum(max(0, (length - 400) // 320 + 1) for length in LENGTHS)
    return AudioBatch(waveforms, torch.arange(3) * 7919, ("",) * 3, update, (), labels=torch.arange(frames) % 7)


class Recordings:
    """A data set of one batch."""

    def __getitem__(self, spec: BatchSpec) -> AudioBatch:
        return batch_of(spec.update)


def drawn(config: Any, system: str, *, held_out: bool) -> AudioBatch:
    def draw(*given: Any, training: bool) -> Draws | None:
        return SYSTEMS[system].draw(config, *given, training=training)

    data = DrawnDataset(Recordings(), draw, seed=3, held_out=held_out)  # type: ignore[arg-type]
    return data[BatchSpec(5, (), None, 3)]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("system", MASKED)
def test_a_step_draws_what_the_loader_draws(system: str, held_out: bool) -> None:
    config = model_of(system)
    batch = drawn(config, system, held_out=held_out)
    assert isinstance(batch.draws, Draws)
    assert 0 < len(batch.draws.rows) == batch.draws.mask.sum() == batch.draws.counts.sum()
    torch.manual_seed(0)
    model = build_model(config).train(not held_out)
    context = StepContext(utterance_keys(3, VALIDATION_UPDATE if held_out else 5, batch.ids), 5)
    given, own = (model.step(one, context) for one in (batch, dataclasses.replace(batch, draws=None)))
    assert given.masked_frames == own.masked_frames == len(batch.draws.rows)
    assert torch.equal(given.loss, own.loss)
    for name, score in own.scores().items():
        assert torch.equal(given.scores()[name], score), name
    # A step uses what it is given.
    fewer = dataclasses.replace(batch, draws=drawn(config, system, held_out=not held_out).draws)
    if held_out:
        assert not torch.equal(model.step(fewer, context).loss, own.loss)


@pytest.mark.parametrize("system", ["wav2vec2", "hubert"])
def test_nothing_is_drawn_in_advance_if_a_compressor_decides_on_the_frames(system: str) -> None:
    config = dataclasses.replace(model_of(system), compressor="integrate-and-fire")
    assert drawn(config, system, held_out=False).draws is None


def test_the_loaders_of_a_run_draw(make_config: MakeConfig) -> None:
    config = make_config()
    seen: list[bool] = []

    def draw(samples: Any, keys: Any, *, training: bool) -> None:
        seen.append(training)
        assert len(samples.lengths) == len(keys)

    data = PretrainDataModule(config.audio, config.data, normalize=True, seed=3, accumulation=1, draw=draw)
    data._loader([BatchSpec(0, tuple(data.train_corpus.cuts)[:2], 2.0, 3)], "train").__iter__().__next__()
    data._loader([BatchSpec(0, tuple(data.train_corpus.cuts)[:2], 2.0, 3)], "valid").__iter__().__next__()
    assert seen == [True, False]


def test_choices_are_sent_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = drawn(model_of("wav2vec2"), "wav2vec2", held_out=False).draws
    sent = draws.sent(torch.device("meta"))
    assert len({part.untyped_storage()._cdata for part in sent}) == 1
    assert [(part.shape, part.dtype, part.is_meta) for part in sent] == [
        (part.shape, part.dtype, True) for part in draws
    ]
    assert draws.sent(torch.device("cpu")).mask is draws.mask
