"""Test that processes or accumulation steps that share an update have one process's loss curve on the joint batch."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from fastssl.data.batches import AudioBatch, UpdateSampler, WaveformDataset
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from tests.train.conftest import WITHOUT_DROPOUT, WORKER, MakeConfig, as_yaml_file

_UPDATES = 6
_SETTINGS = {**WITHOUT_DROPOUT, "trainer.max_steps": _UPDATES, "optimizer.clip_norm": 1.0}


class _JointBatches(IterableDataset[AudioBatch]):
    """Joins the two micro-batches of each update into one batch."""

    def __init__(self, data: PretrainDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[AudioBatch]:
        config = self.data.config
        sampler = UpdateSampler(
            self.data.train_corpus.cuts,
            max_duration_s=config.max_duration_s,
            crop_s=config.crop_s,
            seed=self.data.seed,
            accumulation=2,
        )
        dataset = WaveformDataset(normalize=self.data.normalize)
        specs = iter(sampler)
        while True:
            first, second = dataset[next(specs)], dataset[next(specs)]
            assert first.update == second.update
            waveforms = Packed.pack([*first.waveforms.unpack(), *second.waveforms.unpack()])
            ids = torch.cat((first.ids, second.ids))
            yield AudioBatch(waveforms, ids, first.names + second.names, first.update, ())


@pytest.fixture
def joint_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one process train on both micro-batches of an update at once."""

    def loader(self: PretrainDataModule) -> DataLoader[AudioBatch]:
        return DataLoader(_JointBatches(self), batch_size=None)

    monkeypatch.setattr(PretrainDataModule, "train_dataloader", loader)


def _curves(config: PretrainConfig) -> dict[str, list[float]]:
    rows = [row for row in read_metrics(Path(config.output) / "metrics.csv") if "loss" in row]
    assert [row["update"] for row in rows] == list(range(1, _UPDATES + 1))
    names = ("loss", "contrastive_loss", "features_penalty", "grad_norm", "masked_frames", "accuracy", "audio_hours")
    return {name: [row[name] for row in rows] for name in names}


def _assert_same_curves(config: PretrainConfig, joint: PretrainConfig) -> None:
    found, expected = _curves(config), _curves(joint)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_two_processes_equal_one_on_the_joint_batch(
    make_config: MakeConfig, joint_batches: None, tmp_path: Path
) -> None:
    joint = make_config("joint", **_SETTINGS)
    pretrain(joint)
    double = make_config("double", **_SETTINGS, **WORKER, **{"trainer.devices": 2})
    command = [sys.executable, "-m", "fastssl", "pretrain", "--config", str(as_yaml_file(double, tmp_path))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [*command, "--output", double.output], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    _assert_same_curves(double, joint)


def test_two_accumulation_steps_equal_the_joint_batch(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Without the diversity loss, which is computed per batch and so depends on how an update is divided.
    settings: dict[str, Any] = {**_SETTINGS, "model.diversity_loss_weight": 0.0}
    double = make_config("double", **settings, **WORKER, **{"trainer.accumulation": 2})
    pretrain(double)
    request.getfixturevalue("joint_batches")
    joint = make_config("joint", **settings)
    pretrain(joint)
    _assert_same_curves(double, joint)
