"""Test errors and warnings before a run starts."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch

from fastssl.data.batches import AudioBatch, BatchSpec, WaveformDataset
from fastssl.models.wav2vec2 import GumbelTemperature
from fastssl.train.data import PretrainDataModule
from fastssl.train.pretrain import _describe, pretrain
from fastssl.train.systems import build_model
from tests.train.conftest import MakeConfig


def _open(config: Any) -> PretrainDataModule:
    return PretrainDataModule(config.audio, config.data, normalize=True, seed=config.seed, accumulation=1)


def _files(data: PretrainDataModule, name: str) -> set[str]:
    return {Path(cut.recording.sources[0].source).resolve().name for cut in getattr(data, name).cuts}


def test_what_is_scored_is_not_trained_on(
    make_config: MakeConfig, recordings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The same files under another name.
    (tmp_path / "link").symlink_to(recordings / "speaker0")
    changes = {"data.valid": str(tmp_path / "link"), "trainer.max_steps": 1}
    data = _open(make_config(**changes))
    training, held_out = _files(data, "train_corpus"), _files(data, "valid_corpus")
    assert len(held_out) == data.num_overlapping == 5
    assert training == {path.name for path in recordings.rglob("*.wav")} - held_out
    with caplog.at_level(logging.INFO, logger="fastssl"):
        pretrain(make_config(**changes))
    assert "data.valid holds them out: 5 cuts of AUDIO" in caplog.text
    with pytest.raises(ValueError, match="nothing is left to train on"):
        _open(make_config(audio=recordings / "speaker0", **{"data.valid": str(recordings)}))
    shutil.copytree(recordings / "speaker1", tmp_path / "other")
    assert _open(make_config(**{"data.valid": str(tmp_path / "other")})).num_overlapping == 0


def test_held_out_share_that_is_far_from_the_wish_is_said(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(make_config(**{"data.valid": 0.2, "trainer.max_steps": 1}))
    assert "is held out, more than data.valid" not in caplog.text
    pretrain(make_config("other", **{"data.valid": 0.001, "trainer.max_steps": 1}))
    assert "is held out, more than data.valid (0.1 %)" in caplog.text


@pytest.mark.parametrize(
    ("gpus", "changes", "message"),
    [
        (0, {"accelerator": "auto", "precision": "16-mixed"}, "trainer.precision: 16-mixed needs a GPU"),
        (2, {"accelerator": "cpu", "precision": "16-mixed"}, "trainer.precision: 16-mixed needs a GPU"),
        (0, {"accelerator": "gpu"}, "trainer.accelerator: gpu"),
        (2, {"accelerator": "auto", "devices": 3}, "trainer.devices: must be at most the number of GPUs"),
    ],
)
def test_missing_devices_are_refused_before_the_folder_is_written(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, gpus: int, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = make_config(**{f"trainer.{name}": value for name, value in changes.items()})
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not Path(config.output).exists()


def test_a_machine_with_another_accelerator_trains_on_the_cpu(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's "auto" would take the GPU of a Mac, on which PyTorch has no fp64."""
    monkeypatch.setattr("lightning.fabric.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = make_config(**{"trainer.accelerator": "auto", "trainer.max_steps": 1})
    pretrain(config)
    assert (Path(config.output) / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("precision", "accelerator", "said"),
    [("32-true", "auto", True), ("32-true", "cpu", False), ("bf16-mixed", "auto", False)],
)
def test_an_fp32_run_on_a_gpu_says_what_precision_runs(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    accelerator: str,
    said: bool,
) -> None:
    config = make_config(**{"trainer.precision": precision, "trainer.accelerator": accelerator})
    model = build_model(config.model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    with caplog.at_level(logging.INFO, logger="fastssl"):
        _describe(config, _open(config), model, complete=True, resume_from=None)
    assert ("precision: fp32: convolutions in TF32, matrix products in full fp32" in caplog.text) == said
    # This process has found no GPU for Triton.
    assert ("plain PyTorch replaces kernels, which takes longer: " in caplog.text) == (accelerator == "auto")


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.01, float("nan")])
def test_temperature_never_rises(decay: float) -> None:
    with pytest.raises(ValueError, match=r"gumbel_temperature\.decay"):
        GumbelTemperature(decay=decay)


def test_batches_reach_the_device_without_waiting(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(AudioBatch, "to", lambda self, device, non_blocking=False: asked.append(non_blocking))
    batch = WaveformDataset(normalize=False)[BatchSpec(0, (), None, 0)]
    _open(make_config()).transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert asked == [True]


def test_old_rules_give_the_recordings_that_they_gave(
    make_config: MakeConfig, recordings: Path, tmp_path: Path
) -> None:
    shutil.copytree(recordings, tmp_path / "audio")
    samples, rate = soundfile.read(next(recordings.rglob("*.wav")))
    soundfile.write(tmp_path / "audio" / "new.aiff", samples, rate)
    old, new = (_open(make_config(audio=tmp_path / "audio", **{"data.rules": rules})) for rules in (1, 2))
    before, now = (_files(data, "train_corpus") | _files(data, "valid_corpus") for data in (old, new))
    assert now - before == {"new.aiff"}
    assert _open(make_config(**{"data.rules": 1}))._fingerprint() == old._fingerprint() != new._fingerprint()
    assert {cut.custom is None for cut in old.train_corpus.cuts} == {True}
    assert {cut.custom["rules"] for cut in new.train_corpus.cuts} == {2}
