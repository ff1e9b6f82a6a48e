"""Test that after a kill at any change of the disk, every command that writes a folder starts or continues."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastssl import files
from fastssl.data.corpus import open_corpus, write_manifest
from fastssl.eval.extract import extract
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.train.checkpoint_file import find_checkpoint
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.pretrain import pretrain
from fastssl.train.teacher import open_teacher
from fastssl.train.teacher_cache import TeacherCache
from tests.tiny import write_recording
from tests.train.conftest import MakeConfig, MakeSystem, model_of

#: Functions of `fastssl.files` that change what a folder contains; appended lines are the most frequent change.
_ALL = ("_commit", "_link", "_make", "_write")
_FILES = ("_commit", "_link", "_make")


def _killed_at_each(changes: Sequence[str], work: Callable[[], Any], *, most: int = 100) -> Iterator[int]:
    """Do the work in processes that die before their first, second, ... change; yield after each death.

    The processes are killed by themselves without unwinding, so nothing is tidied up.
    """
    for number in range(most):
        if not _dies(work, changes, number):
            assert number > 0
            return
        yield number
    raise AssertionError(f"more than {most} changes")


def _dies(work: Callable[[], Any], changes: Sequence[str], number: int) -> bool:
    process = os.fork()
    if process == 0:
        try:
            counter = itertools.count()
            for name in changes:
                setattr(files, name, _deadly(getattr(files, name), counter, number))
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(done[1])
    assert code in (0, 9)
    return code == 9


def _deadly(real: Callable[..., Any], counter: Iterator[int], number: int) -> Callable[..., Any]:
    def replacement(*arguments: Any) -> Any:
        if next(counter) == number:
            os._exit(9)
        return real(*arguments)

    return replacement


def _resumed(config: PretrainConfig) -> None:
    pretrain(config, resume=(Path(config.output) / "config.yaml").exists())


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Make a folder of three recordings."""
    for number in range(3):
        write_recording(tmp_path / "few" / f"{number}.wav", 2.1, seed=number)
    return tmp_path / "few"


@pytest.mark.parametrize(
    ("updates", "changes"), [(1, _FILES), pytest.param(2, _ALL, marks=pytest.mark.slow)], ids=["files", "lines"]
)
def test_a_killed_run_starts_or_continues(
    make_config: MakeConfig, tmp_path: Path, updates: int, changes: Sequence[str]
) -> None:
    settings = {"trainer.max_steps": updates, "trainer.checkpoint_every": 1, "data.valid": 0.0}
    unbroken = make_config("unbroken", **settings)
    pretrain(unbroken)
    expected = (tmp_path / "unbroken" / "encoder" / "model.safetensors").read_bytes()
    config = make_config("run", **settings)
    for number in _killed_at_each(changes, lambda: pretrain(config)):
        _resumed(config)
        found = find_checkpoint(tmp_path / "run", name="")
        assert found is not None
        assert found.update == updates, number
        assert (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes() == expected
        shutil.rmtree(tmp_path / "run")


def test_a_killed_teacher_cache_is_continued(
    make_config: MakeConfig, make_system: MakeSystem, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {field.name: getattr(model_of("wav2vec2"), field.name) for field in dataclasses.fields(EncoderConfig)}
    Encoder(EncoderConfig(**shape)).save_pretrained(tmp_path / "teacher")
    config = make_system(make_config(audio=few, **{"data.crop_s": 1, "data.valid": 0.0}), "distillation")
    data = dataclasses.replace(config.data, fixed_crops=True, teacher_cache=str(tmp_path / "cache"))
    config = dataclasses.replace(config, data=data, teacher=str(tmp_path / "teacher"))
    config, teacher = open_teacher(config)
    monkeypatch.setattr("fastssl.train.teacher_cache._SHARD_BYTES", 20_000)

    def make() -> None:
        module = PretrainDataModule(config.audio, config.data, normalize=True, seed=0, accumulation=1, noise_share=0.0)
        cache = TeacherCache(config, module, teacher)
        cache.open()
        assert cache.make() == []
        cache.attach([])

    for _ in _killed_at_each(_ALL, make):
        make()
        index = (tmp_path / "cache" / "index.jsonl").read_text().splitlines()
        assert len({json.loads(line)["key"] for line in index}) == len(index) == 3
        shutil.rmtree(tmp_path / "cache")


def test_killed_labels_are_continued(few: Path, tmp_path: Path) -> None:
    def make(output: str = "labels") -> None:
        label(few, tmp_path / output, LabelSettings(clusters=3, fit_frames=300), num_workers=0)

    make("expected")
    for _ in _killed_at_each(_ALL, make):
        make()
        for name in ("labels.jsonl", "settings.json", "kmeans.safetensors"):
            assert (tmp_path / "labels" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
        shutil.rmtree(tmp_path / "labels")


def test_killed_features_are_continued(few: Path, tmp_path: Path) -> None:
    shape = {field.name: getattr(model_of("wav2vec2"), field.name) for field in dataclasses.fields(EncoderConfig)}
    Encoder(EncoderConfig(**shape)).save_pretrained(tmp_path / "model")

    def make(output: str = "features") -> None:
        extract(tmp_path / "model", few, tmp_path / output, shard_mb=0.02, device="cpu")

    make("expected")
    for _ in _killed_at_each(_ALL, make):
        make()
        names = [path.name for path in (tmp_path / "features").iterdir() if not path.name.startswith(".partial")]
        assert sorted(names) == sorted(path.name for path in (tmp_path / "expected").iterdir())
        for name in names:
            assert (tmp_path / "features" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
        shutil.rmtree(tmp_path / "features")


def test_a_killed_manifest_or_report_leaves_the_old_one(few: Path, tmp_path: Path) -> None:
    corpus = open_corpus(few)
    manifest, report = tmp_path / "cuts.jsonl.gz", tmp_path / "report.json"

    def write() -> None:
        write_manifest(corpus, manifest)
        files.write_json(report, {"new": 1})

    for number in _killed_at_each(_ALL, write):
        if number < 2:  # the folder and the manifest
            assert not manifest.exists()
        assert not report.exists()
        write()
        assert report.read_text() == '{\n  "new": 1\n}\n'
        manifest.unlink()
        report.unlink()
