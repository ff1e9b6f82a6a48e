"""Test quality measurements during training: they write rows to the metrics, and do not affect training."""

import copy
import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from fastssl.data.batches import AudioBatch
from fastssl.data.corpus import open_corpus
from fastssl.eval.quality.measure import quality_loader
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.train.quality_callback import QUALITY_PANELS, QualityMonitor, draw_quality, quality_columns

_CONFIG = EncoderConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    conv_dim=(8,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)


class _Training(LightningModule):
    """Training that draws from global random generators, which a measurement could disturb."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        noise = float(np.random.rand()) * random.random()  # noqa: NPY002 - the global generator, on purpose
        features: Tensor = self.encoder(batch.waveforms).features.values
        return (features.tanh() - noise * torch.rand_like(features)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class _Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def __call__(self, trainer: Trainer, row: dict[str, float]) -> None:
        self.rows.append({"update": trainer.global_step, **row})


@pytest.fixture
def loader(recordings: Path) -> DataLoader[AudioBatch]:
    return quality_loader(list(open_corpus(recordings, min_duration_s=1).cuts)[8:], normalize=True)


def _train(loader: DataLoader[AudioBatch], callbacks: Any, *, accumulate: int = 1, steps: int = 5) -> Encoder:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    module = _Training(Encoder(_CONFIG))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks(module.encoder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: DataLoader[AudioBatch] = DataLoader([batch for batch in loader for _ in range(10)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, batches)
    return module.encoder


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_does_not_notice(loader: DataLoader[AudioBatch], accumulate: int) -> None:
    write = _Rows()

    held_out = list(loader)

    def batches() -> DataLoader[AudioBatch]:
        np.random.rand()  # noqa: NPY002
        random.random()
        return DataLoader(held_out, batch_size=None)  # type: ignore[arg-type] # draws from torch's global generator

    def measuring(encoder: Encoder) -> list[Callback]:
        return [QualityMonitor(encoder, batches, write, every=2)]

    without = _train(loader, lambda _: [], accumulate=accumulate).state_dict()
    trained = _train(loader, measuring, accumulate=accumulate)
    assert all(torch.equal(tensor, without[name]) for name, tensor in trained.state_dict().items())
    assert trained.training
    assert [row["update"] for row in write.rows] == [2, 4, 5]
    for row in write.rows:
        assert list(row) == ["update", *quality_columns(1)]
    # Training changes the layers, so the measures change too.
    assert write.rows[0]["quality_effective_rank_1"] != write.rows[1]["quality_effective_rank_1"]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_cost_is_told_and_the_clock_stands_still(
    loader: DataLoader[AudioBatch], caplog: pytest.LogCaptureFixture
) -> None:
    states: list[str] = []

    @contextmanager
    def paused() -> Iterator[None]:
        states.append("stands")
        yield
        states.append("goes")

    def write(trainer: Trainer, row: dict[str, float]) -> None:
        states.append("row")

    caplog.set_level(logging.INFO, "fastssl")
    _train(loader, lambda encoder: [QualityMonitor(encoder, lambda: loader, write, every=5, paused=paused)])
    assert states == ["stands", "row", "goes"]
    assert "% of the training time" in caplog.text
    assert "measured 1 times" in caplog.text
    caplog.clear()
    _train(loader, lambda encoder: [QualityMonitor(encoder, lambda: loader, write, every=None)])
    assert len(states) == 3
    assert "quality" not in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_measurement_that_fails_is_a_warning(
    loader: DataLoader[AudioBatch], caplog: pytest.LogCaptureFixture
) -> None:
    write = _Rows()
    numbers = iter([True, False])

    def sometimes() -> DataLoader[AudioBatch]:
        if next(numbers):
            raise OSError("the disk is gone")
        return loader

    _train(loader, lambda encoder: [QualityMonitor(encoder, sometimes, write, every=2)], steps=4)
    assert "quality was not measured after 2 updates: the disk is gone" in caplog.text
    assert [row["update"] for row in write.rows] == [4]

    def spoiled(encoder: Encoder) -> list[Callback]:
        other = copy.deepcopy(encoder)
        torch.nn.init.constant_(other.get_parameter("encoder.layers.0.final_layer_norm.weight"), math.nan)
        return [QualityMonitor(other, lambda: loader, write, every=2)]

    _train(loader, spoiled, steps=2)
    assert "after 2 updates: layer 1: rows: some are NaN or infinite" in caplog.text
    assert len(write.rows) == 1


def test_other_processes_wait(loader: DataLoader[AudioBatch]) -> None:
    waited: list[str] = []
    trainer: Any = SimpleNamespace(
        is_global_zero=False,
        accumulate_grad_batches=1,
        global_step=4,
        max_steps=9,
        strategy=SimpleNamespace(barrier=waited.append),
    )
    write = _Rows()
    monitor = QualityMonitor(Encoder(_CONFIG), lambda: loader, write, every=4)
    module: Any = None
    batch: Any = None
    monitor.on_train_batch_end(trainer, module, None, batch, 3)
    assert (len(waited), write.rows) == (1, [])
    trainer.global_step = 5
    monitor.on_train_batch_end(trainer, module, None, batch, 4)
    assert len(waited) == 1


def test_columns() -> None:
    columns = quality_columns(2)
    assert columns[:3] == ["quality_effective_rank_0", "quality_effective_rank_1", "quality_effective_rank_2"]
    assert columns[3] == "quality_rankme_0"
    assert columns[6] == "quality_inertia_0"
    assert columns[-1] == "quality_davies_bouldin_2"


def test_panels() -> None:
    rows = [{"update": float(update), "loss": 1.0} for update in range(4)]
    figure = Figure()
    axes = iter(figure.subplots(1, QUALITY_PANELS + 1))
    assert not draw_quality(axes, rows)
    for row in rows[1::2]:
        row |= {name: row["update"] + index for index, name in enumerate(quality_columns(1))}
    del rows[3]["quality_davies_bouldin_1"]  # as for a value that was not finite
    assert draw_quality(axes, rows)
    assert len(list(axes)) == 1
    lines = [[np.asarray(line.get_xydata()).tolist() for line in panel.lines] for panel in figure.axes]
    assert lines[0] == [[[1, 1], [3, 3]], [[1, 2], [3, 4]]]
    assert lines[3] == [[[1, 7], [3, 9]], [[1, 8]]]
    assert figure.axes[0].get_xlabel() == "update"
    for row in rows[1::2]:
        row["audio_hours"] = row["update"] / 10
    figure = Figure()
    draw_quality(iter(figure.subplots(1, QUALITY_PANELS)), rows)
    assert np.asarray(figure.axes[0].lines[0].get_xdata()).tolist() == pytest.approx([0.1, 0.3])
