"""The frames of a teacher, made once for crops that never change, and kept in a folder."""

import fcntl
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastssl.data.batches import WaveformDataset, utterance_id
from fastssl.data.corpus import Problem, cut_name
from fastssl.data.teacher_frames import FRONT_END, TeacherTable
from fastssl.eval.encode import choose_device
from fastssl.eval.shards import Shards, read_index
from fastssl.eval.showing import track
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig
from fastssl.train.data import HELD_OUT, PretrainDataModule
from fastssl.train.teacher import Teacher

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256_000_000
_LOCK_FILE = "lock"


class TeacherCache:
    """The folder `data.teacher_cache`.

    Args:
        config: The settings.
        data: Whose crops are kept, and who takes the frames.
        teacher: Makes them.
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
        }

    def open(self) -> Shards:
        """Begin the folder, or go on with it; done before a run is written.

        Raises:
            ValueError: It is of another teacher or other crops, or a recording has changed since.
        """
        shards = Shards(
            self.folder, settings=self.settings, name="teacher", option="data.teacher_cache", shard_bytes=_SHARD_BYTES
        )
        files = {entry["shard"] for entry in shards.entries.values()}
        missing = sorted(file for file in files if not (self.folder / file).is_file())
        if missing:
            raise ValueError(f"data.teacher_cache: {self.folder} has lost {', '.join(missing)}; begin it anew")
        table = self._table(shards.entries)
        table.check_shards()
        for key, cut in self.data.crops():
            if key in shards.entries:
                table.check(key, cut)
        return shards

    def make(self) -> list[Problem]:
        """Make the frames that are missing; other runs with this cache wait. Returns why some cannot be made."""
        with (self.folder / _LOCK_FILE).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another run makes frames in %s; waiting for it", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            # What another run has made meanwhile is there now.
            problems = list(_fill(self.open(), self.data, self.teacher).values())
        for problem in problems:
            logger.warning("left out: %s", problem)
        return problems

    def attach(self, problems: list[Problem]) -> None:
        """Give the frames to the data, which leaves out recordings that have none.

        Raises:
            ValueError: They are too many.
        """
        self.data.attach_teacher(self._table(read_index(self.folder)), problems)

    def _table(self, entries: Mapping[str, Mapping[str, Any]]) -> TeacherTable:
        shape, layers = self.teacher.encoder.config, self.teacher.layers
        channels = shape.conv_dim[-1] if self.teacher.gives_frames else None
        return TeacherTable(self.folder, entries, layers=layers, width=shape.hidden_size, channels=channels)


@torch.no_grad()
def _fill(shards: Shards, data: PretrainDataModule, teacher: Teacher) -> dict[str, Problem]:
    """Make what is not there; returns by key why some cannot be."""
    problems: dict[str, Problem] = {}
    todo = {key: cut for key, cut in data.crops() if key not in shards.entries}
    if shards.entries:
        logger.info("the teacher's frames of %d crops are there already", len(shards.entries))
    dataset = WaveformDataset(normalize=data.normalize, channel=data.config.channel, checksums=True)
    device = choose_device("auto")
    # Apart, because ids are those of files in two folders.
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
            parts = {name: packed.unpack() for name, packed in named.items()}
            for row, cut in enumerate(cuts):
                key = keys[cut.id]
                tensors = {f"{key}/{name}": part[row].half().cpu() for name, part in parts.items()}
                if not all(tensor.isfinite().all() for tensor in tensors.values()):
                    problems[key] = Problem(cut_name(cut), "has frames, by the teacher, that are not finite in fp16")
                    continue
                entry = {"file": cut_name(cut), "duration_s": cut.duration, "rate_hz": cut.recording.sampling_rate}
                entry |= {"checksum": batch.checksums[row], "frames": frames.layout.lengths[row]}
                shards.add(key, tensors, entry)
    shards.close()
    teacher.encoder.to("cpu")
    logger.info("the teacher's frames: %d crops in %s", len(shards.entries), shards.folder)
    return problems
