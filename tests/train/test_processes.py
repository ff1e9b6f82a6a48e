"""Test training in several processes: started by torchrun or Lightning, stopped together, resumed. Takes minutes."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.hubert import HubertConfig
from fastssl.models.wav2vec2 import Wav2Vec2Config
from fastssl.train.config import PretrainConfig
from fastssl.train.metrics_file import read_metrics
from fastssl.train.systems import SYSTEMS
from tests.train.conftest import WORKER, MakeConfig, MakeSystem, as_yaml_file

pytestmark = pytest.mark.slow


@pytest.fixture
def make_config(make_config: MakeConfig) -> MakeConfig:
    """Make settings that let every process start a worker of its own."""
    return partial(make_config, **WORKER)


def _run(
    config: PretrainConfig,
    folder: Path,
    *options: str,
    launcher: tuple[str, ...] = (),
    program: tuple[str, ...] = ("-m", "fastssl"),
) -> Any:
    command = [sys.executable, *launcher, *program, SYSTEMS[config.system].command]
    return subprocess.run(
        [*command, "--config", str(as_yaml_file(config, folder)), "--output", config.output, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _losses(config: PretrainConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(config.output) / "metrics.csv") if "loss" in row]


def _weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return weights


def test_torchrun_and_resume_equal_lightnings_own_launch(make_config: MakeConfig, tmp_path: Path) -> None:
    # Layer drop leaves some parameters without a gradient, the same ones in all processes.
    own = make_config("own", **{"trainer.devices": 2})
    assert _run(own, tmp_path).returncode == 0
    assert len(_losses(own)) == 8

    torchrun = make_config("torchrun")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    outcome = _run(torchrun, tmp_path, launcher=launcher)
    assert outcome.returncode == 0, outcome.stderr
    assert _losses(torchrun) == _losses(own)

    # Go back to the middle of a whole run, with its learning rate schedule, and repeat the second half.
    half = make_config("half", **{"trainer.devices": 2, "trainer.max_steps": 8, "trainer.keep_every": 4})
    assert _run(half, tmp_path).returncode == 0
    checkpoints = Path(half.output) / "checkpoints"
    (checkpoints / "0000004.ckpt").replace(checkpoints / "last.ckpt")
    outcome = _run(half, tmp_path, "--resume")
    assert outcome.returncode == 0, outcome.stderr
    assert _losses(half) == _losses(own)
    expected = _weights(own)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(half).items())


@pytest.mark.parametrize("system", ["hubert", "wavlm", "best-rq"])
def test_processes_share_out_the_updates_of_every_system(
    system: str, make_config: MakeConfig, make_system: MakeSystem, tmp_path: Path
) -> None:
    one = make_system(make_config(), system)
    found, expected = _losses_of_two_processes_and_two_steps(one, tmp_path)
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)


def _losses_of_two_processes_and_two_steps(one: PretrainConfig, folder: Path) -> tuple[list[float], list[float]]:
    # Under torchrun, the second process is already running while the first makes labels or the teacher's frames.
    two = dataclasses.replace(one, output=str(folder / "two"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    outcome = _run(two, folder, launcher=launcher)
    assert outcome.returncode == 0, outcome.stderr
    accumulating = dataclasses.replace(one, trainer=dataclasses.replace(one.trainer, accumulation=2))
    outcome = _run(accumulating, folder)
    assert outcome.returncode == 0, outcome.stderr
    return _losses(two), _losses(accumulating)


@pytest.mark.parametrize("system", ["wav2vec2", "distillation"])
def test_processes_share_out_a_compressors_updates(
    system: str, make_config: MakeConfig, make_system: MakeSystem, recordings: Path, tmp_path: Path
) -> None:
    label(recordings, tmp_path / "segments", LabelSettings(clusters=7, segment_ms=120.0), num_workers=0)
    one = make_system(make_config(), system)
    model = dataclasses.replace(one.model, compressor="integrate-and-fire")
    data = dataclasses.replace(one.data, segments=str(tmp_path / "segments"))
    if isinstance(model, Wav2Vec2Config):
        # The diversity loss is computed per batch, so it depends on how an update is divided.
        model = dataclasses.replace(model, diversity_loss_weight=0.0)
    if isinstance(model, DistillationConfig):
        shape = {field.name: getattr(model, field.name) for field in dataclasses.fields(EncoderConfig)}
        Encoder(EncoderConfig(**shape | {"num_hidden_layers": 3, "compressor": "none"})).save_pretrained(
            tmp_path / "teacher"
        )
        model = dataclasses.replace(model, feature_grad_mult=0.0)
        data = dataclasses.replace(data, fixed_crops=True, teacher_cache=str(tmp_path / "frames"))
        one = dataclasses.replace(one, teacher=str(tmp_path / "teacher"))
    one = dataclasses.replace(one, model=model, data=data)
    found, expected = _losses_of_two_processes_and_two_steps(one, tmp_path)
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)


def test_front_end_without_gradient_does_not_stop_the_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"trainer.devices": 2, "trainer.max_steps": 3, "model.layerdrop": 0.0, "model.feature_grad_mult": 0.0}
    config = make_config(**changes)
    outcome = _run(config, tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert len(_losses(config)) == 3


def test_processes_stop_together_and_name_the_file_of_any(
    make_config: MakeConfig, recordings: Path, tmp_path: Path
) -> None:
    shutil.copytree(recordings, tmp_path / "audio")
    soundfile.write(tmp_path / "audio" / "loud.wav", np.full(32000, 3e38, dtype=np.float32), 16000, subtype="FLOAT")
    for path in (tmp_path / "audio" / "speaker1").iterdir():
        samples, rate = soundfile.read(path)
        soundfile.write(path.with_suffix(".flac"), samples, rate)
        path.unlink()
    damaged = tmp_path / "audio" / "speaker1" / "01.flac"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    changes = {"trainer.devices": 2, "model.do_normalize": False, "data.valid": 0.0, "trainer.max_steps": 50}
    # By default, one unusable recording of 15 would stop the run.
    changes["data.max_bad_fraction"] = 0.5
    program = tmp_path / "program.py"
    program.write_text(
        "import math, sys\n"
        "from fastssl import cli\n"
        "from fastssl.data import audio\n"
        "audio._LARGEST_SAMPLE = math.inf  # the reader would refuse loud.wav\n"
        "sys.exit(cli.main())\n"
    )
    outcome = _run(make_config(audio=tmp_path / "audio", **changes), tmp_path, program=(str(program),))
    assert outcome.returncode == 1
    assert "loud.wav" in outcome.stderr
    assert outcome.stderr.count("the loss is nan") == 1
    assert "Traceback" not in outcome.stderr
    log = (tmp_path / "run" / "logs" / "pretrain.log").read_text()
    assert log.count("the loss is nan") == 1
    assert log.count("01.flac does not decode") <= 1


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_failure_of_the_process_that_labels_ends_the_others(
    launcher: str, make_config: MakeConfig, make_system: MakeSystem, tmp_path: Path
) -> None:
    config = make_system(make_config(**{"data.valid": 0.0}), "hubert")
    assert isinstance(config.model, HubertConfig)
    model = dataclasses.replace(config.model, num_clusters=100_000)  # more clusters than frames
    config = dataclasses.replace(config, model=model)
    if launcher == "torchrun":
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        outcome = _run(config, tmp_path, launcher=torchrun)
        assert outcome.returncode != 0
        assert "--clusters: must be at most the number of frames" in outcome.stderr
        return
    # srun starts every process, and does not stop the others when one fails.
    command = [sys.executable, "-m", "fastssl", "pretrain", "--config", str(as_yaml_file(config, tmp_path))]
    command += ["--output", config.output, "--trainer.devices", "2"]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "run", "SLURM_JOB_ID": "4711"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    reason = r"--clusters: must be at most the number of frames \(\d+\), got 100000"
    assert re.search(f"fastssl pretrain: {reason}", errors[0])
    assert re.search(f"fastssl pretrain: the first process failed: {reason}", errors[1])
    assert "Traceback" not in errors[0] + errors[1]
