"""Test failures that stop a run, and their messages."""

import logging
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from fastssl.data.corpus import Problem
from fastssl.data.noise import NoiseProblem
from fastssl.interop import load_encoder
from fastssl.packing import Packed
from fastssl.train.account import Account
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import _COUNTS, PretrainModule, TrainingError
from fastssl.train.monitors import Monitor
from fastssl.train.pretrain import pretrain
from fastssl.train.systems import build_model
from tests.tiny import write_recording
from tests.train.conftest import WORKER, MakeConfig


def _damage(path: Path) -> None:
    """Cut off the end of the file but keep its header, so that only decoding fails."""
    path.write_bytes(path.read_bytes()[:2000])


def _flac_folder(folder: Path, number: int) -> list[Path]:
    paths = []
    for index in range(number):
        write_recording(folder / f"{index:02d}.wav", 2.0, seed=index)
        samples, rate = soundfile.read(folder / f"{index:02d}.wav")
        paths.append(folder / f"{index:02d}.flac")
        soundfile.write(paths[-1], samples, rate)
        (folder / f"{index:02d}.wav").unlink()
    return paths


@pytest.mark.parametrize(
    ("level", "compressor", "what"),
    [
        (3e38, "none", r"the loss is nan in update \d+\..*batch: \S*loud\.wav$"),
        (3e38, "integrate-and-fire", r"the loss is nan in update \d+\..*batch: \S*loud\.wav$"),
        (1e18, "none", r"the gradient norm is (inf|nan) in update \d+.*loud\.wav"),
    ],
)
def test_what_is_not_finite_names_the_files_and_spares_the_weights(
    make_config: MakeConfig,
    recordings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    level: float,
    compressor: str,
    what: str,
) -> None:
    shutil.copytree(recordings, tmp_path / "audio")
    # The samples are finite but their squares overflow. The reader would refuse them; here, the problem appears only
    # inside the model.
    monkeypatch.setattr("fastssl.data.audio._LARGEST_SAMPLE", math.inf)
    soundfile.write(tmp_path / "audio" / "loud.wav", np.full(32000, level, dtype=np.float32), 16000, subtype="FLOAT")
    changes = {
        "model.do_normalize": False,
        "model.compressor": compressor,
        "data.valid": 0.0,
        "trainer.checkpoint_every": 1,
        "trainer.max_steps": 12,
    }
    config = make_config(audio=tmp_path / "audio", **changes)
    with pytest.raises(TrainingError, match=f"(?s){what}"):
        pretrain(config)
    run = Path(config.output)
    rows = read_metrics(run / "metrics.csv") if (run / "metrics.csv").exists() else []
    assert all(math.isfinite(row["loss"]) for row in rows)
    if (run / "checkpoints" / "last.ckpt").exists():
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == len(rows)
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
        assert all(tensor.isfinite().all() for tensor in load_encoder(run).state_dict().values())


def test_damaged_recordings_are_named_once_and_survive_resume(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = _flac_folder(tmp_path / "audio", 20)
    _damage(paths[3])
    (tmp_path / "audio" / "empty.wav").touch()
    config = make_config(audio=tmp_path / "audio", **WORKER, **{"data.valid": 0.0, "trainer.max_steps": 16})
    with caplog.at_level(logging.INFO, logger="fastssl"):
        pretrain(config)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("empty.wav is empty" in message for message in warnings) == 1
    assert sum("03.flac" in message for message in warnings) == 1
    rows = read_metrics(Path(config.output) / "metrics.csv")
    # A batch holds three recordings, so 16 updates pass over the corpus more than twice.
    assert sum(row["utterances"] for row in rows) > 40
    assert rows[-1]["unusable"] == 1
    summary = capsys.readouterr().out
    assert re.search(r"recordings left out +│ +│ 1 ", summary)
    assert re.search(r"recordings unusable +│ +│ 1 ", summary)
    checkpoint = torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["PretrainDataModule"]
    assert [Path(name).name for name in state["unusable"]] == ["03.flac"]
    assert state["draws"] > sum(row["utterances"] for row in rows)
    caplog.clear()
    longer = {**WORKER, "data.valid": 0.0, "trainer.max_steps": 30}
    pretrain(make_config(audio=tmp_path / "audio", **longer), resume=True)
    assert "03.flac" not in caplog.text
    assert read_metrics(Path(config.output) / "metrics.csv")[-1]["unusable"] == 1


def test_folder_where_nothing_decodes_stops(make_config: MakeConfig, tmp_path: Path) -> None:
    for path in _flac_folder(tmp_path / "audio", 12):
        _damage(path)
    config = make_config(audio=tmp_path / "audio", **{"data.valid": 0.0, "trainer.max_steps": 1000})
    with pytest.raises(TrainingError, match=r"of the \d+ recordings drawn so far cannot be used.*\.flac does not"):
        pretrain(config)


def test_account_judges_fractions_of_what_was_drawn() -> None:
    def problems(*numbers: int) -> list[Problem]:
        return [Problem(f"{number}.wav", "does not decode") for number in numbers]

    account = Account(1000, 0.05, [])
    assert account.note(3, problems(0)) == problems(0)
    assert account.note(3, problems(0)) == []
    account.note(100, problems(1, 2, 3, 4, 5, 6, 7, 8, 9))
    with pytest.raises(TrainingError, match="11 of the 107 recordings"):
        account.note(1, problems(10))
    account = Account(1000, 0.05, [])
    account.note(5000, [])
    account.note(1, problems(*range(50)))
    with pytest.raises(TrainingError, match="51 of the 1000 recordings"):
        account.note(1, problems(50))
    with pytest.raises(TrainingError, match="2 of the 2"):
        Account(2, 0.05, []).note(2, problems(0, 1))
    with pytest.raises(TrainingError, match="1 of the 3"):
        Account(3, 0.05, []).note(3, problems(0))
    with pytest.raises(TrainingError, match="1 of the 1 recordings"):
        Account(1000, 0.0, []).note(1, problems(0))
    account = Account(40, 0.05, [])
    account.note(1, problems(0))
    account.note(1, problems(1))
    with pytest.raises(TrainingError, match="3 of the 3"):
        account.note(1, problems(2))


def test_noise_is_judged_apart_from_the_audio() -> None:
    def problems(*numbers: int) -> list[Problem]:
        return [NoiseProblem(f"noise {number}.wav", "does not decode") for number in numbers]

    account = Account(40, 0.05, [], total_noise=1000)
    for number in range(50):
        assert account.note(1, problems(number, 0)) == problems(number)
    account.note(1, [Problem("0.wav", "does not decode")])
    with pytest.raises(TrainingError, match=r"51 of the 1000 recordings of data\.noise cannot be used"):
        account.note(1, problems(50))
    account = Account(1000, 0.05, [], total_noise=2)
    with pytest.raises(TrainingError, match=r"1 of the 2 recordings of data\.noise"):
        account.note(1, problems(0))


def test_fp16_does_not_skip_updates_for_ever(make_config: MakeConfig) -> None:
    config = make_config()
    module = PretrainModule(
        build_model(config.model),
        optimizer=config.optimizer,
        max_steps=100,
        seed=0,
    )
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(precision_plugin=precision, world_size=1, global_step=0, strategy=strategy)
    module._trainer = trainer  # type: ignore[assignment]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    waveforms = Packed.pack([torch.zeros(16_000, 1)])
    batch: Any = SimpleNamespace(names=("loud.wav",), waveforms=waveforms, problems=())
    sums = torch.zeros(len(_COUNTS) + 1 + len(module.model.score_names), dtype=torch.float64)

    def update(gradient: float) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        module._reduced, module._pending = sums, [(sums, batch)]
        module.configure_gradient_clipping(optimizer)

    for gradient in (*[math.inf] * 19, 0.0, *[math.inf] * 19):
        update(gradient)
    with pytest.raises(TrainingError, match=r"the last of 20 in a row.*loud\.wav"):
        update(math.inf)


def test_collapse_is_said_in_words(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastssl.train.monitors._COLLAPSED_UPDATES", 3)
    healthy = {
        "masked_frames": 100.0,
        "accuracy": 0.5,
        "chance": 0.01,
        "code_perplexity_0": 1.0,
        "code_perplexity_1": 40.0,
    }
    collapsed = healthy | {"accuracy": 0.01, "code_perplexity_1": 1.1}
    monitor = Monitor(Path("nowhere"), Account(1, 0.05, []), score_names=(), log_every=1, resume_at=None)

    class _FirstProcess:
        is_global_zero = True

    for update in (collapsed, collapsed, healthy, collapsed, collapsed):
        monitor._watch_for_collapse(_FirstProcess(), update)  # type: ignore[arg-type]
    assert not caplog.records
    restored = Monitor(Path("nowhere"), Account(1, 0.05, []), score_names=(), log_every=1, resume_at=None)
    restored.load_state_dict(monitor.state_dict())
    restored._watch_for_collapse(_FirstProcess(), collapsed)  # type: ignore[arg-type]
    restored._watch_for_collapse(_FirstProcess(), collapsed)  # type: ignore[arg-type]
    assert len(caplog.records) == 1
    assert "the codes have collapsed" in caplog.text
