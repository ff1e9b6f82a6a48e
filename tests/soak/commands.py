"""Run commands that write a folder as child processes, kill them or limit their files, and compare their results."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.train.config import PretrainConfig, write_config
from fastssl.train.metrics_file import read_metrics
from fastssl.train.systems import SYSTEMS
from tests.train.conftest import model_of

_PRETRAINED = ("wav2vec2", "hubert", "best-rq", "distillation")
NAMES = (*_PRETRAINED, "extract", "label")


class Command(NamedTuple):
    """A command that writes a folder.

    Args:
        arguments: Its arguments, without the folder.
        resumes: Whether a second start needs `--resume` once the folder has a config.yaml.
    """

    arguments: tuple[str, ...]
    resumes: bool


class Ended(NamedTuple):
    """How a process ended: its status (negative if a signal ended it), what it wrote to stderr, and its time in s."""

    status: int
    stderr: str
    seconds: float


def make(name: str, config: PretrainConfig, place: Path, encoder: SpeechEncoder) -> Command:
    """Return the command of this name.

    Args:
        name: One of `NAMES`.
        config: A short run of wav2vec 2.0.
        place: Existing folder for the settings, the encoder and a teacher cache.
        encoder: Encoder to extract with, and teacher to distil.
    """
    model = place / "model"
    if not model.exists():
        encoder.save_pretrained(model)
    if name == "extract":
        return Command(("extract", str(model), config.audio, "--shard_mb", "0.02"), resumes=False)
    if name == "label":
        return Command(("label", config.audio, "--clusters", "5"), resumes=False)
    config = dataclasses.replace(config, system=name, model=model_of(name))
    if name == "distillation":
        data = dataclasses.replace(config.data, fixed_crops=True, teacher_cache=str(place / "cache"))
        config = dataclasses.replace(config, teacher=str(model), data=data)
    settings = place / f"{name}.yaml"
    write_config(config, settings)
    teacher = ("--teacher", str(model)) if name == "distillation" else ()
    return Command((SYSTEMS[name].command, "--config", str(settings), *teacher), resumes=True)


def start(command: Command, output: Path, *, kill_after_s: float | None = None, file_bytes: int | None = None) -> Ended:
    """Run a command as a user would after an interruption: again, with `--resume` if there is something to resume.

    Args:
        command: The command.
        output: Folder that it writes.
        kill_after_s: Time after which to kill the process and its children; None lets it end.
        file_bytes: Size above which writing to any file fails, as on a full disk; None for no limit.
    """
    resume = ["--resume"] if command.resumes and (output / "config.yaml").exists() else []

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastssl", *command.arguments, "--output", str(output), *resume],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
        start_new_session=True,
    )
    try:
        _, stderr = process.communicate(timeout=300 if kill_after_s is None else kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate()
    return Ended(process.returncode, stderr, time.monotonic() - began)


def result(output: Path) -> dict[str, Any]:
    """Return what a finished command left, without what depends on the clock: tensors as lists of bits."""
    found: dict[str, Any] = {}
    if (output / "metrics.csv").exists():
        rows = read_metrics(output / "metrics.csv")
        found["metrics"] = [{name: value for name, value in row.items() if name != "audio_s_per_s"} for row in rows]
    checkpoint = output / "checkpoints" / "last.ckpt"
    tensors: dict[str, torch.Tensor] = {}
    if checkpoint.exists():
        tensors |= torch.load(checkpoint, weights_only=True)["state_dict"]
    for path in sorted(output.rglob("*.safetensors")):
        # The keys of features are unique, but which shard they are in depends on where a command was interrupted.
        tensors |= load_file(path)
    if (output / "index.jsonl").exists():
        lines = [json.loads(line) for line in (output / "index.jsonl").read_text().splitlines()]
        found["index"] = sorted(json.dumps({**line, "shard": None}, sort_keys=True) for line in lines)
    found["tensors"] = {name: tensor.view(torch.uint8).tolist() for name, tensor in tensors.items() if tensor.ndim}
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of results that differ."""
    names = [name for name in expected if name != "tensors" and found.get(name) != expected[name]]
    one, other = found["tensors"], expected["tensors"]
    return names + [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def last_lines(text: str, number: int = 6) -> str:
    """Return the end of what a process wrote."""
    return "\n".join(text.strip().splitlines()[-number:])


def check_again(command: Command, output: Path, expected: dict[str, Any], story: Sequence[str]) -> None:
    """Run a command to its end in a folder where it was interrupted, and compare the result with an unbroken one's."""
    ended = start(command, output)
    assert ended.status == 0, "\n".join([*story, last_lines(ended.stderr)])
    assert not differences(result(output), expected), story
