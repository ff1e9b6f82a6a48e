"""Random access to Lhotse shar directories, through the position of each recording in its tar file.

Lhotse reads shar as a stream, with the audio inside the cuts. The batch plan of `batches.py` depends only on seed and
epoch and skips a million utterances in a second, so it needs cuts without audio. This module therefore reads the
headers of the tar files once. Each cut then holds its position: the source `SHARD.tar/NAME`, which Lhotse can open
too, and `custom["tar_member"]` = [offset, size] in bytes.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import Recording
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from fastssl.data.manifest import ForbiddenSourceError, deserialize, read_lines


def is_shar(folder: Path) -> bool:
    """Return whether a folder contains shards of cuts (`cuts.000000.jsonl.gz`, `cuts.000001.jsonl.gz`, ...)."""
    return any(folder.glob("cuts.*.jsonl*"))


def read_shar(folder: Path) -> Iterator[Cut]:
    """Yield the cuts of a shar directory, with recordings that point into its tar files.

    A cut whose audio is missing from its shard keeps its placeholder source of type "shar".

    Args:
        folder: Folder with `cuts.N.jsonl.gz`, and `recording.N.tar` or `recording.N.jsonl.gz` for each N.

    Raises:
        ValueError: A shard of cuts has no shard of recordings, their ids do not match, or an audio source would be run
            or fetched.
    """
    for cuts_path in sorted(folder.glob("cuts.*.jsonl*")):
        number = cuts_path.name.split(".")[1]
        tar_path = folder / f"recording.{number}.tar"
        table_paths = sorted(folder.glob(f"recording.{number}.jsonl*"))
        if tar_path.exists():
            recordings = _recordings_in_tar(tar_path)
        elif table_paths:
            recordings = _recordings_in_table(table_paths[0])
        else:
            raise ValueError(
                f"source: {cuts_path} has no shard of recordings; looked for {tar_path.name} (or .jsonl.gz) beside it"
            )
        for line_number, line in enumerate(read_lines(cuts_path), 1):
            try:
                cut = deserialize(line)
                cut_id, recording, member = next(recordings, (None, None, None))
            except ForbiddenSourceError as error:
                raise ValueError(f"source: {cuts_path}, line {line_number}, or its recording {error}") from None
            if cut_id != cut.id:
                raise ValueError(f"source: {tar_path} has {cut_id!r}, expected {cut.id!r} as in {cuts_path.name}")
            if recording is not None:
                cut = fastcopy(cut, recording=recording)
            if member is not None:
                cut.custom = {**(cut.custom or {}), "tar_member": member}
            yield cut


_Entry = tuple[str | None, Recording | None, list[int] | None]


def _recordings_in_tar(path: Path) -> Iterator[_Entry]:
    with tarfile.open(path, "r:") as tar:
        members = iter(tar)
        for audio in members:
            manifest = next(members, None)
            cut_id = str(Path(audio.name).with_suffix(""))
            file = None if manifest is None or manifest.name.endswith(".nometa") else tar.extractfile(manifest)
            if file is None:
                yield cut_id, None, None
                continue
            recording = _recording(path, json.loads(file.read()))
            recording.sources[0].type, recording.sources[0].source = "file", f"{path}/{audio.name}"
            yield cut_id, recording, [audio.offset_data, audio.size]


def _recordings_in_table(path: Path) -> Iterator[_Entry]:
    line: dict[str, Any]
    for line in read_lines(path):
        yield line["cut_id"], _recording(path, line["recording"]) if "recording" in line else None, None


def _recording(path: Path, value: dict[str, Any]) -> Recording:
    item = deserialize(value)
    if not isinstance(item, Recording):
        raise ValueError(f"source: {path} contains a {type(item).__name__}, expected only recordings")
    return item
