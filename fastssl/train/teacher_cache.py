"""Compute a teacher's frames once, for crops that are the same in every epoch, and store them in a folder."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastssl.data.batches import WaveformDataset, utterance_id
from fastssl.data.corpus import Problem, cut_name
from fastssl.data.teacher_frames import FRONT_END, HELD_OUT, TeacherTable
from fastssl.eval.encode import choose_device
from fastssl.eval.shards import Shards, read_index
from fastssl.eval.showing import track
from fastssl.folder_lock import folder_lock
from fastssl.names import stored
from fastssl.packing import Packed
from fastssl.reading import printable
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.teacher import Teacher

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256_000_000


class TeacherCache:
    """The teacher's frames in the folder `data.teacher_cache`; several runs may share it.

    Args:
        config: Settings of the run; `config.data.teacher_cache` must not be None.
        data: Data module that has the crops; the frames are attached to it.
        teacher: Teacher that computes the frames.
    """

    def __init__(self, config: PretrainConfig, data: PretrainDataModule, teacher: Teacher) -> None:
        assert config.data.teacher_cache is not None
        self.folder = Path(config.data.teacher_cache)
        self.data, self.teacher = data, teacher
        self.settings = {
            "weights": teacher.digest,
            "layers": list(teacher.layers),
            "front_end": teacher.gives_frames,
            "crop_s": config.data.crop_s,
            "window_s": config.data.window_s,
            "seed": None if config.data.crop_s is None else config.seed,
            "channel": config.data.channel,
            "normalize": data.normalize,
            "rules": config.data.rules,
        }

    def open(self) -> Shards:
        """Create the folder, or open an existing one and check it.

        Returns:
            The shards of the folder, ready for frames to be added.

        Raises:
            ValueError: The folder belongs to another teacher or to other crops, a file in it is missing or damaged, or
                a recording has changed since its frames were computed.
        """
        shards = Shards(
            self.folder, settings=self.settings, name="teacher", option="data.teacher_cache", shard_bytes=_SHARD_BYTES
        )
        for shard, problem in shards.damaged().items():
            raise ValueError(
                f"data.teacher_cache: {self.folder / shard}: {problem}; delete the folder to make it again"
            )
        needed = {"duration_s", "rate_hz", "checksum"}
        for key, entry in shards.entries.items():
            if not needed <= entry.keys():
                raise ValueError(
                    f"data.teacher_cache: {self.folder}: the index has no duration, rate or checksum of "
                    f"{printable(key)}; delete the folder to make it again"
                )
        table = self._table(shards.entries)
        for key, cut in self.data.crops():
            if key in shards.entries:
                table.check(key, cut)
        return shards

    def make(self) -> list[Problem]:
        """Compute the frames that are missing; other runs with the same cache wait.

        Returns:
            Problems with the recordings that frames cannot be computed for.
        """
        with folder_lock(self.folder, option="data.teacher_cache", wait=True):
            # Opened while the lock is held, so that frames that another run wrote meanwhile are found.
            problems = list(_fill(self.open(), self.data, self.teacher).values())
        for problem in problems:
            logger.warning("left out: %s", problem)
        return problems

    def attach(self, problems: list[Problem]) -> None:
        """Attach the frames to the data module, which leaves out recordings without frames.

        Args:
            problems: The problems that `make` returned.

        Raises:
            ValueError: Too many recordings have no frames.
        """
        self.data.attach_teacher(self._table(read_index(self.folder)), problems)

    def _table(self, entries: Mapping[str, Mapping[str, Any]]) -> TeacherTable:
        shape, layers = self.teacher.encoder.config, self.teacher.layers
        channels = shape.conv_dim[-1] if self.teacher.gives_frames else None
        return TeacherTable(self.folder, entries, layers=layers, width=shape.hidden_size, channels=channels)


@torch.no_grad()
def _fill(shards: Shards, data: PretrainDataModule, teacher: Teacher) -> dict[str, Problem]:
    """Compute the missing frames; return, by key, the problems with crops that have none."""
    problems: dict[str, Problem] = {}
    todo = {key: cut for key, cut in data.crops() if key not in shards.entries}
    if shards.entries:
        logger.info("the teacher's frames already exist for %d crops", len(shards.entries))
    dataset = WaveformDataset(normalize=data.normalize, channel=data.config.channel, checksums=True)
    device = choose_device("auto")
    # Training and held-out crops are encoded separately, because the same id can occur in both.
    for held_out in (False, True):
        keys = {cut.id: key for key, cut in todo.items() if key.startswith(HELD_OUT) == held_out}
        specs = data.batches_of([todo[key] for key in keys.values()]) if keys else []
        for spec in track(specs, "teacher"):
            batch = dataset[spec]
            used = set(batch.ids.tolist())
            cuts = [cut for cut in spec.cuts if utterance_id(cut.id) in used]
            bad = [cut for cut in spec.cuts if utterance_id(cut.id) not in used]
            problems |= {keys[cut.id]: problem for cut, problem in zip(bad, batch.problems, strict=True)}
            if not cuts:
                continue
            frames, states = teacher.encode(batch.waveforms.to(device))
            named = {str(layer): Packed(x, frames.layout) for layer, x in zip(teacher.layers, states, strict=True)}
            if teacher.gives_frames:
                named[FRONT_END] = frames
            # One copy per layer and batch, because the host waits for each.
            parts = {name: Packed(x.values.half().cpu(), x.layout).unpack() for name, x in named.items()}
            for row, cut in enumerate(cuts):
                key = keys[cut.id]
                tensors = {stored(f"{key}/{name}"): part[row].clone() for name, part in parts.items()}
                if not all(tensor.isfinite().all() for tensor in tensors.values()):
                    problems[key] = Problem(cut_name(cut), "makes the teacher's frames NaN or infinite in fp16")
                    continue
                entry = {"file": cut_name(cut), "duration_s": cut.duration, "rate_hz": cut.recording.sampling_rate}
                entry |= {"checksum": batch.checksums[row], "frames": frames.layout.lengths[row]}
                shards.add(key, tensors, entry)
    shards.close()
    teacher.encoder.to("cpu")
    logger.info("the teacher's frames: %d crops in %s", len(shards.entries), shards.folder)
    return problems
