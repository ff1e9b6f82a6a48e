"""The frames of a teacher, made once for crops that never change, and kept in a folder."""

import fcntl
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.progress import track

from fastssl.data.batches import WaveformDataset, utterance_id
from fastssl.data.corpus import Problem, cut_name
from fastssl.data.teacher_frames import FRONT_END, TeacherTable
from fastssl.eval.encode import choose_device
from fastssl.eval.shards import Shards, read_index
from fastssl.models.folder import write_json
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig
from fastssl.train.data import HELD_OUT, PretrainDataModule
from fastssl.train.teacher import Teacher
from fastssl.train.waiting import by_first_process

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256_000_000
#: Written last: by key, why there are no frames of some crops.
_DONE_FILE = "done.json"
_LOCK_FILE = "lock"


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
        "weights": teacher.digest,
        "layers": list(teacher.layers),
        "front_end": teacher.gives_frames,
        "crop_s": config.data.crop_s,
        "window_s": config.data.window_s,
        "seed": None if config.data.crop_s is None else config.seed,
        "channel": config.data.channel,
        "normalize": data.normalize,
    }
    folder = _folder(config)
    shards = Shards(folder, settings=settings, name="teacher", option="data.teacher_cache", shard_bytes=_SHARD_BYTES)
    files = {entry["shard"] for entry in shards.entries.values()}
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise ValueError(f"data.teacher_cache: {folder} has lost {', '.join(missing)}; begin it anew")
    table = _table(folder, shards.entries, teacher)
    table.check_shards()
    for key, cut in data.crops():
        if key in shards.entries:
            table.check(key, cut)
    return shards


def attach_cache(config: PretrainConfig, data: PretrainDataModule, teacher: Teacher, *, first: bool) -> None:
    """Make the frames that are missing, and give them to the data of a run.

    Args:
        config: The settings.
        data: Takes the frames, and leaves out recordings that cannot be used.
        teacher: Makes them.
        first: Whether this process makes them; the others, and other runs, wait for it.

    Raises:
        ValueError: As `open_cache`; or too many recordings cannot be used.
    """
    folder = _folder(config)

    def make() -> None:
        with (folder / _LOCK_FILE).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another run makes frames in %s; waiting for it", folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            # What another run has made meanwhile is there now.
            unusable = _fill(open_cache(config, data, teacher), data, teacher)
            write_json(folder / _DONE_FILE, {key: [problem.name, problem.reason] for key, problem in unusable.items()})

    def done() -> bool:
        # What an earlier run left does not cover recordings that are new.
        known = read_index(folder).keys() | _unusable(folder).keys()
        return (folder / _DONE_FILE).is_file() and all(key in known for key, _ in data.crops())

    by_first_process(make, first=first, done=done, folder=folder)
    problems = list(_unusable(folder).values())
    for problem in problems if first else []:
        logger.warning("left out: %s", problem)
    data.attach_teacher(_table(folder, read_index(folder), teacher), problems)


def _unusable(folder: Path) -> dict[str, Problem]:
    path = folder / _DONE_FILE
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {key: Problem(name, reason) for key, (name, reason) in found.items()}


def _folder(config: PretrainConfig) -> Path:
    assert config.data.teacher_cache is not None
    return Path(config.data.teacher_cache)


def _table(folder: Path, entries: Mapping[str, Mapping[str, Any]], teacher: Teacher) -> TeacherTable:
    shape = teacher.encoder.config
    channels = shape.conv_dim[-1] if teacher.gives_frames else None
    return TeacherTable(folder, entries, layers=teacher.layers, width=shape.hidden_size, channels=channels)


@torch.no_grad()
def _fill(shards: Shards, data: PretrainDataModule, teacher: Teacher) -> dict[str, Problem]:
    """Make what is not there; returns by key why some cannot be."""
    problems: dict[str, Problem] = {}
    todo = {key: cut for key, cut in data.crops() if key not in shards.entries}
    if shards.entries:
        logger.info("the teacher's frames of %d crops are there already", len(shards.entries))
    dataset = WaveformDataset(normalize=data.normalize, channel=data.config.channel)
    device = choose_device("auto")
    console = get_console()
    # Apart, because ids are those of files in two folders.
    for held_out in (False, True):
        keys = {cut.id: key for key, cut in todo.items() if key.startswith(HELD_OUT) == held_out}
        specs = data.batches_of([todo[key] for key in keys.values()]) if keys else []
        for spec in track(specs, "teacher", console=console, disable=not console.is_terminal):
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
