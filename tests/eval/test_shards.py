"""Test a folder of shards that two processes create at the same time, or that contains something else."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.eval.shards import Shards, read_index
from fastssl.models.folder import write_json


def _begin(folder: Path, layer: int) -> Shards:
    return Shards(folder, settings={"layer": layer}, name="frames", option="--cache", shard_bytes=100)


@pytest.mark.parametrize(("other", "passes"), [(1, True), (2, False)])
def test_whoever_is_first_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, other: int, passes: bool) -> None:
    def beaten_to_it(path: Path, values: Mapping[str, Any]) -> None:
        write_json(path, values)
        monkeypatch.undo()
        _begin(tmp_path / "frames", other)

    monkeypatch.setattr("fastssl.eval.shards.write_json", beaten_to_it)
    if passes:
        _begin(tmp_path / "frames", 1)
    else:
        with pytest.raises(
            ValueError, match=r"--cache: .*frames was begun with other settings \(layer: 2 there, 1 now"
        ):
            _begin(tmp_path / "frames", 1)
    assert json.loads((tmp_path / "frames" / "settings.json").read_text()) == {"layer": other}
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["settings.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"--cache: .* exists, is not empty, and contains no frames"):
            _begin(folder, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_keys_in_damaged_shards_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = _begin(tmp_path / "frames", 1)
    for key in "abcd":
        shards.add(key, {key: torch.zeros(30)}, {})  # a shard of its own
    shards.add("e", {"e/1": torch.zeros(30)}, {})
    paths = sorted((tmp_path / "frames").glob("*.safetensors"))
    assert len(paths) == 5
    assert _begin(tmp_path / "frames", 1).damaged() == {}
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    paths[2].write_bytes(paths[3].read_bytes())

    again = _begin(tmp_path / "frames", 1)
    assert [problem.partition(" (")[0] for problem in again.damaged().values()] == [
        "is missing",
        "cannot be read",
        "lacks 1 of 1 keys, such as c",
    ]
    with caplog.at_level(logging.WARNING):
        again.drop_damaged()
    assert list(again.entries) == ["d", "e"]
    assert "frames-00001.safetensors: cannot be read" in caplog.text
    again.add("a", {"a": torch.ones(30)}, {})
    assert {key: entry["shard"][7:12] for key, entry in read_index(tmp_path / "frames").items()} == {
        "d": "00003",
        "e": "00004",
        "a": "00005",
    }


def test_a_damaged_line_of_the_index_is_named(tmp_path: Path) -> None:
    shards = _begin(tmp_path / "frames", 1)
    shards.add("a", {"a": torch.zeros(30)}, {})
    index = tmp_path / "frames" / "index.jsonl"
    good = index.read_text()
    for line in ("{", "[]", "[" * 100_000, '{"key": "b"}', '{"key": 1, "shard": "frames-00000.safetensors"}'):
        index.write_text(good + line + "\n")
        with pytest.raises(ValueError, match=r"index\.jsonl: line 2 is damaged"):
            _begin(tmp_path / "frames", 1)
    index.write_text(good + '{"key": "b", "shard": "../../frames-00000.safetensors"}\n')
    with pytest.raises(ValueError, match=r"index\.jsonl: line 2 is damaged"):
        _begin(tmp_path / "frames", 1)
    index.write_text(good + '{"key": "b", "sh')  # as a killed process leaves it
    assert list(_begin(tmp_path / "frames", 1).entries) == ["a"]
    (tmp_path / "frames" / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"--cache: .*settings\.json: must contain a JSON object, got a list"):
        _begin(tmp_path / "frames", 1)
