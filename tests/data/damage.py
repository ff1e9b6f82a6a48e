"""Damage manifests and shar directories at random, and check that whatever opens them says so or copes."""

import gzip
import json
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet

from fastssl.data.audio import AudioError, read_waveform
from fastssl.data.corpus import open_corpus
from fastssl.data.recordings import read_chunks
from tests.data.making import noise, write

Json = Any
#: JSON that `json.dumps` cannot write; a value of this name is replaced by its text.
_RAW = {
    "@1e400@": "1e400",
    "@digits@": "9" * 5000,
    "@fewer digits@": "9" * 4000,
    "@deep@": "[" * 50 + "]" * 50,
    "@deeper@": '{"a":' * 400 + "1" + "}" * 400,
    "@deepest@": "[" * 100_000 + "]" * 100_000,
    "@twice@": '{"id": "a", "id": 7}',
}
_WRONG: list[Json] = [
    *(None, True, False, 0, -1, 3, 100, 16000.5, 48010, 96010, 99_999_990, 10**9, 10**18, 10**30, 1e-9, -0.0, 1e15),
    *(float("nan"), float("inf"), float("-inf"), "", "16000", "NaN", "x" * 100_000, "nul\0", "\ud800", "a\nb", "../.."),
    *([], [[]], [0], [0, 0], [7], [-1, 5], [0, 10**12], ["0"], [None], [True], {}, {"id": 1}, {"type": "MonoCut"}),
    *({"id": "w", "start": 0, "duration": 1e9}, {"id": "w", "start": -1.0, "duration": 2.0}, {"id": "w"}),
    *_RAW,
]
_PATHS = ["/dev/zero", "/dev/null", "/", "/proc/self/mem", "FOLDER/fifo", "FOLDER/gone.wav", "FOLDER", "FOLDER/0.wav"]
_SLOWEST_S = 30.0
_MOST_MEMORY = 2 * 2**30  # bytes more than before; the largest resampling filter takes about 800 MB to compute


def make_audio(folder: Path) -> Path:
    """Write a few recordings, a folder of shards and a FIFO."""
    write(folder / "0.wav", noise(3.0))
    write(folder / "1.wav", noise(4.0, rate=8000, channels=2), rate=8000)
    write(folder / "2.flac", noise(13.0, rate=44100), rate=44100)
    write(folder / "3.mp3", noise(5.0))
    write(folder / "4.ogg", noise(5.0))
    cuts = open_corpus(folder, window_s=None).cuts
    (folder / "shar").mkdir()
    cuts.to_shar(folder / "shar", fields={"recording": "flac"}, shard_size=3)
    os.mkfifo(folder / "fifo")
    return folder


def good_lines(folder: Path) -> dict[str, list[Json]]:
    """Return the JSON of several kinds of good manifest, by kind."""
    whole = list(open_corpus(folder / "shar", window_s=None).cuts)
    files = [open_corpus(folder / name).cuts for name in ("0.wav", "1.wav", "3.mp3", "4.ogg")]
    cuts = CutSet.from_cuts(cut for some in files for cut in some)
    louder = [cut.perturb_volume(0.5).perturb_speed(1.1) for cut in cuts]
    return {
        "cuts": [cut.to_dict() for cut in cuts],
        "recordings": [cut.recording.to_dict() for cut in cuts],
        "windows": [cut.to_dict() for cut in open_corpus(folder / "2.flac", window_s=3.0).cuts],
        "members of tar files": [cut.to_dict() for cut in whole],
        "transforms": [cut.resample(24000).to_dict() for cut in louder],
    }


def _places(value: Json) -> Iterator[tuple[Json, Json]]:
    """Yield (container, key) of every value below a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _changed(line: Json, draw: random.Random, folder: Path) -> Json:
    """Return a line with one thing changed."""
    line = json.loads(json.dumps(line))
    recording = line.get("recording", line)
    container, key = draw.choice(list(_places(line)))
    kind = draw.randrange(8)
    if kind <= 2:
        container[key] = draw.choice(_WRONG)
    elif kind == 3:
        del container[key]
    elif kind == 4:
        recording["sources"][0]["source"] = draw.choice(_PATHS).replace("FOLDER", str(folder))
    elif kind == 5:  # a lie: the fields agree with each other, but not with the file
        factor = draw.choice([0.5, 1.02, 3, 100, 10**5, 10**8, 10**12])
        recording["num_samples"] = round(recording["num_samples"] * factor)
        line["duration"] *= factor
        recording["duration"] = recording["num_samples"] / recording["sampling_rate"]
    elif kind == 6:
        number = [place for place in _places(line) if isinstance(place[0][place[1]], int | float)]
        container, key = draw.choice(number)
        container[key] = draw.choice([container[key] * factor for factor in (-1, 0.5, 2, 1.001, 1000, 1e-6, 1e12)])
    else:
        container[key] = draw.choice([[container[key]], {"a": container[key]}, str(container[key])])
    return line


def _text(line: Json) -> bytes:
    text = json.dumps(line)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode() + b"\n"


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with something cut off, overwritten, put in or left out."""
    place, length = draw.randrange(len(data) + 1), draw.choice([1, 4, 100, 3000])
    garbage = draw.randbytes(length)
    return draw.choice(
        [
            data[:place],
            data[:place] + garbage + data[place + length :],
            data[:place] + garbage + data[place:],
            data[:place] + data[place + length :],
            data[:place] + b"\0" * length + data[place + length :],
            data + garbage,
        ]
    )


def damaged_manifest(folder: Path, lines: dict[str, list[Json]], output: Path, draw: random.Random) -> Path:
    """Write one damaged manifest or shar directory.

    Args:
        folder: Folder that `make_audio` filled.
        lines: What `good_lines` returned.
        output: An empty folder to write to.
        draw: Decides what is damaged, and how.

    Returns:
        What to open.
    """
    if draw.random() < 0.2:
        return _damaged_shar(folder / "shar", output, draw, folder)
    chosen = list(draw.choice(list(lines.values())))
    by_bytes = draw.random() < 0.3
    if not by_bytes:
        for index in draw.sample(range(len(chosen)), draw.randrange(1, 4)):
            chosen[index] = _changed(chosen[index], draw, folder)
    data = b"".join(map(_text, chosen))
    packed = draw.random() < 0.5
    path = output / ("cuts.jsonl.gz" if packed else "cuts.jsonl")
    if by_bytes and draw.random() < 0.5:
        data, by_bytes = _damaged(data, draw), False
    data = gzip.compress(data) if packed else data
    path.write_bytes(_damaged(data, draw) if by_bytes else data)
    return path


def _damaged_shar(shar: Path, output: Path, draw: random.Random, folder: Path) -> Path:
    names = sorted(path.name for path in shar.iterdir())
    bad = draw.choice(names)
    for name in names:
        data = (shar / name).read_bytes()
        if name == bad and name.endswith(".gz") and draw.random() < 0.5:
            lines = [json.loads(line) for line in gzip.decompress(data).splitlines()]
            index = draw.randrange(len(lines))
            lines[index] = _changed(lines[index], draw, folder)
            data = gzip.compress(b"".join(map(_text, lines)))
        elif name == bad:
            # Most of a tar file is audio; its headers are more fragile.
            headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
            if headers and draw.random() < 0.7:
                place = draw.choice(headers) + draw.choice([0, 100, 124, 130, 148, 156, 257, 345])
                data = data[:place] + draw.choice([b"\xff" * 12, b"\x80" + b"\xff" * 8, b"0" * 6, b"x"]) + data[place:]
            else:
                data = _damaged(data, draw)
        (output / name).write_bytes(data)
    return output


@contextmanager
def _at_most(seconds: float, what: str) -> Iterator[None]:
    """Fail if the body takes longer, even if it hangs."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"{what} takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def open_and_read(path: Path, *, window_s: float | None, max_bad_fraction: float) -> str:
    """Open a corpus and read its first cuts; return what became of it.

    Raises:
        AssertionError: An exception says nothing to a user, or a cut is not as long as it says.
    """
    try:
        corpus = open_corpus(path, window_s=window_s, max_bad_fraction=max_bad_fraction)
    except ValueError as error:
        if str(path) not in str(error) or type(error) is not ValueError:
            raise AssertionError(f"{error!r} does not name {path}") from error
        return "refused"
    outcome = "opened with problems" if corpus.problems else "opened"
    assert all(problem.name and problem.reason and len(str(problem)) < 10_000 for problem in corpus.problems)
    for cut in islice(corpus.cuts, 4):
        json.dumps(cut.to_dict())
        try:
            waveform = read_waveform(cut)
            assert abs(len(waveform) - 16000 * cut.duration) <= 1601
            assert np.isfinite(waveform).all()
            for chunk in islice(read_chunks(cut, chunk_s=5.0, overlap_s=0.5, normalize=True), 2):
                assert len(chunk.waveform) > 0
        except AudioError:
            outcome = "opened, but not all of it can be read"
    return outcome


def _peak_memory() -> int:
    """Return the most memory that this process has ever used, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_damaged(
    folder: Path, *, count: int, seed: int, report: Callable[[int, str], None] | None = None
) -> Counter[str]:
    """Open and read damaged manifests.

    Args:
        folder: Empty folder for audio and manifests.
        count: Number of damaged manifests.
        seed: Seed of the damage; manifest `index` depends only on (seed, index).
        report: Called with each index and its outcome.

    Returns:
        How many manifests had each outcome.

    Raises:
        AssertionError: Something else than a named error came of a manifest, or it took too much time or memory.
    """
    audio = make_audio(folder / "audio")
    lines = good_lines(audio)
    outcomes: Counter[str] = Counter()
    for index in range(count):
        draw = random.Random(f"{seed}/{index}")
        place = folder / str(index)
        place.mkdir()
        path = damaged_manifest(audio, lines, place, draw)
        window_s = draw.choice([None, 60.0, 2.0])
        begun, memory = time.perf_counter(), _peak_memory()
        try:
            with _at_most(_SLOWEST_S, "it"):
                outcome = open_and_read(path, window_s=window_s, max_bad_fraction=draw.choice([0.05, 0.9]))
        except Exception as error:
            raise AssertionError(f"seed {seed}, manifest {index} ({path}): {type(error).__name__}: {error}") from error
        assert _peak_memory() - memory < _MOST_MEMORY, f"seed {seed}, manifest {index} ({path}) takes too much memory"
        outcomes[outcome] += 1
        if report is not None:
            report(index, f"{outcome}, {time.perf_counter() - begun:.2f} s")
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    return outcomes
