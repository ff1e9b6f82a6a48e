"""Test that a damaged checkpoint is never loaded, and that a run then continues from the one before."""

import dataclasses
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from fastssl.train.checkpoint_file import (
    DamagedCheckpointError,
    check_checkpoint,
    find_checkpoint,
    has_checkpoint,
    set_aside,
    write_checkpoint,
)
from fastssl.train.checkpoints import initialise
from fastssl.train.config import PretrainConfig
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from fastssl.train.systems import build_model
from tests.train.conftest import MakeConfig


def _flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def _small(update: int = 3) -> dict[str, object]:
    return {"global_step": update, "state_dict": {"weight": torch.arange(50.0)}}


def test_every_damaged_bit_and_every_missing_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint(_small(), path)
    whole = path.read_bytes()
    assert check_checkpoint(path) == 3
    assert torch.load(path, weights_only=True)["global_step"] == 3
    draw = random.Random(0)
    for byte in {*draw.sample(range(len(whole)), 120), *range(len(whole) - 60, len(whole))}:
        path.write_bytes(whole)
        _flip(path, byte, draw.randrange(8))
        with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt (is|cannot be read)"):
            check_checkpoint(path)
    for size in (0, 1, 21, 22, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt (is|cannot be read)") as caught:
            check_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_checkpoints_of_earlier_versions_open_unless_they_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(_small(), path)
    assert check_checkpoint(path) == 3
    _flip(path, path.read_bytes().index(torch.arange(50.0).numpy().tobytes()) + 100)
    with pytest.raises(DamagedCheckpointError, match=r"the checksum of .* differs"):
        check_checkpoint(path)


def test_two_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for update in (1, 2, 3):
        write_checkpoint(_small(update), folder / "last.ckpt")
    assert {path.name: check_checkpoint(path) for path in folder.iterdir()} == {"last.ckpt": 3, "previous.ckpt": 2}
    (folder / "last.ckpt").unlink()  # as after a kill between the two renames
    found = find_checkpoint(tmp_path, name="--resume")
    assert found is not None
    assert found == (folder / "previous.ckpt", 2, None)
    write_checkpoint(_small(4), folder / "last.ckpt")
    assert {path.name: check_checkpoint(path) for path in folder.iterdir()} == {"last.ckpt": 4, "previous.ckpt": 2}


@pytest.fixture
def unbroken(make_config: MakeConfig) -> PretrainConfig:
    config = make_config("unbroken", **{"trainer.max_steps": 6})
    pretrain(config)
    return config


def test_a_damaged_checkpoint_is_left_out_and_the_run_ends_as_an_unbroken_one(
    make_config: MakeConfig, unbroken: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(unbroken.output, tmp_path / "run")
    config = make_config("run", **{"trainer.max_steps": 6})
    folder = tmp_path / "run" / "checkpoints"
    _flip(folder / "last.ckpt", (folder / "last.ckpt").stat().st_size // 2)
    with caplog.at_level(logging.INFO, logger="fastssl"):
        pretrain(config, resume=True)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        f"{folder / 'last.ckpt'} is damaged (its checksum differs); "
        "the run continues from previous.ckpt, after update 4"
    )
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "previous.ckpt", "damaged.ckpt"}
    assert [check_checkpoint(folder / name) for name in ("last.ckpt", "previous.ckpt")] == [6, 4]
    expected, found = (
        torch.load(Path(one) / "checkpoints" / "last.ckpt", weights_only=True)
        for one in (unbroken.output, config.output)
    )
    assert all(torch.equal(found["state_dict"][name], x) for name, x in expected["state_dict"].items())
    expected_rows, rows = (read_metrics(Path(one.output) / "metrics.csv") for one in (unbroken, config))
    for row, other in zip(expected_rows, rows, strict=True):
        assert row | {"audio_s_per_s": 0} == other | {"audio_s_per_s": 0}
    board = EventAccumulator(str(tmp_path / "run" / "logs"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("valid_loss")] == [4]
    assert board.Scalars("loss")[5].value == pytest.approx(rows[-1]["loss"], rel=1e-6)


def test_two_damaged_checkpoints_are_one_error(unbroken: PretrainConfig) -> None:
    folder = Path(unbroken.output) / "checkpoints"
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    before = {path: path.stat().st_mtime_ns for path in Path(unbroken.output).rglob("*") if path.is_file()}
    message = r"--resume: \S+: no usable checkpoint: \S+last\.ckpt is .*; \S+previous\.ckpt is .*; restore one, or "
    with pytest.raises(ValueError, match=message) as caught:
        pretrain(unbroken, resume=True)
    assert "\n" not in str(caught.value)
    assert before == {path: path.stat().st_mtime_ns for path in Path(unbroken.output).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"start from the encoder with --init \S+encoder$"):
        initialise(build_model(unbroken.model), unbroken.output)


def test_init_leaves_out_a_damaged_checkpoint(
    make_config: MakeConfig, unbroken: PretrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    _flip(Path(unbroken.output) / "checkpoints" / "last.ckpt", 3000)
    pretrain(make_config("tuned", init=unbroken.output, **{"trainer.max_steps": 1, "data.valid": 0.0}))
    assert "damaged (its checksum differs); previous.ckpt is used, after update 4" in caplog.text


def test_a_kept_checkpoint_is_the_last_resort(tmp_path: Path) -> None:
    """Otherwise, --resume would begin again and empty metrics.csv."""
    folder = tmp_path / "checkpoints"
    for name, update in (("0000002", 2), ("0000010", 10), ("0000012", 12), ("previous", 11), ("last", 12)):
        write_checkpoint(_small(update), folder / f"{name}.ckpt")
    (folder / "previous.ckpt").rename(folder / "copy.ckpt")  # of no meaning
    for name in ("last", "0000012"):
        _flip(folder / f"{name}.ckpt", 1000)
    found = find_checkpoint(tmp_path, name="--resume")
    assert found is not None
    assert found[:2] == (folder / "0000010.ckpt", 10)
    assert "last.ckpt is damaged" in str(found.damage)
    set_aside(folder / "last.ckpt")
    set_aside(folder / "last.ckpt")  # a kill came between this and the next save
    assert has_checkpoint(tmp_path)
    (folder / "damaged.ckpt").rename(tmp_path / "damaged.ckpt")
    assert find_checkpoint(tmp_path, name="--resume") == (
        folder / "0000010.ckpt",
        10,
        f"{folder / '0000012.ckpt'} is damaged (its checksum differs)",
    )


def test_a_foreign_run_does_not_write_through_links(unbroken: PretrainConfig, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    for name in ("logs", "logs/pretrain.log", "encoder", "checkpoints"):
        path = Path(unbroken.output) / name
        path.rename(target)
        path.symlink_to(target)
        before = {file: file.stat().st_mtime_ns for file in (target, *target.rglob("*"))}
        with pytest.raises(OSError, match=rf"{name} cannot be written: .* so delete the link"):
            pretrain(unbroken, resume=True)
        assert before == {file: file.stat().st_mtime_ns for file in (target, *target.rglob("*"))}
        path.unlink()
        target.rename(path)
    # Files that are replaced take the place of a link.
    target.mkdir()
    for name in ("config.yaml", "metrics.csv", "encoder/model.safetensors"):
        path = Path(unbroken.output) / name
        path.rename(target / path.name)
        path.symlink_to(target / path.name)
    foreign = {file: file.read_bytes() for file in target.iterdir()}
    pretrain(dataclasses.replace(unbroken, trainer=dataclasses.replace(unbroken.trainer, max_steps=7)), resume=True)
    assert foreign == {file: file.read_bytes() for file in target.iterdir()}
    assert not any(path.is_symlink() for path in Path(unbroken.output).rglob("*"))
