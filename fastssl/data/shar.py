"""Random access to Lhotse shar directories, through the position of each recording in its tar file.

Lhotse reads shar as a stream, with the audio inside the cuts. The batch plan of `batches.py` depends only on seed and
epoch and skips a million utterances in a second, so it needs cuts without audio. This module therefore reads the
headers of the tar files once. Each cut then holds its position: the source `SHARD.tar/NAME`, which Lhotse can open
too, and `custom["tar_member"]` = [offset, size] in bytes.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import Recording
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.utils import fastcopy

from fastssl.data.manifest import BadLineError, deserialize, parse, read_lines, shortened
from fastssl.regular import UnusableFileError, size_of

_LONGEST_METADATA = 2**24  # bytes


def is_shar(folder: Path) -> bool:
    """Return whether a folder contains shards of cuts (`cuts.000000.jsonl.gz`, `cuts.000001.jsonl.gz`, ...)."""
    return any(folder.glob("cuts.*.jsonl*"))


def read_shar(folder: Path) -> Iterator[tuple[str, Cut | BadLineError]]:
    """Yield the cuts of a shar directory, with recordings that point into its tar files.

    A cut whose audio is missing from its shard keeps its placeholder source of type "shar".

    Args:
        folder: Folder with `cuts.N.jsonl.gz`, and `recording.N.tar` or `recording.N.jsonl.gz` for each N.

    Yields:
        (shard and line number, the cut or what is wrong with its line or with its recording).

    Raises:
        ValueError: A shard of cuts has no shard of recordings, their ids do not match, or a shard breaks off.
    """
    for cuts_path in sorted(folder.glob("cuts.*.jsonl*")):
        number = cuts_path.name.split(".")[1]
        tar_path = folder / f"recording.{number}.tar"
        table_paths = sorted(folder.glob(f"recording.{number}.jsonl*"))
        if os.path.lexists(tar_path):
            path, recordings = tar_path, _recordings_in_tar(tar_path)
        elif table_paths:
            path, recordings = table_paths[0], _recordings_in_table(table_paths[0])
        else:
            raise ValueError(
                f"source: {cuts_path} has no shard of recordings; looked for {tar_path.name} (or .jsonl.gz) beside it"
            )
        for line_number, line in read_lines(cuts_path):
            place = f"{cuts_path}, line {line_number}"
            entry = next(recordings, None)
            if entry is None:
                raise ValueError(f"source: {path} ends before the recording of {place}; copy or make it again")
            try:
                yield place, _paired(line, entry, path, place)
            except BadLineError as error:
                yield place, error


#: Id of the cut (None if it cannot be read), its recording or what is wrong with it, and its place in the tar file.
_Entry = tuple[str | None, Recording | BadLineError | None, list[int] | None]


def _paired(line: dict[str, Any] | BadLineError, entry: _Entry, path: Path, place: str) -> Cut:
    if isinstance(line, BadLineError):
        raise line
    cut = deserialize(line)
    if not isinstance(cut, MonoCut | MultiCut):
        raise BadLineError("is not a cut of exactly one recording")
    cut_id, recording, member = entry
    if cut_id is not None and cut_id != cut.id:
        raise ValueError(
            f"source: {path} has {shortened(cut_id)!r}, expected {shortened(cut.id)!r} as in {place}; "
            "make the directory again"
        )
    if isinstance(recording, BadLineError):
        raise BadLineError(f"has an unusable entry in {path.name}: it {recording}")
    if recording is not None:
        cut = fastcopy(cut, recording=recording)
    if member is not None:
        cut.custom = {**(cut.custom or {}), "tar_member": member}
    return cut


def _recordings_in_tar(path: Path) -> Iterator[_Entry]:
    try:
        size = size_of(path)
        with tarfile.open(path, "r:") as tar:
            members = _forwards(tar)
            for audio in members:
                manifest = next(members, None)
                cut_id = str(Path(audio.name).with_suffix(""))
                if manifest is None or manifest.name.endswith(".nometa"):
                    yield cut_id, None, None
                    continue
                if manifest.size > min(_LONGEST_METADATA, size - manifest.offset_data):
                    raise tarfile.TarError(f"{manifest.name} is said to have {manifest.size:,} bytes")
                file = tar.extractfile(manifest)
                recording = _recording(b"" if file is None else file.read())
                if isinstance(recording, Recording):
                    for source in recording.sources[:1]:
                        source.type, source.source = "file", f"{path}/{audio.name}"
                yield cut_id, recording, [audio.offset_data, audio.size]
    except UnusableFileError as error:
        raise ValueError(f"source: {path} {error}") from None
    # On damaged headers, `tarfile` raises exceptions of many types.
    except Exception as error:
        raise ValueError(
            f"source: {path} is damaged: {shortened(error) or type(error).__name__}; copy or make it again"
        ) from error


def _forwards(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file; a negative size in a damaged header would send `tarfile` round in a circle."""
    last = -1
    for member in tar:
        if member.offset_data <= last or member.size < 0:
            raise tarfile.TarError(f"the header before byte {member.offset_data} leads backwards")
        last = member.offset_data
        yield member


def _recordings_in_table(path: Path) -> Iterator[_Entry]:
    for number, line in read_lines(path):
        if isinstance(line, dict) and not isinstance(line.get("cut_id"), str):
            line = BadLineError("has no cut_id")
        if isinstance(line, BadLineError):
            yield None, BadLineError(f"is line {number}, which {line}"), None
        else:
            yield line["cut_id"], _recording(line["recording"]) if "recording" in line else None, None


def _recording(value: object) -> Recording | BadLineError:
    """Build a recording from its JSON or from the decoded JSON."""
    line = parse(value) if isinstance(value, bytes) else value
    if isinstance(line, BadLineError):
        return line
    if not isinstance(line, dict) or "sources" not in line:
        return BadLineError("is not a recording")
    try:
        return deserialize(line).recording
    except BadLineError as error:
        return error
