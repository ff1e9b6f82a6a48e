"""Frame labels for HuBERT and sequence compression, stored in a separate folder that Lhotse can read.

A folder of labels contains

- `labels.jsonl`: one Lhotse supervision per recording (`SupervisionSet.from_file` reads it). Its custom field `labels`
  is a list of classes, one every `frame_shift` seconds; the first frame is centred at `first_centre` seconds;
- `settings.json`: the features and settings that produced the labels;
- `kmeans.safetensors`: the tensor `centres` (classes, width) of the k-means that assigned the classes.
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
from fastssl.data.rules import OLDEST_RULES, rules_of
from fastssl.names import shown
from fastssl.reading import brief, complete_lines, read_json

LABELS_FILE, SETTINGS_FILE, CENTRES_FILE = "labels.jsonl", "settings.json", "kmeans.safetensors"
#: A recording's duration may differ by this much from when it was labelled, because MP3 headers are not exact.
_TOLERANCE_S = 0.1
_MOST_CLASSES = np.iinfo(np.int32).max


@dataclass(frozen=True)
class _Entry:
    begin: int  # first index in the concatenated labels of all recordings
    end: int  # one after the last
    duration_s: float
    rate_hz: int


class Segments(NamedTuple):
    """The segment (run of equal labels) of each frame; the weights of a whole segment's frames sum to about 1."""

    weights: NDArray[np.float32]  # (frames,): frame shift / duration of the segment, at most 1
    ends: NDArray[np.bool_]  # (frames,): True at the last frame of each segment


class LabelTable:
    """The labels of a corpus, kept in memory: 2 bytes per label for at most 32,767 classes, otherwise 4.

    Args:
        folder: Folder that `fastssl label` wrote.

    Raises:
        ValueError: The folder contains no labels, or a file in it is damaged.
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
                    f"{self.folder / LABELS_FILE}: {shown(line['id'])} has labels from {brief(int(labels.min()))} to "
                    f"{brief(int(labels.max()))}, expected {self.classes} classes from 0 on; make the labels again "
                    "with `fastssl label`"
                )
            rate_hz = int(line["custom"]["sampling_rate"])
            self._entries[line["id"]] = _Entry(begin, begin + len(labels), float(line["duration"]), rate_hz)
            parts.append(labels.astype(kind))
            begin += len(labels)
        self._labels = np.concatenate(parts) if parts else np.empty(0, kind)
        #: Index after the last label of each segment, in the concatenated labels; segments end with their recording.
        self._segment_ends: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def problem(self, cut: Cut) -> Problem | None:
        """Check that a cut, or the recording that it is a window of, has labels that fit its audio.

        Args:
            cut: A cut from `open_corpus`.

        Returns:
            None if the labels fit. Otherwise what is wrong: it has no labels, its sampling rate or duration has changed
            since it was labelled, it was labelled by rules that averaged its channels although they cancel, or the
            number of labels does not match its duration.
        """
        key, _, duration_s = labelled_part(cut)
        entry = self._entries.get(key)
        if entry is None:
            return Problem(cut_name(cut), f"has no labels in {self.folder}")
        if entry.rate_hz != cut.recording.sampling_rate:
            return Problem(
                cut_name(cut), f"was labelled at {entry.rate_hz} Hz, but is at {cut.recording.sampling_rate} Hz now"
            )
        mixed = self.settings["rules"] < 2 and self.settings.get("channel") is None
        if mixed and rules_of(cut) >= 2 and "only_channel" in cut.custom:
            return Problem(
                cut_name(cut), "was labelled from the mean of its channels, which cancel; make the labels again"
            )
        if abs(entry.duration_s - duration_s) > _TOLERANCE_S:
            return Problem(cut_name(cut), f"has labels for {entry.duration_s:.2f} s, but is {duration_s:.2f} s long")
        found, expected = entry.end - entry.begin, entry.duration_s / self.frame_shift_s
        # Besides the tolerance, up to two frames may be missing at the ends, where no whole window fits.
        if found == 0 or abs(found - expected) > 2 + _TOLERANCE_S / self.frame_shift_s:
            return Problem(
                cut_name(cut),
                f"has {found} labels, but {entry.duration_s:.2f} s with a label every "
                f"{1000 * self.frame_shift_s:g} ms require {expected:.0f}",
            )
        last_s = self.first_centre_s + (found - 1) * self.frame_shift_s
        if last_s > entry.duration_s + _TOLERANCE_S:
            return Problem(
                cut_name(cut),
                f"has labels up to {last_s:.2f} s by {SETTINGS_FILE}, but is {entry.duration_s:.2f} s long",
            )
        return None

    def at(self, cut: Cut, *, start_s: float, frames: int, grid: FrameGrid) -> NDArray[np.int64]:  # (frames,)
        """Return the label nearest to the centre of each frame of part of a cut.

        Args:
            cut: A cut from `open_corpus` for which `problem` returns None.
            start_s: Where the part begins in the cut's recording, in seconds.
            frames: Number of encoder frames in the part.
            grid: Positions of the encoder's frames.

        Returns:
            (frames,) int64. A frame beyond the first or last label gets that label.

        Raises:
            KeyError: The cut has no labels.
        """
        entry, nearest = self._nearest(cut, start_s, frames, grid)
        return self._labels[np.clip(nearest, entry.begin, entry.end - 1)].astype(np.int64)

    def segments_at(self, cut: Cut, *, start_s: float, frames: int, grid: FrameGrid) -> Segments:
        """Return the segment of each frame of part of a cut; arguments and errors as in `at`.

        A segment that reaches beyond the part keeps its whole length, so the weights of its frames then sum to less
        than 1.
        """
        # Read one frame more, to see whether a segment ends with the last frame.
        entry, nearest = self._nearest(cut, start_s, frames + 1, grid)
        rows = np.clip(nearest, entry.begin, entry.end - 1)
        if self._segment_ends is None:
            changes = np.flatnonzero(np.diff(self._labels)) + 1
            borders = np.array([end for entry in self._entries.values() for end in (entry.begin, entry.end)], np.int64)
            self._segment_ends = np.union1d(changes, borders)
        ends = self._segment_ends
        segment = np.searchsorted(ends, rows, side="right")
        lengths = ends[segment] - np.where(segment > 0, ends[segment - 1], 0)
        shift_s = grid.stride / SAMPLE_RATE_HZ
        weights = np.minimum(1.0, shift_s / self.frame_shift_s / lengths[:-1]).astype(np.float32)
        last = (nearest[:-1] < entry.end) & (nearest[1:] >= entry.end)
        return Segments(weights, (np.diff(segment) > 0) | last)

    def _nearest(self, cut: Cut, start_s: float, frames: int, grid: FrameGrid) -> tuple[_Entry, NDArray[np.int64]]:
        """Return the recording's entry, and each frame's nearest label as an index (frames,) into all labels.

        The indices are not clipped to the recording.
        """
        key, origin_s, _ = labelled_part(cut)
        entry = self._entries[key]
        centres_s = start_s - origin_s + (grid.receptive_field / 2 + grid.stride * np.arange(frames)) / SAMPLE_RATE_HZ
        nearest = np.rint((centres_s - self.first_centre_s) / self.frame_shift_s).astype(np.int64)
        return entry, entry.begin + nearest


def labelled_part(cut: Cut) -> tuple[str, float, float]:
    """Return the id under which a cut is labelled, and the start and duration (s) of the part that has this id.

    Windows share the labels of the cut that they are windows of, so the window length may change after labelling.
    """
    parent = window_parent(cut)
    if parent is None:
        return cut.id, cut.start, cut.duration
    return parent["id"], parent["start"], parent["duration"]


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `settings.json` of a folder of labels: the features and settings that produced the labels.

    Args:
        folder: Folder that `fastssl label` wrote.

    Returns:
        The settings; they always include `clusters`, `frame_shift_s` and `first_centre_s`, as positive numbers, and the
        version of the rules, `rules`.

    Raises:
        ValueError: The folder contains no labels, or its settings are damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file() or not (folder / LABELS_FILE).is_file():
        raise ValueError(f"{folder}: no labels there; looked for {path} and {LABELS_FILE}. Make them: `fastssl label`")
    try:
        settings = {"rules": OLDEST_RULES} | read_json(path)
    except ValueError:
        settings = {}
    numbers = ("clusters", "frame_shift_s", "first_centre_s")
    if (
        not all(_is_positive(settings.get(name)) for name in numbers)
        or type(settings["clusters"]) is not int
        or settings["clusters"] > _MOST_CLASSES
        or type(settings["rules"]) is not int
    ):
        raise ValueError(
            f"{path}: is damaged; expected positive numbers for {', '.join(numbers)}, and at most {_MOST_CLASSES:,} "
            "clusters. Make the labels again: "
            "`fastssl label`"
        )
    return settings


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the supervisions of `labels.jsonl`; ignore an unfinished last line, which an interrupted process leaves.

    Args:
        path: Path of `labels.jsonl`; a missing file yields nothing.

    Raises:
        ValueError: A line is not a supervision with labels, a duration and a sampling rate.
    """
    if not path.is_file():
        return
    for number, line in complete_lines(path):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not _is_labelled(values):
            raise ValueError(
                f"{path}: line {number} is not a supervision with labels; delete it and run `fastssl label` again"
            )
        yield values


def _is_labelled(values: Any) -> bool:
    custom = values.get("custom") if isinstance(values, dict) else None
    if not isinstance(custom, dict) or not isinstance(values.get("id"), str):
        return False
    labels = custom.get("labels")
    rate = custom.get("sampling_rate")
    numbers = _is_positive(values.get("duration")) and _is_positive(rate) and isinstance(rate, int)
    return numbers and isinstance(labels, list) and set(map(type, labels)) <= {int}


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e15


def as_line(cut: Cut, labels: Iterable[int], *, frame_shift_s: float, first_centre_s: float) -> str:
    """Format the labels of one cut as a line of `labels.jsonl`, newline included.

    Args:
        cut: Cut that the labels belong to; not a window.
        labels: Class of each frame, in order.
        frame_shift_s: Time from one frame to the next, in seconds.
        first_centre_s: Centre of the first frame, in seconds from the start of the cut.
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
