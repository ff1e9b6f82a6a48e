"""What a teacher makes of crops that never change, kept on disk, so that it runs once over each.

The folder holds safetensors shards, `index.jsonl` with a line for each crop (`key`, `shard`, `file`, `duration_s`,
`rate_hz`, `checksum`, `frames`), and `settings.json`, which says of which teacher, layers and crops. In a shard are, of
each crop, the tensors `KEY/LAYER` (frames, width) and, where they are kept, `KEY/front_end` (frames, channels), all
fp16.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
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

FRONT_END = "front_end"


class TeacherFrames(NamedTuple):
    """What a teacher made of the T frames of a batch."""

    layers: tuple[Tensor, ...]  # each (T, D)
    front_end: Tensor | None  # (T, C), before its norm

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherFrames":
        """The same on another device."""
        return self._with_each(lambda frames: frames.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TeacherFrames":
        """The same in page-locked memory."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, move: Callable[[Tensor], Tensor]) -> "TeacherFrames":
        return TeacherFrames(tuple(map(move, self.layers)), None if self.front_end is None else move(self.front_end))


class TeacherTable:
    """Crops of a folder, read one by one.

    Args:
        folder: Of shards.
        entries: Lines of its index, by key.
        layers: To read.
        width: D.
        channels: C of the front end, to be read too; None where it is not kept.
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

    def check(self, key: str, cut: Cut) -> None:
        """Whether a cut has the length and the sampling rate that it had when its frames were made.

        Raises:
            ValueError: It has not; names the file.
        """
        entry = self.entries[key]
        if (entry["duration_s"], entry["rate_hz"]) != (cut.duration, cut.recording.sampling_rate):
            raise ValueError(
                f"data.teacher_cache: {self.folder} is stale: {cut_name(cut)} was {entry['duration_s']:g} s at "
                f"{entry['rate_hz']} Hz, and is {cut.duration:g} s at {cut.recording.sampling_rate} Hz"
            )

    def check_shards(self) -> None:
        """Open all shards.

        Raises:
            ValueError: One is damaged; names it.
        """
        for shard in sorted({entry["shard"] for entry in self.entries.values()}):
            _opened(self.folder / shard)

    def check_samples(self, key: str, waveform: NDArray[np.float32]) -> None:
        """Whether a crop has the samples that it had when its frames were made.

        Raises:
            AudioError: It has not.
        """
        if self.entries[key]["checksum"] != checksum(waveform):
            raise AudioError(f"has other samples than when data.teacher_cache was made; {self.folder} is stale")

    def of(self, keys: Sequence[str]) -> TeacherFrames:
        """The frames of these crops, back to back."""

        def read(name: str, width: int) -> Tensor:
            parts = [_opened(self.folder / self.entries[key]["shard"]).get_tensor(f"{key}/{name}") for key in keys]
            return torch.cat([torch.empty(0, width, dtype=torch.float16), *parts])

        layers = tuple(read(str(layer), self.width) for layer in self.layers)
        return TeacherFrames(layers, None if self.channels is None else read(FRONT_END, self.channels))


def checksum(waveform: NDArray[np.float32]) -> int:
    """CRC-32 of the samples."""
    return zlib.crc32(np.ascontiguousarray(waveform).data)


@lru_cache(maxsize=64)
def _opened(shard: Path) -> Any:
    """Mapped into memory, once in each process."""
    try:
        return safe_open(shard, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"data.teacher_cache: {shard}: cannot be read: {error}") from error
