"""Test a folder of shards that two processes create at the same time, or that contains something else."""

import json
from pathlib import Path

import pytest

from fastssl.eval.shards import Shards
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
