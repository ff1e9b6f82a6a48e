"""Lhotse shar directories as random access: an index of where in the tar files each recording lies.

Lhotse reads shar as a stream with the audio inside the cuts. A plan of batches that is a function of seed and epoch,
and that can skip a million utterances in a second, needs metadata only. So the headers of the tar files are read once,
and each cut carries its place: source `SHARD.tar/NAME` (which Lhotse opens too), `custom["tar_member"]` [offset, size].
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
    """Whether the folder holds shards: `cuts.000000.jsonl.gz`, `recording.000000.tar`, and so on."""
    return any(folder.glob("cuts.*.jsonl*"))


def read_shar(folder: Path) -> Iterator[Cut]:
    """Cuts of a shar directory whose recordings point into its tar files.

    Raises:
        ValueError: A shard of cuts has no shard of recordings, they do not match, or an audio source would be run or
            fetched.
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
            raise ValueError(f"source: {cuts_path} has no recordings beside it (looked for {tar_path.name}, .jsonl.gz)")
        for line_number, line in enumerate(read_lines(cuts_path), 1):
            try:
                cut = deserialize(line)
                cut_id, recording, member = next(recordings, (None, None, None))
            except ForbiddenSourceError as error:
                raise ValueError(f"source: {cuts_path}, line {line_number}, or its recording {error}") from None
            if cut_id != cut.id:
                raise ValueError(f"source: {tar_path} has {cut_id!r} where {cuts_path.name} has {cut.id!r}")
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
        raise ValueError(f"source: {path} has a {type(item).__name__} where it should have a recording")
    return item
