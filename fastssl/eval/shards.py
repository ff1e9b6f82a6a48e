"""Store tensors by key in safetensors shards with an index; a stopped run can continue where it left off."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastssl.data.rules import OLDEST_RULES
from fastssl.files import append_text, is_partial, make_folder, naming, write_first, write_text
from fastssl.folder_lock import LOCK_FILE
from fastssl.models.folder import changed_settings, write_weights
from fastssl.names import plain_path, restored
from fastssl.reading import complete_lines, printable, read_json

logger = logging.getLogger(__name__)

INDEX_FILE, SETTINGS_FILE = "index.jsonl", "settings.json"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
#: File names of shards; a damaged index must not lead out of the folder.
_SHARD = re.compile(r"\w+-[0-9]{5,9}\.safetensors")


class Shards:
    """A folder of shards `NAME-00000.safetensors`, with an index of the keys in them.

    Each shard is written atomically, and the index lists only keys whose shard is complete.

    Args:
        folder: Folder for shards and index; created if missing.
        settings: Settings that determine the tensors; written to `settings.json`, and compared with it when an
            existing folder is opened.
        unrecorded: What settings were in folders that do not record them; `rules` are then the oldest ones.
        name: First part of the shards' file names, such as "features".
        option: Command-line option that gave the folder; error messages begin with it.
        shard_bytes: Size of a shard in bytes; once a shard has reached it, the next one begins.

    Raises:
        ValueError: The folder was begun with other settings, it contains other files and no shards, or its settings or
            a line of its index are damaged.
        WriteError: The system refused to write.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        unrecorded: Mapping[str, Any] = _NOTHING,
        name: str,
        option: str,
        shard_bytes: int,
    ) -> None:
        self.folder, self.name, self.shard_bytes = folder, name, shard_bytes
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0
        self._open_entries: list[dict[str, Any]] = []
        self._index, self._option = folder / INDEX_FILE, option
        self._begin(settings, unrecorded, option)
        #: Entries of the index, by key.
        self.entries = read_index(folder)
        # A damaged index may also list shards with other names, which are never written to.
        own = [entry["shard"] for entry in self.entries.values() if entry["shard"].startswith(f"{name}-")]
        numbers = [int(shard.removeprefix(f"{name}-").partition(".")[0]) for shard in own]
        self._number = 1 + max(numbers, default=-1)
        self._begun = False

    def _begin(self, settings: Mapping[str, Any], unrecorded: Mapping[str, Any], option: str) -> None:
        path = self.folder / SETTINGS_FILE
        check_folder(self.folder, name=self.name, option=option)
        with naming(path, option=option):
            make_folder(self.folder)
            # Another run may begin the same folder at the same time; the first one decides.
            first = write_first(path, json.dumps(settings, indent=2) + "\n")
        if first:
            return
        try:
            before = read_json(path)
        except ValueError as error:
            raise ValueError(f"{option}: {error}, or choose another folder") from None
        if changed := changed_settings({"rules": OLDEST_RULES, **unrecorded, **before}, settings):
            raise ValueError(
                f"{option}: {self.folder} was begun with other settings ({changed}); "
                "use the same settings or choose another folder"
            )

    def damaged(self) -> dict[str, str]:
        """Find the shards that are missing or damaged, or that lack keys which the index lists.

        Returns:
            The problem with each of these shards, such as "is missing", by the shard's name.
        """
        keys: dict[str, set[str]] = {}
        for key, entry in self.entries.items():
            keys.setdefault(entry["shard"], set()).add(key)
        problems: dict[str, str] = {}
        for shard, expected in sorted(keys.items()):
            path = self.folder / shard
            if not path.is_file():
                problems[shard] = "is missing"
                continue
            try:
                with plain_path(path) as plain, safe_open(plain, framework="pt") as file:
                    names = set(file.keys())
            except (SafetensorError, OSError) as error:
                problems[shard] = f"cannot be read ({printable(error)})"
                continue
            lost = expected - names - {restored(name).rpartition("/")[0] for name in names}
            if lost:
                problems[shard] = f"lacks {len(lost)} of {len(expected)} keys, such as {printable(min(lost))}"
        return problems

    def drop_damaged(self) -> None:
        """Leave the keys in shards that are `damaged` out of the index, with a warning, so that they are made again."""
        problems = self.damaged()
        for shard, problem in problems.items():
            lost = [key for key, entry in self.entries.items() if entry["shard"] == shard]
            logger.warning("%s: %s; its %d recordings are made again", self.folder / shard, problem, len(lost))
            for key in lost:
                del self.entries[key]

    def add(self, key: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Add the tensors of one key, and write the shard to disk once it has reached `shard_bytes`.

        Args:
            key: Key of these tensors in the index.
            tensors: CPU tensors of any shape and dtype, by their names in the shard (see `names.stored`).
            entry: Further fields of the key's line in the index; must be serialisable as JSON.
        """
        self._open |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._open_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._open_entries.append({"key": key, **entry})
        if self._open_bytes >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Write the current shard to disk, then its lines of the index; call it once after the last `add`.

        Raises:
            WriteError: The system refused to write.
        """
        with naming(self._index, option=self._option):
            self._close()

    def _close(self) -> None:
        if not self._begun:
            # Rewrite the index: a killed run may have left part of a line at its end.
            write_text(self._index, "".join(json.dumps(entry) + "\n" for entry in self.entries.values()))
            self._begun = True
        if not self._open_entries:
            return
        shard = f"{self.name}-{self._number:05d}.safetensors"
        write_weights(self.folder / shard, self._open)
        lines = {entry["key"]: {"shard": shard, **entry} for entry in self._open_entries}
        append_text(self._index, "".join(json.dumps(line) + "\n" for line in lines.values()), sync=True)
        self.entries |= lines
        self._number += 1
        self._open.clear()
        self._open_bytes = 0
        self._open_entries.clear()


def check_folder(folder: Path, *, name: str, option: str) -> None:
    """Check that a folder is missing or empty, or that shards were begun in it.

    Args:
        folder: Folder for shards.
        name: First part of the shards' file names, for the error message.
        option: Command-line option that gave the folder.

    Raises:
        ValueError: The folder contains other files and no shards, or is a file.
    """
    there = folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir())))
    if there and not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{option}: {folder} exists, is not empty, and contains no {name}; choose another folder")


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the index of a folder of shards.

    Args:
        folder: Folder that `Shards` wrote.

    Returns:
        The complete lines of `index.jsonl` by key, each with `key`, `shard` and the fields given to `Shards.add`; empty
        if there is no index.

    Raises:
        ValueError: A line is damaged; the message names it.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    entries: dict[str, dict[str, Any]] = {}
    for number, line in complete_lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not _is_entry(entry):
            raise ValueError(
                f"{path}: line {number} is damaged, expected an object with the key and the shard of a recording; "
                "delete the line to make the recording again"
            )
        entries[entry["key"]] = entry
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return False
    shard = entry.get("shard")
    return isinstance(shard, str) and _SHARD.fullmatch(shard) is not None


def _is_foreign(path: Path) -> bool:
    """Return whether a file is neither incomplete nor the lock of a run that is beginning the same folder."""
    return not is_partial(path) and path.name != LOCK_FILE
