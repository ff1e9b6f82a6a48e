"""Labels of frames, from which HuBERT and sequence compression learn: a table beside the audio, which Lhotse reads.

A folder of labels holds

- `labels.jsonl`: a Lhotse supervision per recording (`SupervisionSet.from_file` reads it), whose field `labels` is a
  list of classes, one every `frame_shift` seconds, the first of the frame around `first_centre` seconds;
- `settings.json`: what the labels were made from, and how;
- `kmeans.safetensors`: the `centres` (classes, width) that frames were assigned to.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lhotse import SupervisionSegment
from lhotse.cut import Cut
from numpy.typing import NDArray

from fastssl.data.audio import SAMPLE_RATE_HZ
from fastssl.data.corpus import Problem, cut_name, window_parent
from fastssl.data.recordings import FrameGrid

LABELS_FILE, SETTINGS_FILE, CENTRES_FILE = "labels.jsonl", "settings.json", "kmeans.safetensors"
#: Audio may end so much earlier or later than when it was labelled: headers are not exact (MP3).
_TOLERANCE_S = 0.1


@dataclass(frozen=True)
class _Entry:
    begin: int  # in the labels of all
    end: int
    duration_s: float
    rate_hz: int


class Segments(NamedTuple):
    """The segments that frames lie in: runs of equal labels."""

    weights: NDArray[np.float32]  # (frames,), of a segment's frames adding up to 1 over the whole of it
    ends: NDArray[np.bool_]  # (frames,), whether the next frame lies in another segment


class LabelTable:
    """The labels of a corpus, in memory (2 bytes a label where there are at most 32,767 classes).

    Args:
        folder: Written by `fastssl label`.

    Raises:
        ValueError: The folder holds no labels, or they are damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self.classes = int(self.settings["clusters"])
        self.frame_shift_s = float(self.settings["frame_shift_s"])
        self.first_centre_s = float(self.settings["first_centre_s"])
        kind = np.int16 if self.classes <= np.iinfo(np.int16).max else np.int32
        self._entries: dict[str, _Entry] = {}
        parts, begin = [], 0
        for line in read_lines(self.folder / LABELS_FILE):
            labels: NDArray[Any] = np.array(line["custom"]["labels"])
            if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
                raise ValueError(
                    f"{self.folder / LABELS_FILE}: {line['id']} has labels from {labels.min()} to {labels.max()}, "
                    f"where there are {self.classes} classes"
                )
            rate_hz = int(line["custom"]["sampling_rate"])
            self._entries[line["id"]] = _Entry(begin, begin + len(labels), float(line["duration"]), rate_hz)
            parts.append(labels.astype(kind))
            begin += len(labels)
        self._labels = np.concatenate(parts) if parts else np.empty(0, kind)
        #: Where in the labels of all each segment ends; none goes on from one recording into the next.
        self._segment_ends: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def problem(self, cut: Cut) -> Problem | None:
        """What is wrong with the labels of a cut, or of the recording that it is a window of; None where they fit."""
        key, _, duration_s = labelled_part(cut)
        entry = self._entries.get(key)
        if entry is None:
            return Problem(cut_name(cut), f"has no labels in {self.folder}")
        if entry.rate_hz != cut.recording.sampling_rate:
            return Problem(
                cut_name(cut), f"was labelled at {entry.rate_hz} Hz and is at {cut.recording.sampling_rate} Hz now"
            )
        if abs(entry.duration_s - duration_s) > _TOLERANCE_S:
            return Problem(cut_name(cut), f"has labels for {entry.duration_s:.2f} s and is {duration_s:.2f} s long")
        found, expected = entry.end - entry.begin, entry.duration_s / self.frame_shift_s
        # Within the tolerance, less what the windows at the ends lack.
        if found == 0 or abs(found - expected) > 2 + _TOLERANCE_S / self.frame_shift_s:
            return Problem(
                cut_name(cut),
                f"has {found} labels, where {entry.duration_s:.2f} s at one every {1000 * self.frame_shift_s:g} ms "
                f"make {expected:.0f}",
            )
        return None

    def at(self, cut: Cut, *, start_s: float, frames: int, grid: FrameGrid) -> NDArray[np.int64]:  # (frames,)
        """The label nearest to the centre of each frame of a part of a cut.

        Args:
            cut: As `open_corpus` gave it; one without `problem`.
            start_s: Where the part begins in the recording of the cut.
            frames: How many there are.
            grid: Where they lie.
        """
        entry, nearest = self._nearest(cut, start_s, frames, grid)
        return self._labels[np.clip(nearest, entry.begin, entry.end - 1)].astype(np.int64)

    def segments_at(self, cut: Cut, *, start_s: float, frames: int, grid: FrameGrid) -> Segments:
        """The segment around each frame of a part of a cut; what the part cuts off still counts in its length.

        Arguments as in `at`.
        """
        # And what follows the last.
        entry, nearest = self._nearest(cut, start_s, frames + 1, grid)
        rows = np.clip(nearest, entry.begin, entry.end - 1)
        if self._segment_ends is None:
            changes = np.flatnonzero(np.diff(self._labels)) + 1
            borders = np.array([entry.end for entry in self._entries.values()], dtype=np.int64)
            self._segment_ends = np.union1d(changes, borders)
        ends = self._segment_ends
        segment = np.searchsorted(ends, rows, side="right")
        lengths = ends[segment] - np.where(segment > 0, ends[segment - 1], 0)
        shift_s = grid.stride / SAMPLE_RATE_HZ
        weights = np.minimum(1.0, shift_s / self.frame_shift_s / lengths[:-1]).astype(np.float32)
        last = (nearest[:-1] < entry.end) & (nearest[1:] >= entry.end)
        return Segments(weights, (np.diff(segment) > 0) | last)

    def _nearest(self, cut: Cut, start_s: float, frames: int, grid: FrameGrid) -> tuple[_Entry, NDArray[np.int64]]:
        """The recording's entry, and where in the labels of all those of the frames (frames,) are, or would be."""
        key, origin_s, _ = labelled_part(cut)
        entry = self._entries[key]
        centres_s = start_s - origin_s + (grid.receptive_field / 2 + grid.stride * np.arange(frames)) / SAMPLE_RATE_HZ
        nearest = np.rint((centres_s - self.first_centre_s) / self.frame_shift_s).astype(np.int64)
        return entry, entry.begin + nearest


def labelled_part(cut: Cut) -> tuple[str, float, float]:
    """Under which id a cut is labelled, and where that part of the recording begins and how long it is, in seconds.

    Windows share the labels of the cut that they are windows of, so that the length of windows is free to change.
    """
    parent = window_parent(cut)
    if parent is None:
        return cut.id, cut.start, cut.duration
    return parent["id"], parent["start"], parent["duration"]


def read_settings(folder: Path) -> dict[str, Any]:
    """What the labels of a folder were made from, and how.

    Raises:
        ValueError: The folder holds no labels, or its settings are damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file() or not (folder / LABELS_FILE).is_file():
        raise ValueError(f"{folder}: no labels there; looked for {path} and {LABELS_FILE}. `fastssl label` makes them")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        settings = None
    numbers = ("clusters", "frame_shift_s", "first_centre_s")
    if not isinstance(settings, dict) or not all(_is_positive(settings.get(name)) for name in numbers):
        raise ValueError(f"{path}: is damaged; it does not say {', '.join(numbers)}")
    return settings


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The supervisions of a file, but for a last line that a kill cut short.

    Raises:
        ValueError: A line is damaged.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if not _is_labelled(values):
                raise ValueError(f"{path}: line {number} is no supervision with labels")
            yield values


def _is_labelled(values: Any) -> bool:
    custom = values.get("custom") if isinstance(values, dict) else None
    if not isinstance(custom, dict) or not isinstance(values.get("id"), str):
        return False
    labels = custom.get("labels")
    numbers = _is_positive(values.get("duration")) and _is_positive(custom.get("sampling_rate"))
    return numbers and isinstance(labels, list) and set(map(type, labels)) <= {int}


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def as_line(cut: Cut, labels: Iterable[int], *, frame_shift_s: float, first_centre_s: float) -> str:
    """A line of `labels.jsonl`.

    Args:
        cut: What is labelled; not a window.
        labels: Classes of its frames.
        frame_shift_s: Seconds from one to the next.
        first_centre_s: The middle of the first frame.
    """
    custom: Mapping[str, Any] = {
        "labels": [int(label) for label in labels],
        "frame_shift": frame_shift_s,
        "first_centre": first_centre_s,
        "sampling_rate": cut.recording.sampling_rate,
    }
    supervision = SupervisionSegment(
        id=cut.id,
        recording_id=cut.recording.id,
        start=cut.start,
        duration=cut.duration,
        channel=cut.channel,
        custom=dict(custom),
    )
    return json.dumps(supervision.to_dict(), separators=(",", ":")) + "\n"
