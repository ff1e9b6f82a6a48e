"""Test resuming: a killed run ends with the same results as an unbroken one."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastssl import cli
from fastssl.data.batches import AudioBatch
from fastssl.interop import load_encoder
from fastssl.kernels.randomness import RANDOMNESS, resolve_randomness
from fastssl.models.pretraining import StepOutput
from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.train.checkpoints import saved_update
from fastssl.train.config import PretrainConfig, write_config
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import PretrainModule
from fastssl.train.pretrain import pretrain
from tests.train.conftest import WORKER, MakeConfig, as_yaml_file, rewound

_LONG = {
    **WORKER,
    "trainer.max_steps": 18,
    "trainer.accumulation": 2,
    "trainer.checkpoint_every": 3,
    "trainer.val_check_interval": 6,
}


def test_killed_run_ends_with_the_weights_of_an_unbroken_run(make_config: MakeConfig, tmp_path: Path) -> None:
    unbroken, killed = make_config("unbroken", **_LONG), make_config("killed", **_LONG)
    pretrain(unbroken)
    _kill_in_the_middle(killed, tmp_path)
    assert 3 <= saved_update(Path(killed.output) / "checkpoints" / "last.ckpt") < 18
    pretrain(killed, resume=True)

    expected, found = _checkpoint(unbroken), _checkpoint(killed)
    assert found["global_step"] == expected["global_step"] == 18
    _assert_same(found["state_dict"], expected["state_dict"])
    _assert_same(found["optimizer_states"], expected["optimizer_states"])
    _assert_same(found["lr_schedulers"], expected["lr_schedulers"])
    for name in ("encoder/model.safetensors", "encoder/config.json", "encoder/README.md"):
        assert (Path(killed.output) / name).read_bytes() == (Path(unbroken.output) / name).read_bytes()
    assert _metrics(killed) == _metrics(unbroken)


def test_scores_that_a_kill_prevented_are_made_up_for(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(**{"trainer.max_steps": 6})

    def die(self: PretrainModule, batch: AudioBatch, batch_idx: int) -> None:
        raise KeyError("the fourth update is the first to be scored")

    with monkeypatch.context() as patched:
        patched.setattr(PretrainModule, "validation_step", die)
        with pytest.raises(KeyError):
            pretrain(config)
    # The unfinished run has exported the encoder of its last checkpoint.
    _assert_encoder_is_that_of_the_checkpoint(config, update=2)
    pretrain(config, resume=True)
    _assert_encoder_is_that_of_the_checkpoint(config, update=6)
    assert not list(Path(config.output).glob(".*"))
    assert [row["update"] for row in _metrics(config)] == [1, 2, 3, 4, 4, 5, 6]
    assert "valid_loss" in _metrics(config)[4]


def test_resume_before_the_first_checkpoint_begins_again(make_config: MakeConfig) -> None:
    config = make_config(**{"trainer.max_steps": 2})
    run = Path(config.output)
    run.mkdir()
    # Another seed is accepted here, because no checkpoint exists yet.
    write_config(dataclasses.replace(config, seed=7), run / "config.yaml")
    pretrain(config, resume=True)
    assert "seed: 3\n" in (run / "config.yaml").read_text()
    assert saved_update(run / "checkpoints" / "last.ckpt") == 2


def test_finished_run_can_be_extended_and_resumed(make_config: MakeConfig) -> None:
    config = make_config(**{"trainer.max_steps": 2, "trainer.keep_every": 2, "optimizer.warmup_updates": 1})
    pretrain(config)
    encoder = (Path(config.output) / "encoder" / "model.safetensors").read_bytes()
    pretrain(config, resume=True)
    assert (Path(config.output) / "encoder" / "model.safetensors").read_bytes() == encoder
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=4))
    pretrain(longer, resume=True)
    rates = {row["update"]: row["learning_rate"] for row in _metrics(longer) if "loss" in row}
    assert rates[3] == pytest.approx(config.optimizer.lr * config.optimizer.lr_factor(2, 4))
    assert rates[3] > 0
    assert saved_update(Path(config.output) / "checkpoints" / "last.ckpt") == 4
    assert sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir()) == [
        "0000002.ckpt",
        "0000004.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]


def test_resume_refuses_another_run(make_config: MakeConfig, recordings: Path) -> None:
    config = make_config(**{"trainer.max_steps": 2})
    with pytest.raises(ValueError, match="contains no run to continue"):
        pretrain(config, resume=True)
    pretrain(config)
    with pytest.raises(ValueError, match=r"seed: 3 in the run, 4 now"):
        pretrain(dataclasses.replace(config, seed=4), resume=True)
    with pytest.raises(ValueError, match=r"data\.crop_s: 2 in the run, 1 now"):
        pretrain(make_config(**{"trainer.max_steps": 2, "data.crop_s": 1}), resume=True)
    with pytest.raises(ValueError, match=r"1 batches in an update .* make 2"):
        pretrain(make_config(**{"trainer.max_steps": 4, "trainer.accumulation": 2}), resume=True)
    with pytest.raises(ValueError, match="no longer has the recordings"):
        pretrain(make_config(audio=recordings / "speaker0", **{"trainer.max_steps": 4}), resume=True)


def test_runs_of_earlier_versions_go_on(make_config: MakeConfig) -> None:
    """The config.yaml of such a run lacks settings that did not exist yet."""
    config = make_config(**{"trainer.max_steps": 2, "trainer.val_check_interval": 2})
    pretrain(config)
    path = Path(config.output) / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["recipe"], values["model"]["model_type"], values["model"]["num_buckets"]
    path.write_text(yaml.safe_dump(values))
    longer = make_config(**{"trainer.max_steps": 4, "trainer.val_check_interval": 2})
    pretrain(longer, resume=True)
    assert saved_update(Path(config.output) / "checkpoints" / "last.ckpt") == 4


def test_runs_from_before_there_were_versions_of_randomness_keep_their_bits(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"trainer.max_steps": 4, "trainer.keep_every": 2}
    old, new = dataclasses.replace(make_config("old", **changes), randomness=1), make_config("new", **changes)
    pretrain(old)
    pretrain(new)
    assert "randomness: 2\n" in (Path(new.output) / "config.yaml").read_text()
    resumed = rewound(old, tmp_path / "resumed", update=2)
    path = Path(resumed.output) / "config.yaml"
    values = yaml.safe_load(path.read_text())
    assert values.pop("randomness") == 1
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["pretrain", "--output", resumed.output, "--resume"]) == 0
    assert "randomness: 1\n" in path.read_text()
    _assert_same(_checkpoint(resumed)["state_dict"], _checkpoint(old)["state_dict"])
    assert _metrics(resumed) == _metrics(old)
    with pytest.raises(AssertionError):
        _assert_same(_checkpoint(new)["state_dict"], _checkpoint(old)["state_dict"])


@pytest.mark.parametrize("randomness", [1, 2])
def test_a_run_keeps_its_version_of_randomness_in_forward_and_backward(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, randomness: int
) -> None:
    seen: list[int] = []
    step = Wav2Vec2ForPreTraining.step

    def watched(self: Wav2Vec2ForPreTraining, *arguments: Any) -> StepOutput:
        output = step(self, *arguments)
        if self.training:
            seen.append(resolve_randomness(None))
            output.loss.register_hook(lambda grad: seen.append(resolve_randomness(None)))
        return output

    monkeypatch.setattr(Wav2Vec2ForPreTraining, "step", watched)
    pretrain(dataclasses.replace(make_config(**{"trainer.max_steps": 2}), randomness=randomness))
    assert seen == [randomness] * 4
    assert resolve_randomness(None) == RANDOMNESS


def test_an_empty_config_is_not_taken_for_default_settings(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    Path(config.output).mkdir()
    (Path(config.output) / "config.yaml").touch()
    assert cli.main(["pretrain", config.audio, "--resume", "--output", config.output]) == 1
    assert "config.yaml does not have the settings of a run; restore it, or start" in capsys.readouterr().err


def test_run_is_never_overwritten(make_config: MakeConfig) -> None:
    config = make_config()
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        pretrain(config)
    assert [path.name for path in Path(config.output).iterdir()] == ["thesis.txt"]


def _kill_in_the_middle(config: PretrainConfig, folder: Path) -> None:
    """Start the run in another process, and kill it once metrics.csv contains the fifth update."""
    command = [sys.executable, "-m", "fastssl", "pretrain", "--config", str(as_yaml_file(config, folder))]
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--output", config.output], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
        metrics = Path(config.output) / "metrics.csv"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 7:
            assert process.poll() is None, (folder / "killed.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()


def _assert_encoder_is_that_of_the_checkpoint(config: PretrainConfig, *, update: int) -> None:
    checkpoint = _checkpoint(config)
    assert checkpoint["global_step"] == update
    for name, tensor in load_encoder(config.output).state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"model.wav2vec2.{name}"]), name


def _checkpoint(config: PretrainConfig) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


def _assert_same(found: Any, expected: Any) -> None:
    """Assert that nested values are equal bit for bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def _metrics(config: PretrainConfig) -> list[dict[str, float]]:
    """Return the rows of metrics.csv without the column that depends on the clock."""
    rows = read_metrics(Path(config.output) / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "audio_s_per_s"} for row in rows]
