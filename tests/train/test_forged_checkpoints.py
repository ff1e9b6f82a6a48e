"""Test that a checkpoint whose content was changed, under a right checksum, is refused by name or changes nothing."""

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.train.checkpoint_file import write_checkpoint
from fastssl.train.config import PretrainConfig
from fastssl.train.pretrain import pretrain
from tests.train.conftest import MakeConfig

Content = dict[str, Any]
Change = Callable[[Content], object]


@pytest.fixture
def forge(make_config: MakeConfig, tmp_path: Path) -> Callable[[Change, str], PretrainConfig]:
    """Let `forge(change, "name")` copy a run of two updates, change its checkpoint, and return its settings."""
    config = make_config("honest", **{"trainer.max_steps": 2, "trainer.val_check_interval": 8})
    pretrain(config)
    content = torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)

    def forged(change: Change, name: str) -> PretrainConfig:
        changed, run = copy.deepcopy(content), tmp_path / name
        shutil.copytree(config.output, run)
        change(changed)
        for path in (run / "checkpoints").iterdir():
            path.unlink()
        write_checkpoint(changed, run / "checkpoints" / "last.ckpt")
        longer = dataclasses.replace(config.trainer, max_steps=3)
        return dataclasses.replace(config, output=str(run), trainer=longer)

    return forged


def _epoch(content: Content, entry: str) -> Any:
    return content["loops"]["fit_loop"][f"epoch_loop.{entry}"]


def _group(content: Content) -> Any:
    return content["optimizer_states"][0]["param_groups"][0]


def _first(content: Content) -> Any:
    return content["optimizer_states"][0]["state"][0]


CHANGES: dict[str, tuple[Change, str]] = {
    "shape": (
        lambda c: _first(c).update(exp_avg=torch.zeros(3)),
        r"parameter 0\.exp_avg is .*, expected floating-point",
    ),
    "whole": (
        lambda c: _first(c).update(exp_avg=torch.zeros(32, dtype=torch.int64)),
        "expected floating-point numbers of",
    ),
    "shared": (lambda c: _first(c).update(exp_avg=torch.zeros(1).expand(32)), "expected floating-point numbers of"),
    "step": (lambda c: _first(c).update(step=torch.tensor(-1.0)), "parameter 0, step is -1.0, expected 1 to 2"),
    "nan": (lambda c: _first(c).update(step=torch.tensor(float("nan"))), "step is nan"),
    "moment": (lambda c: _first(c).pop("exp_avg_sq"), "parameter 0: 'exp_avg_sq' is missing"),
    "none": (lambda c: c.update(optimizer_states=[]), "the number of optimizer_states is 0, expected one"),
    "twice": (lambda c: c.update(optimizer_states=c["optimizer_states"] * 2), "is 2, expected one"),
    "empty": (lambda c: c["optimizer_states"][0].update(state={}), "optimizer_states, state is empty"),
    "index": (
        lambda c: c["optimizer_states"][0]["state"].update({"\x1b": {}}),
        r"state is '\\x1b', expected parameters",
    ),
    "betas": (lambda c: _group(c).update(betas=(0.5, 0.5)), r"betas is \(0\.5, 0\.5\), expected \(0\.9"),
    "params": (lambda c: _group(c)["params"].pop(), "optimizer_states.param_groups.params is "),
    "unknown": (lambda c: c["lr_schedulers"][0].update(a=1), "lr_schedulers: 'a' is unknown"),
    "schedule": (lambda c: c.update(lr_schedulers=[{"a": 1}]), "lr_schedulers: .* is missing"),
    "method": (lambda c: c["lr_schedulers"][0].update(step=5), "lr_schedulers: 'step' is unknown"),
    "rates": (lambda c: c["lr_schedulers"][0].update(base_lrs=[9.0]), r"base_lrs is \[9\.0\], expected \[0\.002\]"),
    "last": (lambda c: c["lr_schedulers"][0].update(last_epoch=7), "last_epoch is 7, expected 2"),
    "no_loops": (lambda c: c["loops"].clear(), "loops.fit_loop is None, expected named values"),
    "loops": (lambda c: c["loops"]["fit_loop"].clear(), "loops.fit_loop: .* is missing"),
    "update": (lambda c: c.update(global_step=1), "PretrainDataModule.updates is 2, expected 1"),
    "stepped": (
        lambda c: _epoch(c, "automatic_optimization.optim_progress")["optimizer"]["step"]["total"].update(completed=1),
        "the optimizer's steps, is 1, expected 2",
    ),
    "scheduled": (lambda c: _epoch(c, "scheduler_progress")["total"].update(completed=9), "the schedule's steps, is 9"),
    "batches": (lambda c: _epoch(c, "batch_progress")["current"].update(ready=9), "current batches, is .* one count"),
    "negative": (lambda c: _epoch(c, "batch_progress")["total"].update(ready=-1), "ready is -1, expected a count"),
    "ended": (lambda c: _epoch(c, "batch_progress").update(is_last_batch=True), "is_last_batch is True"),
    "reset": (lambda c: _epoch(c, "batch_progress")["current"].update(reset=5), "current: 'reset' is unknown"),
    "callbacks": (lambda c: c["callbacks"].update(dict.fromkeys(c["callbacks"], 5)), r"callbacks\.\w+ is 5, expected"),
    "callback": (lambda c: c["callbacks"].update({"\x1b[31m": {}}), r"callbacks: '\\x1b\[31m' is unknown"),
    "monitor": (lambda c: c["callbacks"]["Monitor"].pop("window"), "Monitor: 'window' is missing"),
    "window": (lambda c: c["callbacks"]["Monitor"].update(window={"\x1b": "x"}), r"window\.\\x1b is 'x'"),
    "codes": (
        lambda c: c["callbacks"]["Monitor"].update(code_counts=torch.zeros(2, 2)),
        "code_counts is .*floating-point numbers",
    ),
    "unscored": (lambda c: c["callbacks"]["PeriodicCheckpoint"].update(unscored="x"), "unscored is 'x'"),
    "draws": (lambda c: c["PretrainDataModule"].update(draws="x"), "draws is 'x', expected a count"),
    "unusable": (lambda c: c["PretrainDataModule"].update(unusable=[1]), r"unusable is \[1\], expected named"),
    "data": (lambda c: c["PretrainDataModule"].pop("corpus"), "'corpus' is missing"),
    "old": (lambda c: c.update({"pytorch-lightning_version": "0.0.1"}), "is of Lightning '0.0.1', expected 2.0 or"),
    "version": (lambda c: c.update({"pytorch-lightning_version": "\x1b"}), r"is of Lightning '\\x1b'"),
    "before": (lambda c: c.update(global_step=-5), "does not say how many updates it has"),
    "beyond": (lambda c: c.update(global_step=10**30), "does not say how many updates it has"),
    "true": (lambda c: c.update(global_step=True), "does not say how many updates it has"),
}


def test_forged_content_is_named(forge: Callable[[Change, str], PretrainConfig]) -> None:
    wrong = {}
    for name, (change, message) in CHANGES.items():
        config = forge(change, name)
        with pytest.raises(ValueError, match=rf"--resume: .*{name}/checkpoints/last\.ckpt.*{message}") as error:
            pretrain(config, resume=True)
        if not str(error.value).isprintable():
            wrong[name] = str(error.value)
    assert wrong == {}


def test_what_is_not_part_of_a_checkpoint_changes_nothing(forge: Callable[[Change, str], PretrainConfig]) -> None:
    def weights_of(change: Change, name: str) -> Content:
        config = forge(change, name)
        pretrain(config, resume=True)
        found: Content = torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)
        assert found["global_step"] == 3
        return found["state_dict"]  # type: ignore[no-any-return]

    expected = weights_of(lambda content: None, "plain")
    more = {"hyper_parameters": {"_class_path": "os.system"}, "native_amp_scaling_state": {"scale": "x"}}
    found = weights_of(lambda content: content.update(more), "more")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
