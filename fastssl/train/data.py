"""Recordings and data loaders of a run, and a count of the recordings that cannot be used."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from fastssl.data.batches import AudioBatch, BatchSpec, FrameLabels, UpdateSampler, WaveformDataset, fixed_batches
from fastssl.data.corpus import Corpus, Problem, list_some, open_corpus, split_corpus
from fastssl.data.labels import LabelTable
from fastssl.data.noise import NoiseRecordings
from fastssl.data.recordings import FrameGrid
from fastssl.data.teacher_frames import TeacherTable, crop_key
from fastssl.data.workers import end_if_unable_to_send
from fastssl.eval.encode import default_workers
from fastssl.names import encoded
from fastssl.nn.random import utterance_keys
from fastssl.train.account import Account
from fastssl.train.config import DataConfig
from fastssl.train.module import VALIDATION_UPDATE
from fastssl.train.stopping import leave_signals_to_the_parent

#: How labels are used: as classes to predict, or as segments (runs of equal labels).
Use = Literal["labels", "segments"]

_SHORTEST_NOISE_S = 0.1


class Beside(Protocol):
    """Interface of data that a run reads in addition to the audio: labels, or a teacher's frames."""

    def make(self) -> list[Problem]:
        """Make missing data, in one process while the others wait; return problems with recordings that failed."""

    def attach(self, problems: list[Problem]) -> None:
        """Attach the data to this process's data module; `problems` are those that `make` returned."""


class PretrainDataModule(LightningDataModule):
    """Data loaders of a pre-training run.

    The training loader never ends, and its batches depend only on the seed and the position in the sequence of batches.
    A checkpoint saves the number of batches that the model was trained on, because with workers, the sampler runs ahead
    of the model.

    Args:
        audio: Folder of recordings, Lhotse manifest, or shar directory.
        config: How to read the audio and divide it into batches.
        normalize: Scale each waveform to zero mean and unit variance.
        seed: Seed of the order of the recordings and of the crops.
        accumulation: Batches per process and update.
        noise_share: Fraction of the training utterances that a recording of `data.noise` is read for, from 0 to 1.
        draw: Function that makes `AudioBatch.draws` from the layout and keys of a batch, called with `training=` too
            (`PretrainingModel.draw`); None draws nothing.

    Raises:
        ValueError: There are no recordings to train on, too many of them are unusable, or all of them are held out.
    """

    def __init__(
        self,
        audio: str,
        config: DataConfig,
        *,
        normalize: bool,
        seed: int,
        accumulation: int,
        noise_share: float = 0.0,
        draw: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.draw = draw
        # All machines of a run share its folder, so a single process prepares the data.
        self.prepare_data_per_node = False
        self.config, self.normalize, self.seed, self.accumulation = config, normalize, seed, accumulation
        self.train_corpus = self._open(audio)
        self.valid_corpus: Corpus | None = None
        #: Number of cuts of AUDIO that are not trained on, because `data.valid` contains the same recordings.
        self.num_overlapping = 0
        if isinstance(config.valid, str):
            self.valid_corpus = self._open(config.valid)
            self._leave_out_held_out(audio, config.valid)
        elif config.valid > 0:
            self.train_corpus, self.valid_corpus = split_corpus(self.train_corpus, fraction=config.valid, seed=seed)
        if self.valid_corpus is not None and len(self.valid_corpus.cuts) == 0:
            self.valid_corpus = None
        left_out = self.train_corpus.problems + (self.valid_corpus.problems if self.valid_corpus is not None else [])
        self.account = Account(len(self.train_corpus.cuts), config.max_bad_fraction, left_out)
        #: Labels and teacher's frames; missing ones are made before training.
        self.beside: list[Beside] = []
        self._made: list[list[Problem]] = []
        self._failure: Exception | None = None
        self._labels: dict[tuple[Use, str], FrameLabels] = {}
        #: Recordings of noise for the training utterances; None without `data.noise`.
        self.noise: NoiseRecordings | None = None
        if config.noise is not None:
            try:
                recordings = self._open(config.noise, min_duration_s=_SHORTEST_NOISE_S)
            except ValueError as error:
                raise ValueError(f"data.noise: {error}") from None
            self.noise = NoiseRecordings(tuple(recordings.cuts), noise_share, config.channel)
            self.account.left_out += recordings.problems
            self.account.total_noise = len(self.noise.cuts)
        self._teacher: TeacherTable | None = None
        self._consumed = 0
        self._digest = ""

    def prepare_data(self) -> None:
        """Make missing labels or teacher's frames; Lightning calls this in one process."""
        try:
            self._made = [one.make() for one in self.beside]
        except Exception as error:
            # The other processes wait for this one, so the error is raised later, by `setup` in all processes.
            self._failure = error

    def setup(self, stage: str) -> None:
        """Attach labels and teacher's frames in every process; Lightning calls this after `prepare_data`.

        Raises:
            ValueError: The first process could not make them, or too many recordings lack them.
        """
        assert self.trainer is not None
        failure = None if self._failure is None else str(self._failure) or type(self._failure).__name__
        made, failure = self.trainer.strategy.broadcast((self._made, failure))
        if self._failure is not None:
            raise self._failure
        if failure is not None:
            raise ValueError(f"the first process failed: {failure}")
        for one, problems in zip(self.beside, made, strict=True):
            one.attach(problems)

    def attach_labels(
        self, source: Literal["audio", "valid"], table: LabelTable, *, grid: FrameGrid, use: Use = "labels"
    ) -> None:
        """Arrange for labels to be read with the audio; recordings without matching labels go to `account.left_out`.

        Args:
            source: "audio" for labels of AUDIO, including a held-out fraction of it; "valid" for those of `data.valid`.
            table: The labels.
            grid: Length and position of the encoder's frames.
            use: "labels" to put the labels into the batches, or "segments" to put runs of equal labels into them.

        Raises:
            ValueError: Labels are missing for more than `data.max_bad_fraction` of AUDIO, for all training cuts, or for
                all held-out cuts.
        """
        labels = FrameLabels(table, grid)
        train = self.train_corpus if source == "audio" else None
        valid = self.valid_corpus if isinstance(self.config.valid, str) == (source == "valid") else None
        judged = {cut.id: table.problem(cut) for corpus in (train, valid) if corpus is not None for cut in corpus.cuts}
        problems = [problem for problem in judged.values() if problem is not None]
        unfit = {key for key, problem in judged.items() if problem is not None}
        if source == "audio" and len(unfit) > self.config.max_bad_fraction * len(judged):
            allowed = f"more than data.max_bad_fraction={self.config.max_bad_fraction:g} allows"
            raise ValueError(_describe_unfit(use, problems, len(judged), allowed))
        for corpus, part in ((train, "train"), (valid, "valid")):
            if corpus is not None:
                self._labels[use, part] = labels
        self._leave_out(
            problems,
            train=unfit if train is not None else set(),
            valid=unfit if valid is not None else set(),
            emptied=lambda part: _describe_unfit(use, problems, len(judged), f"among them all that are {part}"),
        )

    def _leave_out(
        self, problems: Sequence[Problem], *, train: set[str], valid: set[str], emptied: Callable[[str], str]
    ) -> None:
        """Remove the cuts with these ids; `emptied` gives the error message if no cut of a part remains."""
        self.train_corpus = _without(self.train_corpus, train)
        self.account.total = len(self.train_corpus.cuts)
        if self.valid_corpus is not None:
            self.valid_corpus = _without(self.valid_corpus, valid)
        for part, corpus in (("to train on", self.train_corpus), ("held out", self.valid_corpus)):
            if corpus is not None and len(corpus.cuts) == 0:
                raise ValueError(emptied(part))
        self.account.left_out += problems

    def crops(self) -> list[tuple[str, Cut]]:
        """List the crops of an epoch and the held-out crops, each with the key of its teacher's frames."""
        held_out = [] if self.valid_corpus is None else self.valid_corpus.cuts
        crops = [(crop_key(cut.id, held_out=False), cut) for cut in self._drawn_cuts()]
        return crops + [(crop_key(cut.id, held_out=True), cut) for cut in held_out]

    def _drawn_cuts(self) -> list[Cut]:
        return self._sampler(rank=0, world_size=1, consumed=0).drawn_cuts()

    def batches_of(self, crops: Sequence[Cut]) -> list[BatchSpec]:
        """Plan batches of crops, as for validation; the order of the crops makes no difference."""
        config = self.config
        return fixed_batches(crops, max_duration_s=config.max_duration_s, crop_s=config.crop_s, seed=self.seed)

    def attach_teacher(self, table: TeacherTable, problems: Sequence[Problem]) -> None:
        """Arrange for a teacher's frames to be read with the audio, and leave out recordings without frames.

        Args:
            table: The frames.
            problems: Problems with the recordings that the teacher made no frames for.

        Raises:
            ValueError: Frames are missing for more than `data.max_bad_fraction` of the crops, for all training crops,
                or for all held-out crops.
        """
        crops = self.crops()
        missing = {key for key, _ in crops if key not in table.entries}
        if len(missing) > self.config.max_bad_fraction * len(crops):
            raise ValueError(
                f"data.teacher_cache: the teacher has no frames for {len(missing)} of {len(crops)} crops, more than "
                f"data.max_bad_fraction={self.config.max_bad_fraction:g} allows; repair or remove the recordings, or "
                f"raise the limit:\n{list_some(list(problems))}"
            )
        train = {cut.id for cut in self._drawn_cuts() if crop_key(cut.id, held_out=False) in missing}
        valid = [] if self.valid_corpus is None else self.valid_corpus.cuts
        self._teacher = table
        self._leave_out(
            problems,
            train=train | {crop.rpartition("#")[0] for crop in train},  # left out if any draw of it is
            valid={cut.id for cut in valid if crop_key(cut.id, held_out=True) in missing},
            emptied=lambda part: (
                f"data.teacher_cache: the teacher has no frames for any crop {part}:\n{list_some(list(problems))}"
            ),
        )

    def _open(self, source: str, *, min_duration_s: float | None = None) -> Corpus:
        config = self.config
        if min_duration_s is None:
            min_duration_s = min(config.min_duration_s, config.crop_s or config.min_duration_s)
        return open_corpus(
            source,
            min_duration_s=min_duration_s,
            window_s=config.window_s,
            max_bad_fraction=config.max_bad_fraction,
            rules=config.rules,
        )

    def _leave_out_held_out(self, audio: str, valid: str) -> None:
        """Remove held-out recordings from the training data, by the real paths of their files."""
        assert self.valid_corpus is not None
        held_out = {path for cut in self.valid_corpus.cuts for path in _paths(cut)}
        cuts = [cut for cut in self.train_corpus.cuts if held_out.isdisjoint(_paths(cut))]
        self.num_overlapping = len(self.train_corpus.cuts) - len(cuts)
        if not cuts:
            raise ValueError(
                f"data.valid: {valid} holds out all recordings of {audio}, so nothing is left to train on; hold out "
                "other recordings"
            )
        self.train_corpus = Corpus(CutSet.from_cuts(cuts), self.train_corpus.problems)

    def transfer_batch_to_device(self, batch: AudioBatch, device: torch.device, dataloader_idx: int) -> AudioBatch:
        """Copy a batch to the device without waiting; for a GPU, the batch is in page-locked memory."""
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> DataLoader[AudioBatch]:
        """Return an endless loader of this process's training batches, starting at the run's current position."""
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return self._loader(self._sampler(rank=rank, world_size=world_size, consumed=self._consumed), "train")

    def _sampler(self, *, rank: int, world_size: int, consumed: int) -> UpdateSampler:
        return UpdateSampler(
            self.train_corpus.cuts,
            max_duration_s=self.config.max_duration_s,
            crop_s=self.config.crop_s,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            accumulation=self.accumulation,
            max_utterances=self.config.max_utterances,
            consumed=consumed,
            fixed_crops=self.config.fixed_crops,
        )

    def val_dataloader(self) -> DataLoader[AudioBatch] | list[Any]:
        """Return a loader of this process's share of the held-out batches; an empty list if none are held out.

        All processes get the same number of batches, padded with empty ones if necessary, because wav2vec 2.0's
        diversity loss communicates between processes in every batch.
        """
        assert self.trainer is not None
        if self.valid_corpus is None:
            return []
        config = self.config
        specs = fixed_batches(
            self.valid_corpus.cuts, max_duration_s=config.max_duration_s, crop_s=config.crop_s, seed=self.seed
        )
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        share = specs[rank::world_size]
        share += [BatchSpec(0, (), config.crop_s, self.seed)] * (-(-len(specs) // world_size) - len(share))
        return self._loader(share, "valid")

    def _loader(self, sampler: Any, part: Literal["train", "valid"]) -> DataLoader[AudioBatch]:
        workers = default_workers() if self.config.num_workers is None else self.config.num_workers
        recordings = WaveformDataset(
            normalize=self.normalize,
            channel=self.config.channel,
            labels=self._labels.get(("labels", part)),
            segments=self._labels.get(("segments", part)),
            noise=self.noise if part == "train" else None,
            teacher=self._teacher,
            held_out=part == "valid",
        )
        return DataLoader(
            recordings
            if self.draw is None
            else DrawnDataset(recordings, self.draw, seed=self.seed, held_out=part == "valid"),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_begin_worker,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the counts, as plain values, so that a checkpoint loads without pickle."""
        assert self.trainer is not None
        return {
            "updates": self.trainer.global_step,
            "batches_per_update": self.accumulation * self.trainer.world_size,
            "corpus": self._fingerprint(),
            "draws": self.account.draws,
            "unusable": dict(self.account.unusable),
            "unusable_noise": dict(self.account.unusable_noise),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that the checkpoint's model was trained on.

        Raises:
            ValueError: The recordings or the number of batches per update have changed.
        """
        assert self.trainer is not None
        per_update = self.accumulation * self.trainer.world_size
        if state_dict["batches_per_update"] != per_update:
            raise ValueError(
                f"--resume: the run has {state_dict['batches_per_update']} batches in an update (devices x nodes x "
                f"accumulation), but these settings make {per_update}; choose settings with the same product"
            )
        if state_dict["corpus"] != self._fingerprint():
            raise ValueError(
                "--resume: AUDIO or data.noise no longer has the recordings that the run began with; restore them, or "
                "start a new run with --init"
            )
        self._consumed = state_dict["updates"] * self.accumulation
        self.account.draws = state_dict["draws"]
        self.account.unusable = dict(state_dict["unusable"])
        self.account.unusable_noise = dict(state_dict.get("unusable_noise", {}))

    def _fingerprint(self) -> str:
        """Return a hash of the training and noise recordings, which determine the batches."""
        if not self._digest:
            digest = hashlib.blake2b(digest_size=16)
            for cut in (*self.train_corpus.cuts, *(() if self.noise is None else self.noise.cuts)):
                digest.update(encoded(f"{cut.id} {cut.duration}\n"))
            self._digest = digest.hexdigest()
        return self._digest


class DrawnDataset(Dataset[AudioBatch]):
    """Batches of a data set with `AudioBatch.draws`, so that workers make the random choices of a training step.

    Args:
        recordings: The data set.
        draw: As for `PretrainDataModule`.
        seed: Seed of the run.
        held_out: Whether the batches are scored, not trained on.
    """

    def __init__(self, recordings: WaveformDataset, draw: Callable[..., Any], *, seed: int, held_out: bool) -> None:
        self.recordings, self.draw, self.seed, self.held_out = recordings, draw, seed, held_out

    def __getitem__(self, spec: BatchSpec) -> AudioBatch:
        """Read a batch and draw for it, with the keys that `PretrainModule` derives too."""
        batch = self.recordings[spec]
        keys = utterance_keys(self.seed, VALIDATION_UPDATE if self.held_out else batch.update, batch.ids)
        return replace(batch, draws=self.draw(batch.waveforms.layout, keys, training=not self.held_out))


def _begin_worker(worker: int) -> None:
    leave_signals_to_the_parent(worker)
    end_if_unable_to_send(worker)


def _without(corpus: Corpus, ids: set[str]) -> Corpus:
    return Corpus(CutSet.from_cuts(cut for cut in corpus.cuts if cut.id not in ids), corpus.problems)


def _describe_unfit(use: Use, problems: list[Problem], total: int, what: str) -> str:
    return f"data.{use}: {len(problems)} of {total} recordings have no matching labels, {what}:\n{list_some(problems)}"


def _paths(cut: Cut) -> set[str]:
    """Return the real paths of a cut's audio files, with links resolved; empty for audio in memory."""
    sources = [source.source for source in cut.recording.sources]
    return {os.path.realpath(source) for source in sources if isinstance(source, str)}
