"""Read a teacher's outputs for fixed crops from disk, so that distillation runs the teacher only once over each crop.

The folder contains safetensors shards, `index.jsonl` with one line per crop (`key`, `shard`, `file`, `duration_s`,
`rate_hz`, `checksum`, `frames`), and `settings.json`, which records the teacher, its layers and the crops. For each
crop a shard contains the tensors `KEY/LAYER` (frames, width) and, if the front end is stored too, `KEY/front_end`
(frames, channels), all fp16. A name that safetensors cannot hold is there as `names.stored` returns it.
"""

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastssl.data.audio import AudioError
from fastssl.data.corpus import cut_name
from fastssl.names import plain_path, shown, stored

FRONT_END = "front_end"
#: First part of the keys of held-out crops, because their ids may also occur in the training data.
HELD_OUT = "held out/"
_TRAINED_ON = "trained on/"


class TeacherFrames(NamedTuple):
    """A teacher's outputs for the T frames of a batch."""

    layers: tuple[Tensor, ...]  # each (T, D)
    front_end: Tensor | None  # (T, C), the output of the convolutions before the layer norm


class TeacherTable:
    """A teacher's stored outputs, read from a folder crop by crop.

    Args:
        folder: Folder with the shards.
        entries: Lines of the folder's `index.jsonl`, by their `key`.
        layers: Layers to read.
        width: Width D of the layers.
        channels: Number of channels C of the front end, which is then read as well; None reads only the layers.

    Raises:
        ValueError: An entry lacks a field or has one of another type.
    """

    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Mapping[str, Any]],
        *,
        layers: Sequence[int],
        width: int,
        channels: int | None,
    ) -> None:
        self.folder, self.entries = folder, dict(entries)
        self.layers, self.width, self.channels = tuple(layers), width, channels
        for key, entry in self.entries.items():
            names = ("duration_s", "rate_hz", "checksum", "frames")
            # No count is as large as 1e15, and a larger integer may not fit into a float; NaN fails the comparison.
            if not all(type(entry.get(name)) in (int, float) and 0 <= entry[name] < 1e15 for name in names):
                raise ValueError(
                    f"data.teacher_cache: {folder}: the entry of {key} in its index is damaged: expected numbers for "
                    f"{', '.join(names)}; delete the folder to make it again"
                )

    def check(self, key: str, cut: Cut) -> None:
        """Check that a cut still has the duration and sampling rate that it had when its frames were stored.

        Args:
            key: Key of the crop in the index.
            cut: The cut as it is now.

        Raises:
            ValueError: The duration or the sampling rate has changed; the message names the file.
        """
        entry = self.entries[key]
        if (entry["duration_s"], entry["rate_hz"]) != (cut.duration, cut.recording.sampling_rate):
            raise ValueError(
                f"data.teacher_cache: {self.folder} is stale: {shown(cut_name(cut))} was {entry['duration_s']:g} s at "
                f"{entry['rate_hz']} Hz, and is {cut.duration:g} s at {cut.recording.sampling_rate} Hz now; "
                "choose another folder, or delete this one"
            )

    def check_samples(self, key: str, waveform: NDArray[np.float32]) -> None:
        """Check that a crop still has the samples that it had when its frames were stored.

        Args:
            key: Key of the crop in the index.
            waveform: (T,) float32 at 16 kHz, before normalisation.

        Raises:
            AudioError: The checksum of the samples has changed.
        """
        if self.entries[key]["checksum"] != checksum(waveform):
            raise AudioError(
                f"has other samples than when data.teacher_cache was made; {self.folder} is stale: delete the folder, "
                "or restore the audio"
            )

    def of(self, keys: Sequence[str]) -> TeacherFrames:
        """Read the frames of several crops and concatenate them in the order of the keys.

        Args:
            keys: Keys of the crops in the index; may be empty.

        Returns:
            fp16 tensors on the CPU: (T, D) for each layer and, if `channels` was given, (T, C) for the front end.

        Raises:
            ValueError: A shard is damaged.
        """

        def read(name: str, width: int) -> Tensor:
            parts = [self._tensor(key, name, width) for key in keys]
            return torch.cat([torch.empty(0, width, dtype=torch.float16, device="cpu"), *parts])

        layers = tuple(read(str(layer), self.width) for layer in self.layers)
        return TeacherFrames(layers, None if self.channels is None else read(FRONT_END, self.channels))

    def _tensor(self, key: str, name: str, width: int) -> Tensor:
        entry = self.entries[key]
        shard = self.folder / entry["shard"]
        try:
            tensor: Tensor = _opened(shard).get_tensor(stored(f"{key}/{name}"))
        except SafetensorError as error:
            raise _damage(shard, str(error)) from error
        if tensor.shape != (entry["frames"], width) or tensor.dtype != torch.float16:
            found, expected = f"{tensor.dtype} {tuple(tensor.shape)}", f"torch.float16 ({entry['frames']}, {width})"
            raise _damage(shard, f"{key}/{name} is {found}, expected {expected}")
        return tensor


def crop_key(crop: str, *, held_out: bool) -> str:
    """Return the key of a crop in the index; all crops of a run have different keys, whatever their folders are called.

    Args:
        crop: Id of the crop.
        held_out: Whether it is a crop of a held-out recording.
    """
    if held_out:
        return HELD_OUT + crop
    return _TRAINED_ON + crop if crop.startswith((HELD_OUT, _TRAINED_ON)) else crop


def checksum(waveform: NDArray[np.float32]) -> int:
    """Return the CRC-32 of the bytes of a waveform (T,) float32."""
    return zlib.crc32(np.ascontiguousarray(waveform).data)


def _damage(shard: Path, problem: str) -> ValueError:
    return ValueError(f"data.teacher_cache: {shard}: cannot be read: {problem}; delete the folder to make it again")


def _opened(shard: Path) -> Any:
    """Map a shard into memory, once per version of the file: to read an old map of a truncated file would be fatal."""
    try:
        status = shard.stat()
    except OSError as error:
        raise _damage(shard, str(error.strerror)) from error
    return _mapped(shard, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _mapped(shard: Path, size: int, changed_ns: int) -> Any:
    try:
        with plain_path(shard) as path:
            return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _damage(shard, str(error)) from error
