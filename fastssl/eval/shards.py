"""Tensors by key in safetensors shards with an index: written as they come, gone on with where it was stopped."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastssl.models.folder import changed_settings, write_json, write_text

INDEX_FILE, SETTINGS_FILE = "index.jsonl", "settings.json"


class Shards:
    """A folder of shards `NAME-00000.safetensors`, which appear whole; the index names only what is in them.

    Args:
        folder: Where; created if missing.
        settings: What decides the tensors; kept beside them.
        name: Of the shards.
        option: By which the user gave the folder, for errors.
        shard_bytes: A shard is closed when it has this much.

    Raises:
        ValueError: The folder was begun with other settings, or holds something else.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, Any], name: str, option: str, shard_bytes: int) -> None:
        self.folder, self.name, self.shard_bytes = folder, name, shard_bytes
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0
        self._open_entries: list[dict[str, Any]] = []
        self._index = folder / INDEX_FILE
        self._begin(settings, option)
        #: Lines of the index, by key.
        self.entries = read_index(folder)
        numbers = [int(entry["shard"].removeprefix(f"{name}-").partition(".")[0]) for entry in self.entries.values()]
        self._number = 1 + max(numbers, default=-1)
        self._begun = False

    def _begin(self, settings: Mapping[str, Any], option: str) -> None:
        path = self.folder / SETTINGS_FILE
        there = self.folder.exists() and (not self.folder.is_dir() or any(map(_is_foreign, self.folder.iterdir())))
        if there and not path.is_file():
            raise ValueError(f"{option}: {self.folder} exists, is not empty, and holds no {self.name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{SETTINGS_FILE}.{uuid.uuid4().hex}.partial"
        write_json(partial, settings)
        try:
            # Another run may begin it at the same time; whichever is first decides.
            os.link(partial, path)
        except FileExistsError:
            try:
                before = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{option}: {path}: is no JSON: {error}") from None
            if changed := changed_settings(before, settings):
                raise ValueError(f"{option}: {self.folder} was begun with other settings ({changed})") from None
        finally:
            partial.unlink()

    def add(self, key: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Take in the tensors of a key, by their names in the shard, and its line of the index."""
        self._open |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._open_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._open_entries.append({"key": key, **entry})
        if self._open_bytes >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Write the open shard, then its lines of the index."""
        if not self._begun:
            # What a kill left of a last line must not be continued.
            write_text(self._index, "".join(json.dumps(entry) + "\n" for entry in self.entries.values()))
            self._begun = True
        if not self._open_entries:
            return
        shard = f"{self.name}-{self._number:05d}.safetensors"
        temporary = self.folder / f"{shard}.tmp"
        save_file(self._open, temporary)
        temporary.replace(self.folder / shard)
        with self._index.open("a") as file:
            for entry in self._open_entries:
                line = {"shard": shard, **entry}
                file.write(json.dumps(line) + "\n")
                self.entries[entry["key"]] = line
        self._number += 1
        self._open.clear()
        self._open_bytes = 0
        self._open_entries.clear()


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The complete lines of a folder's index, by key."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return {entry["key"]: entry for entry in entries}


def _is_foreign(path: Path) -> bool:
    """Whether it is not what another run, that begins the folder too, has there for a moment."""
    return path.suffix != ".partial"
