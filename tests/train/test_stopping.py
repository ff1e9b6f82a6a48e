"""Test stopping: after a signal or some minutes, a run saves a checkpoint, and resumed it ends as if unbroken."""

import logging
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastssl.data.batches import AudioBatch
from fastssl.models.model_card import ModelCard
from fastssl.train.checkpoint_callback import PeriodicCheckpoint
from fastssl.train.checkpoints import saved_update
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import PretrainModule, TrainingError
from fastssl.train.pretrain import pretrain
from fastssl.train.stopping import Requests, Stopped, agreed_signal
from fastssl.train.systems import build_model
from tests.train.conftest import WORKER, MakeConfig, model_of


def _at_batch(number: int, action: Callable[[PretrainModule], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the training step of the run's nth batch, counted from 1."""
    step, batches = PretrainModule.training_step, 0

    def training_step(self: PretrainModule, batch: AudioBatch, batch_idx: int) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == number:
            action(self)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", training_step)


def _send(signum: int) -> Callable[[PretrainModule], object]:
    return lambda _: os.kill(os.getpid(), signum)


def _checkpoint(config: PretrainConfig) -> dict[str, Any]:
    path = Path(config.output) / "checkpoints" / "last.ckpt"
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def _assert_same_end(found: PretrainConfig, expected: PretrainConfig) -> None:
    """Assert that two runs have the same weights and rows, but for the column that depends on the clock."""
    weights = _checkpoint(expected)["state_dict"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in _checkpoint(found)["state_dict"].items())
    rows = [
        [row | {"audio_s_per_s": 0.0} for row in read_metrics(Path(config.output) / "metrics.csv")]
        for config in (found, expected)
    ]
    assert rows[0] == rows[1]


def _callback(
    run: Path, *, draw: Callable[[], None] = lambda: None, resume_at: int | None = None
) -> PeriodicCheckpoint:
    return PeriodicCheckpoint(
        run,
        build_model(model_of("wav2vec2")).speech_encoder,
        card=lambda updates: ModelCard(),
        draw=draw,
        every=1,
        minutes=None,
        keep_every=None,
        scores_every=None,
        resume_at=resume_at,
    )


_RUN = {"trainer.log_every": 2, "trainer.checkpoint_every": 100, "trainer.accumulation": 2}


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_after_the_update_and_resuming_loses_nothing(
    name: str, status: int, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    unbroken = make_config("unbroken", **_RUN)
    pretrain(unbroken)
    stopped = make_config("stopped", **_RUN)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    # The first batch of the third update; the scores are due after the fourth.
    with pytest.MonkeyPatch.context() as patched, caplog.at_level(logging.INFO, logger="fastssl"):
        _at_batch(5, _send(signal.Signals[name]), patched)
        with pytest.raises(Stopped) as outcome:
            pretrain(stopped)
    assert outcome.value.code == status
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert caplog.messages[-1] == "stopped after update 3; checkpoint saved: continue with --resume"
    assert f"fastssl: {name}: saving a checkpoint after this update" in capfd.readouterr().err
    assert saved_update(Path(stopped.output) / "checkpoints" / "last.ckpt") == 3
    assert [row["update"] for row in read_metrics(Path(stopped.output) / "metrics.csv")] == [2]
    assert (Path(stopped.output) / "report.png").exists()
    pretrain(stopped, resume=True)
    _assert_same_end(stopped, unbroken)


def test_a_signal_when_scores_are_due_waits_for_them(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken, stopped = make_config("unbroken", **_RUN), make_config("stopped", **_RUN)
    pretrain(unbroken)
    with monkeypatch.context() as patched:
        _at_batch(8, _send(signal.SIGTERM), patched)
        with pytest.raises(Stopped):
            pretrain(stopped)
    assert "valid_loss" in read_metrics(Path(stopped.output) / "metrics.csv")[-1]
    # As after a kill between the scores and the second checkpoint, or when that is damaged: the scores' row is there.
    last = Path(stopped.output) / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    pretrain(stopped, resume=True)
    _assert_same_end(stopped, unbroken)

    def die(self: PretrainModule, batch: AudioBatch, batch_idx: int) -> None:
        raise KeyError("killed before the scores")

    killed = make_config("killed", **_RUN)
    with monkeypatch.context() as patched:
        _at_batch(8, _send(signal.SIGTERM), patched)
        patched.setattr(PretrainModule, "validation_step", die)
        with pytest.raises(KeyError):
            pretrain(killed)
    assert saved_update(Path(killed.output) / "checkpoints" / "last.ckpt") == 4
    pretrain(killed, resume=True)
    _assert_same_end(killed, unbroken)


def test_a_signal_during_scoring_stops_after_it(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = make_config(**_RUN)
    score = PretrainModule.validation_step

    def validation_step(self: PretrainModule, batch: AudioBatch, batch_idx: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        score(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(PretrainModule, "validation_step", validation_step)
        with pytest.raises(Stopped):
            pretrain(stopped)
    assert saved_update(Path(stopped.output) / "checkpoints" / "last.ckpt") == 4


def test_sigterm_before_the_first_update_does_not_look_like_success(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would train one batch and end with status 0."""
    config, load = make_config(**_RUN), PretrainDataModule.train_dataloader

    def train_dataloader(self: PretrainDataModule) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(self)

    with monkeypatch.context() as patched:
        patched.setattr(PretrainDataModule, "train_dataloader", train_dataloader)
        with pytest.raises(SystemExit) as outcome:
            pretrain(config)
    assert outcome.value.code == 143
    pretrain(config, resume=True)


def test_a_signal_in_the_last_update_changes_nothing(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(**{"trainer.max_steps": 2})
    _at_batch(2, _send(signal.SIGTERM), monkeypatch)
    pretrain(config)
    assert saved_update(Path(config.output) / "checkpoints" / "last.ckpt") == 2


def test_a_second_ctrl_c_stops_at_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastssl.train.stopping._SAME_CTRL_C_S", -1.0)

    def twice(module: PretrainModule) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    config = make_config(**{"trainer.checkpoint_every": 2, "trainer.accumulation": 1})
    _at_batch(4, twice, monkeypatch)
    with caplog.at_level(logging.INFO, logger="fastssl"), pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert caplog.messages[-1] == "stopped at once; --resume continues after update 2"


def test_a_failure_says_where_resume_continues(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: PretrainModule) -> None:
        raise TrainingError("the loss is nan")

    for batch, expected in (
        (2, "no checkpoint has been saved yet, so --resume begins again"),
        (4, "--resume continues after update 2"),
    ):
        with monkeypatch.context() as patched, caplog.at_level(logging.INFO, logger="fastssl"):
            _at_batch(batch, fail, patched)
            patched.setattr("fastssl.train.checkpoint_callback._FIRST_DRAWING_S", 0.0)
            with pytest.raises(TrainingError):
                pretrain(make_config(f"run{batch}"))
        # The report is drawn at checkpoints.
        assert (Path(make_config(f"run{batch}").output) / "report.png").exists() == (batch == 4)
        assert caplog.messages[-1] == f"stopped; {expected}"


@pytest.mark.parametrize("kind", ["compressor", "gumbel"])
def test_a_checkpoint_after_some_minutes_resumes_to_the_bit(
    kind: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {**_RUN, "trainer.checkpoint_minutes": 5.0, "trainer.max_steps": 6}
    if kind == "compressor":
        changes["model.compressor"] = "integrate-and-fire"
    unbroken, killed = make_config("unbroken", **changes), make_config("killed", **changes)
    pretrain(unbroken)

    def due(module: PretrainModule) -> None:
        assert module.requests.save_at is not None
        module.requests.save_at -= 300

    def die(self: PretrainModule, optimizer: object) -> None:
        if self.global_step == 4:
            raise KeyError("killed in the fifth update")
        step(self, optimizer)  # type: ignore[arg-type]

    step = PretrainModule.on_before_optimizer_step
    with monkeypatch.context() as patched:
        _at_batch(6, due, patched)
        patched.setattr(PretrainModule, "on_before_optimizer_step", die)
        with pytest.raises(KeyError):
            pretrain(killed)
    assert saved_update(Path(killed.output) / "checkpoints" / "last.ckpt") == 3
    pretrain(killed, resume=True)
    _assert_same_end(killed, unbroken)


def test_a_signal_does_not_end_the_workers(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and `scancel` reach the data loader's workers too, and the update needs more batches than are waiting."""

    def everywhere(_: PretrainModule) -> None:
        processes = [str(one.pid) for one in multiprocessing.active_children()]
        for name in ("INT", "TERM"):
            subprocess.run(["kill", f"-{name}", *processes, str(os.getpid())], check=True)

    config = make_config(**WORKER, **{"trainer.max_steps": 100, "trainer.accumulation": 8})
    _at_batch(9, everywhere, monkeypatch)
    with pytest.raises(Stopped) as outcome:
        pretrain(config)
    assert outcome.value.code == 143
    assert saved_update(Path(config.output) / "checkpoints" / "last.ckpt") == 2
    assert not multiprocessing.active_children()


def test_a_checkpoint_of_two_processes_continues_in_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two accumulation steps, and from an odd update, where Lightning's count of batches is odd."""
    unbroken, stopped = make_config("unbroken", **_RUN), make_config("stopped", **_RUN)
    pretrain(unbroken)
    with monkeypatch.context() as patched:
        _at_batch(5, _send(signal.SIGTERM), patched)
        with pytest.raises(Stopped):
            pretrain(stopped)
    checkpoint = _checkpoint(stopped)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        assert counts == {"ready": 6, "started": 6, "processed": 6, "completed": 5}
        counts |= {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    torch.save(checkpoint, Path(stopped.output) / "checkpoints" / "last.ckpt")
    pretrain(stopped, resume=True)
    _assert_same_end(stopped, unbroken)


def test_processes_that_found_different_checkpoints_do_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several machines without a common folder, only the first would continue."""
    callback = _callback(tmp_path, resume_at=6)
    trainer: Any = SimpleNamespace(world_size=2, _signal_connector=SimpleNamespace())
    for other in (6, 0):
        monkeypatch.setattr(
            torch.distributed,
            "all_gather_object",
            lambda found, own, other=other: found.__setitem__(slice(2), [own, other]),
        )
        if other == 6:
            callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
        else:
            with pytest.raises(
                ValueError, match=r"different updates \(6, 0\); choose a folder that all machines share"
            ):
                callback.setup(trainer, None, "fit")  # type: ignore[arg-type]


def test_requests_are_counted_and_agreed_on() -> None:
    requests = Requests()
    assert requests.counts() == (0, 0, 0)
    requests.save_at = 0.0
    requests._receive(signal.SIGTERM, None)
    assert requests.counts() == (1, 0, 1)
    assert agreed_signal({"save": 3.0}) is None
    assert agreed_signal({"SIGINT": 2.0, "SIGTERM": 0.0}) == signal.SIGINT
    assert agreed_signal({"SIGINT": 2.0, "SIGTERM": 1.0}) == signal.SIGTERM


def test_the_report_is_drawn_at_most_so_often_that_it_is_cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, drawn = [0.0], []

    def draw() -> None:
        drawn.append(clock[0])
        clock[0] += 3.0
        raise OSError("the disk is full")

    monkeypatch.setattr("fastssl.train.checkpoint_callback.time", SimpleNamespace(monotonic=lambda: clock[0]))
    callback = _callback(tmp_path, draw=draw)
    for _ in range(10):
        clock[0] += 100.0
        callback._draw_where_cheap()
    assert drawn == [200.0, 503.0, 806.0]
