"""Test what each command says when a file cannot be written, and when its folder is in use."""

import dataclasses
import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastssl import cli, files
from fastssl.eval.quality.measure import _FrameFile
from fastssl.folder_lock import folder_lock
from fastssl.models.encoder import Encoder, EncoderConfig
from tests.tiny import TINY_MODEL, write_recording
from tests.train.conftest import model_of


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a model and a few recordings, which all tests read."""
    folder = tmp_path_factory.mktemp("place")
    values = {field.name: getattr(TINY_MODEL, field.name) for field in dataclasses.fields(EncoderConfig)}
    Encoder(EncoderConfig(**values)).save_pretrained(folder / "model")
    lines = ["path\tspeaker\n"]
    for number in range(6):
        write_recording(folder / "audio" / f"{number}.wav", 2.1, seed=number)
        lines.append(f"audio/{number}.wav\ts{number % 2}\n")
    (folder / "table.tsv").write_text("".join(lines))
    return folder


def _settings(place: Path, system: str) -> list[str]:
    """Return the options of a run of one update, for which nothing must be downloaded."""
    model = dataclasses.asdict(model_of(system))
    fields = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim"]
    fields += ["num_conv_pos_embeddings", "num_conv_pos_embedding_groups"]
    options = [f"--model.{name}={list(model[name]) if name == 'conv_dim' else model[name]}" for name in fields]
    options += ["--trainer.max_steps=1", "--trainer.checkpoint_every=1", "--trainer.accelerator=cpu"]
    options += ["--trainer.progress=false", "--data.valid=0", "--data.num_workers=0", "--data.crop_s=1"]
    options += ["--optimizer.warmup_updates=0", "--data.min_duration_s=1"]
    if system == "distillation":
        options += [f"--teacher={place / 'model'}", "--recipe=distil-tiny", "--data.fixed_crops=true"]
        return [*options, "--model.teacher_hidden_size=32", "--model.teacher_layers=[1]"]
    return [*options, "--recipe=wav2vec2-tiny"]


def _command(name: str, place: Path, output: Path) -> list[str]:
    audio, model = str(place / "audio"), str(place / "model")
    return {
        "pretrain": ["pretrain", audio, f"--output={output}", *_settings(place, "wav2vec2")],
        "distill": ["distill", audio, f"--output={output}", *_settings(place, "distillation")],
        "extract": ["extract", model, audio, f"--output={output}", "--device=cpu"],
        "label": ["label", audio, f"--output={output}", "--clusters=3", "--fit_frames=300", "--num_workers=0"],
        "quality": ["quality", model, audio, f"--output={output}.json", "--device=cpu"],
        "prepare": ["prepare", audio, f"--output={output}.jsonl.gz"],
    }[name]


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the disk full for the files whose names are in the list that this returns."""
    names: list[str] = []
    replacing = files._commit

    def commit(partial: Path, path: Path) -> None:
        if path.name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replacing(partial, path)

    monkeypatch.setattr(files, "_commit", commit)
    return names


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("pretrain", "metrics.csv"),
        ("pretrain", "last.ckpt"),
        ("pretrain", "encoder"),
        ("distill", "config.yaml"),
        ("extract", "features-00000.safetensors"),
        ("label", "kmeans.safetensors"),
        ("quality", "out.json"),
        ("prepare", "out.jsonl.gz"),
    ],
)
def test_a_full_disk_is_one_line(
    place: Path, tmp_path: Path, full: list[str], capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    arguments = _command(command, place, tmp_path / "out")
    full.append(name)
    assert cli.main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(
        rf"fastssl {command}: --output: (\S+) cannot be written: No space left on device; make room there; then run "
        r"the command again(, with --resume if the run had begun)?",
        line,
    )
    assert found is not None, line
    assert Path(found[1]).name == name
    full.clear()
    begun = command in ("pretrain", "distill") and (tmp_path / "out" / "config.yaml").exists()
    assert cli.main([*arguments, *(["--resume"] if begun else [])]) == 0


def test_a_full_disk_of_the_teachers_frames_names_their_option(
    place: Path, tmp_path: Path, full: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    full.append("teacher-00000.safetensors")
    options = f"--data.teacher_cache={tmp_path / 'cache'}"
    assert cli.main([*_command("distill", place, tmp_path / "out"), options]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"fastssl distill: data.teacher_cache: {tmp_path / 'cache'}/teacher-00000.safetensors cannot be" in line


@pytest.mark.parametrize("command", ["pretrain", "distill", "extract", "label"])
def test_a_folder_in_use_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with folder_lock(tmp_path / "out", option="--output"):
        assert cli.main(_command(command, place, tmp_path / "out")) == 1
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"fastssl {command}: --output: {tmp_path / 'out'} is in use by process {os.getpid()} on host " in line


def test_temporary_files_name_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(files.WriteError, match="frames cannot be written: No space left") as caught:
        _FrameFile(tmp_path / "frames", 2, 5).write(torch.ones(3, 2), np.arange(3), np.arange(3))
    assert caught.value.option == "TMPDIR"
