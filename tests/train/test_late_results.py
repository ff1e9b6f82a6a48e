"""Test results that the host reads one update later, as on a GPU; here the CPU pretends."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import PretrainModule, TrainingError
from fastssl.train.pretrain import pretrain
from fastssl.train.results import Unread
from tests.train.conftest import MakeConfig

SELDOM = {f"trainer.{name}": 4 for name in ("log_every", "checkpoint_every", "val_check_interval")}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretrainModule, "_reads_late", lambda module: True)


@pytest.fixture
def read_after(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect the number of each update that is read, and the number of those that were finished by then."""
    seen: list[tuple[int, int]] = []
    read = PretrainModule._read

    def note(module: PretrainModule, results: Unread) -> None:
        seen.append((results.update, module.global_step))
        read(module, results)

    monkeypatch.setattr(PretrainModule, "_read", note)
    return seen


def metrics(output: str) -> list[dict[str, float]]:
    rows = read_metrics(Path(output) / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "audio_s_per_s"} for row in rows]


@pytest.mark.usefixtures("late")
def test_a_run_reports_the_same_as_if_every_update_was_read_at_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, read_after: list[tuple[int, int]]
) -> None:
    config = make_config("late", **SELDOM)
    pretrain(config)
    # Updates 4 and 8 are read before they are applied, because a row, a checkpoint and a validation follow.
    assert read_after == [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (6, 6), (7, 7), (8, 7)]
    read_after.clear()
    monkeypatch.setattr("fastssl.train.pretrain._read_every", lambda config: [1])
    pretrain(replace(config, output=config.output + "-at-once"))
    assert read_after == [(update, update - 1) for update in range(1, 9)]
    assert metrics(config.output) == metrics(config.output + "-at-once")


@pytest.mark.usefixtures("late")
def test_an_update_that_is_not_finite_is_skipped_before_the_host_knows(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, read_after: list[tuple[int, int]]
) -> None:
    weights: dict[int, dict[str, Tensor]] = {}
    step = Wav2Vec2ForPreTraining.step

    def bad_third(model: Wav2Vec2ForPreTraining, batch: Any, context: Any) -> Any:
        weights[context.update] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        output = step(model, batch, context)
        return replace(output, loss=output.loss * math.nan) if context.update == 2 else output

    monkeypatch.setattr(Wav2Vec2ForPreTraining, "step", bad_third)
    with pytest.raises(TrainingError, match=r"the loss is nan in update 3\. The update was not applied"):
        pretrain(make_config(**SELDOM | {"trainer.max_steps": 12}))
    assert read_after == [(1, 1), (2, 2), (3, 3)]
    assert any(not torch.equal(weights[2][name], tensor) for name, tensor in weights[1].items())
    assert all(torch.equal(weights[3][name], tensor) for name, tensor in weights[2].items())


@pytest.mark.usefixtures("late")
def test_a_request_is_met_after_the_update_that_follows(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, read_after: list[tuple[int, int]]
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        "lightning.pytorch.Trainer.save_checkpoint", lambda trainer, *_, **__: saved.append(trainer.global_step)
    )
    # A checkpoint is due all the time, by the clock.
    pretrain(
        make_config(
            **{f"trainer.{name}": 50 for name in ("log_every", "checkpoint_every", "val_check_interval")},
            **{"trainer.max_steps": 6, "trainer.checkpoint_minutes": 1e-9},
        )
    )
    assert saved[0] == 2
    assert (2, 1) in read_after
    assert saved[-1] == 6


@pytest.mark.parametrize("begins_on_gpu", [True, False])
def test_a_run_continues_on_another_kind_of_device(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, begins_on_gpu: bool
) -> None:
    """A GPU has another kernel for the optimiser; checkpoints from before it have none."""
    config = make_config(**{"trainer.max_steps": 4})
    for on_gpu, updates in ((begins_on_gpu, 4), (not begins_on_gpu, 6)):
        monkeypatch.setattr(PretrainModule, "_reads_late", lambda module, on_gpu=on_gpu: on_gpu)
        pretrain(replace(config, trainer=replace(config.trainer, max_steps=updates)), resume=updates == 6)
        checkpoint = torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == updates
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["fused"] == (True if on_gpu else None)
        assert max(state["step"].item() for state in checkpoint["optimizer_states"][0]["state"].values()) == updates
