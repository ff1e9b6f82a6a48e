"""Batches limited by duration: a plan that depends only on seed and epoch, and the dataset that decodes it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples, fastcopy
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastssl.data import transfer
from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, read_waveform
from fastssl.data.corpus import Problem, cut_name
from fastssl.data.labels import LabelTable, Segments
from fastssl.data.noise import NoiseProblem, NoiseRecordings
from fastssl.data.recordings import FrameGrid
from fastssl.data.segments import FrameSegments
from fastssl.data.teacher_frames import TeacherFrames, TeacherTable, checksum, crop_key
from fastssl.data.waveforms import waveform_batch
from fastssl.names import encoded
from fastssl.packing import Packed


@dataclass(frozen=True, eq=False)
class AudioBatch:
    """Waveforms of B utterances with their labels, on the CPU until `.to()`.

    Args:
        waveforms: Packed values (N, 1) float32 at 16 kHz; the layout holds each utterance's length in samples.
        ids: (B,) int64, the `utterance_id` of each cut id; always on the CPU.
        names: B paths for messages; "@12.0s" is appended if the part begins 12 s into its recording.
        update: Optimiser update that the batch belongs to, counted from 0.
        problems: Planned utterances that cannot be used, with the reason, then recordings of noise that cannot be used
            (`NoiseProblem`). If no utterance can be used, B is 0.
        labels: (T,) int64 class of each of the encoder's T frames; None if the dataset reads no labels.
        segments: Segment of each of these T frames; None if the dataset reads no segments.
        noise: Noise to mix into each utterance, (M, 1) in B sequences (of length 0 for utterances without noise); None
            if the dataset reads no noise.
        teacher: A teacher's stored outputs for these utterances; None if the dataset reads none.
        checksums: CRC-32 of the samples of each of the B utterances before normalisation; empty if the dataset computes
            none.
        draws: What a system draws for the batch before it runs (`models.draws.Draws`), a tuple of tensors; None if it
            draws nothing in advance. The data set sets None.
    """

    waveforms: Packed
    ids: Tensor  # (B,)
    names: tuple[str, ...]
    update: int
    problems: tuple[Problem, ...]
    labels: Tensor | None = None  # (T,)
    segments: FrameSegments | None = None
    noise: Packed | None = None  # (M, 1)
    teacher: TeacherFrames | None = None
    checksums: tuple[int, ...] = ()
    draws: Any = None

    @property
    def duration_s(self) -> float:
        """Duration of the audio in the batch, in seconds."""
        return self.waveforms.layout.total / SAMPLE_RATE_HZ

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AudioBatch":
        """Return the batch with its tensors on a device, except `ids`, which the host needs."""
        return self._moved(partial(transfer.to_device, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "AudioBatch":
        """Return the batch with those tensors in page-locked memory; PyTorch's data loader calls this.

        They share one buffer there, so that `to` needs one copy.
        """
        return self._moved(transfer.pin_memory)

    def _moved(self, move: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> "AudioBatch":
        names = ("waveforms", "labels", "segments", "noise", "teacher", "draws")
        parts = move(tuple(getattr(self, name) for name in names))
        return replace(self, **dict(zip(names, parts, strict=True)))


@dataclass(frozen=True)
class BatchSpec:
    """The plan of one micro-batch: which cuts to decode and how to crop them.

    Args:
        update: Optimiser update that the micro-batch belongs to, counted from 0.
        cuts: Utterances to decode, not yet cropped.
        crop_s: Length of the crops in seconds; None keeps whole utterances.
        seed: Seed of the crops; each crop's start depends on this, on `update` and on the cut's id.
        fixed_crops: Whether to give a cut the same crop in every update.
    """

    update: int
    cuts: tuple[Cut, ...]
    crop_s: float | None
    seed: int
    fixed_crops: bool = False

    @property
    def duration_s(self) -> float:
        """Duration of the audio in the micro-batch after cropping, in seconds."""
        return float(sum(cropped_length(cut, self.crop_s) for cut in self.cuts) / SAMPLE_RATE_HZ)


def utterance_id(name: str) -> int:
    """Hash an utterance's id to an int64 that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(encoded(name), digest_size=8).digest(), "little", signed=True)


def cropped_length(cut: Cut, crop_s: float | None) -> int:
    """Return the length of a cut in samples at 16 kHz, after cropping to at most `crop_s` seconds (None: no crop)."""
    duration = cut.duration if crop_s is None else min(cut.duration, crop_s)
    return int(compute_num_samples(duration, SAMPLE_RATE_HZ))


def crop(cut: Cut, *, crop_s: float | None, seed: int, update: int) -> Cut:
    """Choose the part of a cut that one update uses; its start depends only on (seed, update, cut id).

    Args:
        cut: The utterance.
        crop_s: Length of the crop in seconds. The cut stays whole if this is None or not below its duration.
        seed: Seed of the run.
        update: Optimiser update, counted from 0.
    """
    rate = cut.recording.sampling_rate
    if crop_s is None or cut.duration <= crop_s:
        return cut
    first, total = compute_num_samples(cut.start, rate), compute_num_samples(cut.duration, rate)
    spare = total - compute_num_samples(crop_s, rate)
    start = first + _hash(f"crop/{seed}/{update}/{cut.id}") % (spare + 1)
    return fastcopy(cut, start=start / rate, duration=crop_s, supervisions=[])


class UpdateSampler(Sampler[BatchSpec]):
    """Yield an endless sequence of micro-batch plans, each with its update; read only metadata, no audio.

    Micro-batch m, counted over all epochs, belongs to update m // (world_size * accumulation) and goes to rank
    m % world_size. The plan of an epoch is a function of the seed, the epoch, the cuts, `max_duration_s`, `crop_s`,
    `max_utterances` and `num_buckets`. All ranks and accumulation steps therefore share the same micro-batches, an
    epoch may end in the middle of an update, and no rank runs out of data before the others.

    An epoch draws each cut once, except windows of long recordings: a window is drawn once per `crop_s` of its length
    (with ids `...#1`, `...#2` from the second draw on), so that long recordings count by duration. Cuts of similar
    length after cropping are batched together, in a new order every epoch. If an update contains the same draw twice
    (where two epochs meet, or in a corpus smaller than an update), both have the same crop.

    Lhotse's DynamicBucketingSampler is not suitable: its duration limit counts padding, it leaves a partial batch in
    every bucket at the end of an epoch (or drops it, with `sync_buckets=False`), and it resumes by drawing every
    earlier batch again.

    Args:
        cuts: Utterances from `open_corpus`. They are read once, and the plan depends on their order.
        max_duration_s: Limit on the audio in one micro-batch, in seconds after cropping; a longer utterance gets its
            own micro-batch.
        crop_s: Length of the random crops in seconds; None keeps whole utterances.
        seed: Seed of the run.
        rank: Index of this process, from 0 to `world_size` - 1.
        world_size: Number of processes.
        accumulation: Number of micro-batches that each process contributes to an update.
        max_utterances: Largest number of utterances in one micro-batch; None sets no limit.
        consumed: Number of micro-batches of this process to skip when resuming.
        fixed_crops: Whether to give a cut the same crop in every update.
        num_buckets: Largest number of groups of similar length; a small corpus gets fewer, so that each group fills
            several batches.

    Raises:
        ValueError: `cuts` is empty, or a number is out of range.
    """

    def __init__(
        self,
        cuts: Iterable[Cut],
        *,
        max_duration_s: float,
        crop_s: float | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        max_utterances: int | None = None,
        consumed: int = 0,
        fixed_crops: bool = False,
        num_buckets: int = 30,
    ) -> None:
        self.cuts = list(cuts)
        _check_durations(self.cuts, max_duration_s, crop_s)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: must be from 0 to {world_size - 1}, got {rank}")
        if accumulation < 1 or consumed < 0 or num_buckets < 1:
            numbers = f"{accumulation}, {consumed} and {num_buckets}"
            raise ValueError(f"accumulation, consumed and num_buckets: must be at least 1, 0 and 1, got {numbers}")
        if max_utterances is not None and max_utterances < 1:
            raise ValueError(f"max_utterances: must be at least 1, or None for no limit, got {max_utterances}")
        self.max_utterances, self.fixed_crops = max_utterances, fixed_crops
        self.crop_s, self.seed, self.rank, self.world_size = crop_s, seed, rank, world_size
        self.accumulation, self.consumed = accumulation, consumed
        self._budget = compute_num_samples(max_duration_s, SAMPLE_RATE_HZ)
        draws = [(index, copy) for index, cut in enumerate(self.cuts) for copy in range(_draws(cut, crop_s))]
        # (draws, 2): index of the cut, and the number of this draw among the cut's draws, from 0.
        self._draws: NDArray[np.int64] = np.array(draws, dtype=np.int64)
        lengths = np.array([cropped_length(cut, crop_s) for cut in self.cuts], dtype=np.int64)
        self._lengths = lengths[self._draws[:, 0]]
        # A group must fill several batches, otherwise the same utterances would share a batch in every epoch.
        batches = int(self._lengths.sum()) / self._budget
        if max_utterances is not None:
            batches = max(batches, len(self._lengths) / max_utterances)
        enough = int(batches / 4)
        self._buckets = _buckets(self._lengths, max(1, min(num_buckets, enough)))

    def __iter__(self) -> Iterator[BatchSpec]:
        number = self.rank + self.world_size * self.consumed
        epoch, first = 0, 0
        while True:
            plan = self._plan(epoch)
            while number < first + len(plan):
                update = number // (self.world_size * self.accumulation)
                cuts = tuple(self._drawn(draw) for draw in plan[number - first])
                yield BatchSpec(update, cuts, self.crop_s, self.seed, self.fixed_crops)
                number += self.world_size
            epoch, first = epoch + 1, first + len(plan)

    def drawn_cuts(self) -> list[Cut]:
        """Return the cuts that one epoch draws, with the ids of the draws."""
        return [self._drawn(draw) for draw in range(len(self._draws))]

    def _drawn(self, draw: int) -> Cut:
        index, copy = self._draws[draw]
        cut = self.cuts[index]
        return fastcopy(cut, id=f"{cut.id}#{copy}") if copy else cut

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the micro-batches of an epoch, each as an array of indices into `_draws`."""
        random = np.random.default_rng(_hash(f"epoch/{self.seed}/{epoch}"))
        order = random.permutation(len(self._lengths))
        order = order[np.argsort(self._buckets[order], kind="stable")]
        batches = _fill(order, self._lengths[order], self._budget, most=self.max_utterances)
        return [batches[index] for index in random.permutation(len(batches))]


def fixed_batches(cuts: Iterable[Cut], *, max_duration_s: float, crop_s: float | None, seed: int) -> list[BatchSpec]:
    """Plan micro-batches for validation: every cut once, ordered by length, with a crop that never changes.

    Args:
        cuts: Utterances to validate on; the plan does not depend on their order.
        max_duration_s: Limit on the audio in one micro-batch, in seconds after cropping; a longer utterance gets its
            own micro-batch.
        crop_s: Length of the crops in seconds; None keeps whole utterances.
        seed: Seed of the crops; a crop's start depends only on this and on the cut's id.

    Raises:
        ValueError: `cuts` is empty, or a number is out of range.
    """
    ordered = sorted(cuts, key=lambda cut: (cropped_length(cut, crop_s), cut.id))
    _check_durations(ordered, max_duration_s, crop_s)
    lengths = np.array([cropped_length(cut, crop_s) for cut in ordered], dtype=np.int64)
    batches = _fill(np.arange(len(ordered)), lengths, compute_num_samples(max_duration_s, SAMPLE_RATE_HZ))
    return [BatchSpec(0, tuple(ordered[index] for index in batch), crop_s, seed) for batch in batches]


@dataclass(frozen=True)
class FrameLabels:
    """Labels of a corpus, looked up for the frames of an encoder.

    Args:
        table: Labels of the corpus, at their own frame rate.
        grid: Positions of the encoder's frames.
    """

    table: LabelTable
    grid: FrameGrid

    def of(self, cut: Cut, start_s: float, length: int) -> NDArray[np.int64]:
        """Return the labels (frames,) of part of a cut: `length` samples at 16 kHz, from `start_s` in its recording."""
        return self.table.at(cut, start_s=start_s, frames=self.grid.count(length), grid=self.grid)

    def segments_of(self, cut: Cut, start_s: float, length: int) -> Segments:
        """Return the segments (frames,) of part of a cut; arguments as in `of`."""
        return self.table.segments_at(cut, start_s=start_s, frames=self.grid.count(length), grid=self.grid)


class WaveformDataset(Dataset[AudioBatch]):
    """Decode each `BatchSpec` in a data loader worker: `DataLoader(dataset, sampler=sampler, batch_size=None)`.

    Args:
        normalize: Whether to scale each crop to zero mean and unit variance, as Transformers'
            `Wav2Vec2FeatureExtractor` does.
        channel: Channel to read from recordings with several; None averages them.
        labels: Labels to return for the encoder's frames; None returns none.
        segments: Labels whose runs of equal classes are the segments to return; None returns none.
        noise: Recordings of noise to draw from; None returns no noise.
        teacher: Stored outputs of a teacher to return; requires fixed crops. None returns none.
        held_out: Whether the crops are held out, which decides their keys in `teacher`.
        checksums: Whether to compute `AudioBatch.checksums`.
    """

    def __init__(
        self,
        *,
        normalize: bool,
        channel: int | None = None,
        labels: FrameLabels | None = None,
        segments: FrameLabels | None = None,
        noise: NoiseRecordings | None = None,
        teacher: TeacherTable | None = None,
        held_out: bool = False,
        checksums: bool = False,
    ) -> None:
        self.normalize, self.channel, self.labels, self.segments = normalize, channel, labels, segments
        self.noise, self.teacher, self.held_out, self.checksums = noise, teacher, held_out, checksums

    def __getitem__(self, spec: BatchSpec) -> AudioBatch:
        """Decode a micro-batch; an utterance that cannot be used is listed in `problems` and raises no exception."""
        read = [self._read(cut, spec) for cut in spec.cuts]
        problems = tuple(item for item in read if isinstance(item, Problem))
        waveforms = [item for item in read if not isinstance(item, Problem)]
        used = [cut for cut, item in zip(spec.cuts, read, strict=True) if not isinstance(item, Problem)]
        ids = torch.tensor([utterance_id(cut.id) for cut in used], dtype=torch.int64, device="cpu")
        names = tuple(cut_name(cut) for cut in used)
        parts = [
            (cut, float(_part(cut, spec).start), len(waveform)) for cut, waveform in zip(used, waveforms, strict=True)
        ]
        labels = segments = None
        if self.labels is not None:
            found = [self.labels.of(*part) for part in parts]
            labels = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *found]))
        if self.segments is not None:
            lain_in = [self.segments.segments_of(*part) for part in parts]
            segments = FrameSegments(
                torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(part.weights for part in lain_in)])),
                torch.from_numpy(np.concatenate([np.empty(0, np.bool_), *(part.ends for part in lain_in)])),
            )
        noise: Packed | None = None
        unread: tuple[NoiseProblem, ...] = ()
        if self.noise is not None:
            noise, unread = self.noise.read([cut.id for cut in used], seed=spec.seed, update=spec.update)
        teacher = None if self.teacher is None else self.teacher.of([self._key(cut) for cut in used])
        batch = waveform_batch(waveforms, normalize=self.normalize)
        checksums = tuple(map(checksum, waveforms)) if self.checksums else ()
        return AudioBatch(
            batch, ids, names, spec.update, problems + unread, labels, segments, noise, teacher, checksums
        )

    def _read(self, cut: Cut, spec: BatchSpec) -> NDArray[np.float32] | Problem:
        try:
            waveform = read_waveform(_part(cut, spec), channel=self.channel)
            if self.teacher is not None:
                self.teacher.check_samples(self._key(cut), waveform)
            return waveform
        except AudioError as error:
            return Problem(cut_name(cut), str(error))

    def _key(self, cut: Cut) -> str:
        return crop_key(cut.id, held_out=self.held_out)


def _part(cut: Cut, spec: BatchSpec) -> Cut:
    return crop(cut, crop_s=spec.crop_s, seed=spec.seed, update=0 if spec.fixed_crops else spec.update)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(encoded(key), digest_size=8).digest(), "little")


def _check_durations(cuts: Sequence[Cut], max_duration_s: float, crop_s: float | None) -> None:
    if not cuts:
        raise ValueError("cuts: expected at least one utterance, got none")
    if not max_duration_s > 0:
        raise ValueError(f"max_duration_s: must be positive, got {max_duration_s}")
    if crop_s is not None and not crop_s > 0:
        raise ValueError(f"crop_s: must be positive, or None for whole utterances, got {crop_s}")


def _draws(cut: Cut, crop_s: float | None) -> int:
    """Return how many times an epoch draws a cut."""
    if crop_s is None or "window_of" not in (cut.custom or {}):
        return 1
    return max(1, round(float(cut.duration) / crop_s))


def _buckets(lengths: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Return the group (n,) of each length; groups have about equal totals, and equal lengths share a group."""
    ordered = np.sort(lengths)
    totals = np.cumsum(ordered)
    edges = ordered[np.searchsorted(totals, totals[-1] * np.arange(1, number) / number)]
    return np.searchsorted(np.unique(edges), lengths, side="left").astype(np.int64)


def _fill(
    order: NDArray[np.int64], lengths: NDArray[np.int64], budget: int, *, most: int | None = None
) -> list[NDArray[np.int64]]:
    """Split `order` into batches of at most `budget` samples and `most` elements; a longer element is a batch alone."""
    totals = np.cumsum(lengths)
    batches, start = [], 0
    while start < len(order):
        limit = totals[start] - lengths[start] + budget
        stop = max(start + 1, int(np.searchsorted(totals, limit, side="right")))
        if most is not None:
            stop = min(stop, start + most)
        batches.append(order[start:stop])
        start = stop
    return batches
