"""Test a folder of shards that two processes create at the same time, or that contains something else."""

import json
import logging
from pathlib import Path

import pytest
import torch

from fastssl.eval.shards import Shards, read_index
from fastssl.files import write_first


def _begin(folder: Path, layer: int) -> Shards:
    return Shards(folder, settings={"layer": layer}, name="frames", option="--cache", shard_bytes=100)


@pytest.mark.parametrize(("other", "passes"), [(1, True), (2, False)])
def test_whoever_is_first_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, other: int, passes: bool) -> None:
    def beaten_to_it(path: Path, text: str) -> bool:
        monkeypatch.undo()
        _begin(tmp_path / "frames", other)
        return write_first(path, text)

    monkeypatch.setattr("fastssl.eval.shards.write_first", beaten_to_it)
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


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"key": 5, "shard": "frames-00000.safetensors"}'),
        *(
            b'{"key": "a"}',
            b'{"key": "a", "shard": "../frames-00000.safetensors"}',
            b'{"key": "a", "shard": "frames-x"}',
        ),
    ],
)
def test_a_damaged_line_of_the_index_is_named(line: bytes, tmp_path: Path) -> None:
    good = b'{"key": "a", "shard": "frames-00000.safetensors"}\n'
    (tmp_path / "index.jsonl").write_bytes(good + line)
    assert set(read_index(tmp_path)) == {"a"}  # a killed run may leave part of a line
    (tmp_path / "index.jsonl").write_bytes(good + line + b"\n")
    with pytest.raises(ValueError, match=r"index\.jsonl: line 2 is damaged"):
        read_index(tmp_path)


def test_shards_of_another_name_in_the_index_do_not_count(tmp_path: Path) -> None:
    """A damaged index may list them; the next shard follows the last one of our own."""
    shards = _begin(tmp_path / "frames", 1)
    for key in "ab":
        shards.add(key, {key: torch.zeros(30)}, {})
    shards.close()
    index = tmp_path / "frames" / "index.jsonl"
    index.write_text(index.read_text().replace("frames-00000", "teacher-00007"))
    again = _begin(tmp_path / "frames", 1)
    assert "teacher-00007.safetensors" in again.damaged()
    again.drop_damaged()
    again.add("c", {"c": torch.zeros(30)}, {})
    assert sorted(path.name for path in (tmp_path / "frames").glob("*.safetensors"))[-1] == "frames-00002.safetensors"


def test_settings_without_rules_are_those_of_the_oldest(tmp_path: Path) -> None:
    def begin(rules: int) -> Shards:
        settings = {"layer": 1, "rules": rules}
        return Shards(tmp_path / "frames", settings=settings, name="frames", option="--cache", shard_bytes=100)

    _begin(tmp_path / "frames", 1)
    begin(1)
    with pytest.raises(ValueError, match=r"rules: 1 there, 2 now"):
        begin(2)


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


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must contain a JSON object, got a list"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_damaged_settings_are_named(text: str, what: str, tmp_path: Path) -> None:
    _begin(tmp_path / "frames", 1)
    (tmp_path / "frames" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=rf"--cache: .*settings\.json: {what}"):
        _begin(tmp_path / "frames", 1)
