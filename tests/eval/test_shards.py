"""Test a folder of shards that two processes create at the same time, or that contains something else."""

import json
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_damaged_settings_are_named(text: str, tmp_path: Path) -> None:
    _begin(tmp_path / "frames", 1)
    (tmp_path / "frames" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"--cache: .*settings\.json (is not valid JSON|does not contain settings)"):
        _begin(tmp_path / "frames", 1)


def test_settings_without_rules_are_those_of_the_oldest(tmp_path: Path) -> None:
    def begin(rules: int) -> Shards:
        settings = {"layer": 1, "rules": rules}
        return Shards(tmp_path / "frames", settings=settings, name="frames", option="--cache", shard_bytes=100)

    _begin(tmp_path / "frames", 1)
    begin(1)
    with pytest.raises(ValueError, match=r"rules: 1 there, 2 now"):
        begin(2)
