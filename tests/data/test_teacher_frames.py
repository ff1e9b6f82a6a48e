"""Test that a damaged folder of a teacher's frames is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastssl.data.teacher_frames import TeacherTable

SHARD = "teacher-00000.safetensors"
ENTRY = {"key": "a", "shard": SHARD, "duration_s": 1.0, "rate_hz": 16000, "checksum": 5, "frames": 7}


def table(folder: Path, **changed: Any) -> TeacherTable:
    return TeacherTable(folder, {"a": ENTRY | changed}, layers=[2], width=4, channels=None)


@pytest.mark.parametrize("field", ["duration_s", "rate_hz", "checksum", "frames"])
@pytest.mark.parametrize("value", [None, "1.0", [1.0], True, pytest.param(10**400, id="huge"), -1, float("nan")])
def test_damaged_entries_are_named(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.teacher_cache: {tmp_path}: the entry of a in its index is damaged"):
        table(tmp_path, **{field: value})


def test_whole_entries_and_shards_are_read(tmp_path: Path) -> None:
    save_file({"a/2": torch.ones(7, 4).half()}, tmp_path / SHARD)
    (layer,) = table(tmp_path).of(["a", "a"]).layers
    assert torch.equal(layer, torch.ones(14, 4).half())


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("a/3", torch.zeros(7, 4).half(), "a/2"),
        ("a/2", torch.zeros(7, 4), r"a/2 is torch\.float32 \(7, 4\), expected torch\.float16 \(7, 4\)"),
        ("a/2", torch.zeros(6, 4).half(), r"a/2 is torch\.float16 \(6, 4\)"),
        ("a/2", torch.zeros(28).half(), r"a/2 is torch\.float16 \(28,\)"),
    ],
)
def test_damaged_shards_are_named(name: str, tensor: Tensor, problem: str, tmp_path: Path) -> None:
    frames = table(tmp_path)
    shard = tmp_path / SHARD
    with pytest.raises(ValueError, match=r"teacher-00000\.safetensors: cannot be read: No such file"):
        frames.of(["a"])
    save_file({name: tensor}, shard)
    with pytest.raises(ValueError, match=rf"teacher-00000\.safetensors: cannot be read: .*{problem}"):
        frames.of(["a"])
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"teacher-00000\.safetensors: cannot be read"):
        frames.of(["a"])
