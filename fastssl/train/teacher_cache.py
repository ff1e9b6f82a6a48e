"""The frames of a teacher, made once for crops that never change, and kept in a folder."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.progress import track

from fastssl.data.batches import WaveformDataset, utterance_id
from fastssl.data.corpus import Problem, cut_name
from fastssl.data.teacher_frames import FRONT_END, TeacherTable
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.encode import choose_device
from fastssl.train.extract import weights_digest
from fastssl.train.shards import Shards, read_index
from fastssl.train.teacher import Teacher

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256_000_000
#: Written last: other processes of a run wait for it.
_DONE_FILE = "done"


def open_cache(config: PretrainConfig, data: PretrainDataModule, teacher: Teacher) -> Shards:
    """The folder `data.teacher_cache`, begun or gone on with; checked before a run is written.

    Args:
        config: The settings.
        data: Whose crops are kept.
        teacher: Whose frames.

    Raises:
        ValueError: It is of another teacher or other crops, or a recording has changed since.
    """
    settings = {
        "weights": weights_digest(teacher.encoder),
        "layers": list(teacher.layers),
        "front_end": teacher.gives_frames,
        "crop_s": config.data.crop_s,
        "window_s": config.data.window_s,
        "seed": config.seed,
        "channel": config.data.channel,
        "normalize": data.normalize,
    }
    folder = _folder(config)
    shards = Shards(folder, settings=settings, name="teacher", option="data.teacher_cache", shard_bytes=_SHARD_BYTES)
    table = _table(folder, shards.entries, teacher)
    for cut in data.crops():
        if cut.id in shards.entries:
            table.check(cut)
    return shards


def attach_cache(config: PretrainConfig, data: PretrainDataModule, teacher: Teacher, shards: Shards | None) -> None:
    """Make the frames that are missing, and give them to the data of a run.

    Args:
        config: The settings.
        data: Takes the frames, and leaves out recordings that cannot be used.
        teacher: Makes them.
        shards: `open_cache`, of the process that makes them; None waits for it.
    """
    folder = _folder(config)
    problems: list[Problem] = []
    if shards is not None:
        (folder / _DONE_FILE).unlink(missing_ok=True)
        problems = _fill(shards, data, teacher)
        (folder / _DONE_FILE).touch()
    while not (folder / _DONE_FILE).is_file():
        time.sleep(0.5)
    entries = read_index(folder) if shards is None else shards.entries
    data.attach_teacher(_table(folder, entries, teacher), problems)


def _folder(config: PretrainConfig) -> Path:
    assert config.data.teacher_cache is not None
    return Path(config.data.teacher_cache)


def _table(folder: Path, entries: Mapping[str, Mapping[str, Any]], teacher: Teacher) -> TeacherTable:
    shape = teacher.encoder.config
    channels = shape.conv_dim[-1] if teacher.gives_frames else None
    return TeacherTable(folder, entries, layers=teacher.layers, width=shape.hidden_size, channels=channels)


@torch.no_grad()
def _fill(shards: Shards, data: PretrainDataModule, teacher: Teacher) -> list[Problem]:
    """Make what is not there; returns the recordings that cannot be used."""
    problems: list[Problem] = []
    todo = list({cut.id: cut for cut in data.crops() if cut.id not in shards.entries}.values())
    if not todo:
        return problems
    if shards.entries:
        logger.info("the teacher's frames of %d crops are there already", len(shards.entries))
    dataset = WaveformDataset(normalize=data.normalize, channel=data.config.channel)
    device = choose_device("auto")
    console = get_console()
    for spec in track(data.batches_of(todo), "teacher", console=console, disable=not console.is_terminal):
        batch = dataset[spec]
        problems += batch.problems
        used = set(batch.ids.tolist())
        cuts = [cut for cut in spec.cuts if utterance_id(cut.id) in used]
        if not cuts:
            continue
        frames, states = teacher.encode(batch.waveforms.to(device))
        named = {str(layer): Packed(state, frames.layout) for layer, state in zip(teacher.layers, states, strict=True)}
        if teacher.gives_frames:
            named[FRONT_END] = frames
        parts = {name: packed.unpack() for name, packed in named.items()}
        for row, cut in enumerate(cuts):
            tensors = {f"{cut.id}/{name}": part[row].half().cpu() for name, part in parts.items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                problems.append(Problem(cut_name(cut), "has frames, by the teacher, that are not finite in fp16"))
                continue
            entry = {"file": cut_name(cut), "duration_s": cut.duration, "rate_hz": cut.recording.sampling_rate}
            shards.add(cut.id, tensors, entry | {"frames": frames.layout.lengths[row]})
    shards.close()
    logger.info("the teacher's frames: %d crops in %s", len(shards.entries), shards.folder)
    return problems
