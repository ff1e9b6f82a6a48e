"""Damaged audio files: each is read as far as its audio goes, or reported by name; none crashes, hangs or lies."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
from lhotse.cut import Cut
from numpy.typing import NDArray

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, read_samples, read_waveform
from fastssl.data.corpus import open_corpus
from fastssl.data.recordings import WAV2VEC2, read_chunks
from tests.soak.cases import Outcome, WrongResultError, check_all, generator, run_case
from tests.soak.conftest import Count

#: Name's ending, format and subtype of libsndfile.
_FORMATS = (
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "FLOAT"),
    ("wav", "WAV", "ULAW"),
    ("wav", "WAV", "GSM610"),
    ("wav", "WAV", "IMA_ADPCM"),
    ("flac", "FLAC", "PCM_16"),
    ("flac", "FLAC", "PCM_24"),
    ("ogg", "OGG", "VORBIS"),
    ("opus", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
    ("aiff", "AIFF", "PCM_16"),
    ("au", "AU", "PCM_16"),
    ("caf", "CAF", "PCM_16"),
    ("w64", "W64", "PCM_16"),
    ("rf64", "RF64", "PCM_16"),
)
_RATES_HZ = (8000, 11025, 16000, 22050, 44100, 48000)
#: Subtypes whose decoder gives the same samples wherever it starts.
_LOSSLESS = ("PCM_16", "PCM_24", "FLOAT", "ULAW")


class _Good(NamedTuple):
    """A good file, and what it contains.

    Args:
        data: Bytes of the file.
        ending: Ending of its name.
        subtype: Subtype of libsndfile.
        duration_s: Duration of what was written.
    """

    data: bytes
    ending: str
    subtype: str
    duration_s: float


def _good(random: random.Random, place: Path) -> _Good:
    while True:
        ending, kind, subtype = random.choice(_FORMATS)
        rate, channels = random.choice(_RATES_HZ), random.choice((1, 1, 2))
        if subtype == "OPUS":
            rate = random.choice((8000, 16000, 48000))
        if subtype == "GSM610":
            channels = 1
        frames = round(rate * random.uniform(0.3, 3.0))
        samples = 0.1 * np.random.default_rng(random.randrange(2**32)).standard_normal((frames, channels))
        path = place / f"good.{ending}"
        soundfile.write(path, samples, rate, format=kind, subtype=subtype)
        return _Good(path.read_bytes(), ending, subtype, frames / rate)


def _flip(random: random.Random, data: bytearray, start: int, stop: int) -> None:
    for _ in range(random.choice((1, 3, 30))):
        data[random.randrange(start, stop)] ^= 1 << random.randrange(8)


def _flip_anywhere(random: random.Random, data: bytearray) -> None:
    _flip(random, data, 0, len(data))


def _flip_in_header(random: random.Random, data: bytearray) -> None:
    _flip(random, data, 0, min(100, len(data)))


def _cut_off(random: random.Random, data: bytearray) -> None:
    del data[random.randrange(len(data)) :]


def _cut_out(random: random.Random, data: bytearray) -> None:
    start = random.randrange(len(data))
    del data[start : start + random.randrange(1, 5000)]


def _overwrite(random: random.Random, data: bytearray) -> None:
    start = random.randrange(len(data))
    length = min(random.randrange(1, 2000), len(data) - start)
    data[start : start + length] = bytes(length) if random.random() < 0.5 else random.randbytes(length)


def _repeat(random: random.Random, data: bytearray) -> None:
    data += bytes(data)


def _numbers_in_header(random: random.Random, data: bytearray) -> None:
    """Write extreme 32-bit numbers, as lengths and rates, into the header."""
    for _ in range(random.choice((1, 2))):
        start = random.randrange(0, min(96, max(1, len(data) - 4)))
        number = random.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 100_000_000, 655_330))
        data[start : start + 4] = number.to_bytes(4, random.choice(("little", "big")))


def _nothing(random: random.Random, data: bytearray) -> None:
    """Leave the file as it is: a check that finds fault with good files is worthless."""


_DAMAGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip_anywhere,
    _flip_in_header,
    _cut_off,
    _cut_out,
    _overwrite,
    _repeat,
    _numbers_in_header,
    _nothing,
)


def _check_cut(cut: Cut, good: _Good, damage: str, seed: int) -> str | None:
    """Read a cut in every way that commands do, and compare the results."""
    random = generator(seed, 0)
    try:
        whole = read_waveform(cut)
    except AudioError as error:
        return f"{cut.id} {error}"
    expected = round(SAMPLE_RATE_HZ * cut.duration)
    if abs(len(whole) - expected) > 0.1 * SAMPLE_RATE_HZ + 1:
        raise WrongResultError(f"{len(whole)} samples of a cut of {cut.duration:.3f} s")
    if not np.isfinite(whole).all() or np.abs(whole).max(initial=0) > 1e6:
        raise WrongResultError(f"samples up to {np.abs(whole).max():g}")
    if damage == "_nothing" and abs(cut.duration - good.duration_s) > 0.1:
        raise WrongResultError(f"{cut.duration:.3f} s of a good file of {good.duration_s:.3f} s")
    joined = damage == "_repeat" and good.subtype in ("VORBIS", "OPUS", "MPEG_LAYER_III")
    # An MP3 encoder adds up to four frames of silence to each part.
    padding_s = 8 * 1152 / cut.recording.sampling_rate if good.subtype == "MPEG_LAYER_III" else 0.0
    if joined and not -0.1 < cut.duration - 2 * good.duration_s < 0.1 + padding_s:
        raise WrongResultError(f"{cut.duration:.3f} s of a file twice {good.duration_s:.3f} s")
    _check_part(cut, whole, good, random)
    _check_chunks(cut, len(whole), random)
    return None


def _check_part(cut: Cut, whole: NDArray[np.float32], good: _Good, random: random.Random) -> None:
    """A part is what the whole has in its place, where the decoder can start anywhere and no resampling is needed."""
    if cut.recording.sampling_rate != SAMPLE_RATE_HZ or good.subtype not in _LOSSLESS or len(whole) < 4000:
        return
    first = random.randrange(len(whole) - 2000)
    part = read_samples(cut, first=first, length=1000, channel=None)
    if not np.array_equal(part, whole[first : first + 1000]):
        raise WrongResultError(f"samples from {first} differ from those of the whole")


def _check_chunks(cut: Cut, length: int, random: random.Random) -> None:
    frames = WAV2VEC2.count(length)
    if frames == 0:
        return
    chunks: list[Any] = list(read_chunks(cut, chunk_s=random.choice((1.0, 60.0)), overlap_s=0.2, normalize=True))
    found = sum(chunk.keep.stop - chunk.keep.start for chunk in chunks)
    if abs(found - frames) > 0.1 * SAMPLE_RATE_HZ / WAV2VEC2.stride + 1:
        raise WrongResultError(f"{found} frames in chunks, {frames} in the whole")


def _case(place: Path, number: int, seed: int) -> tuple[str, Outcome]:
    random = generator(seed, number)
    good = _good(random, place)
    damage = random.choice(_DAMAGES)
    data = bytearray(good.data)
    damage(random, data)
    folder = place / f"{number}"
    folder.mkdir()
    path = folder / f"damaged.{good.ending}"
    path.write_bytes(data)

    def read() -> str | None:
        corpus = open_corpus(path, min_duration_s=0.0, window_s=None, max_bad_fraction=1.0)
        for cut in corpus.cuts:
            if (message := _check_cut(cut, good, damage.__name__, seed)) is not None:
                return message
        return None

    outcome = run_case(read, name=path.name)
    if damage is _nothing and outcome.kind == "named":
        outcome = outcome._replace(kind="wrong")
    path.unlink()
    folder.rmdir()
    return f"case {number} ({good.ending}, {good.subtype}, {damage.__name__})", outcome


def test_damaged_files_are_read_or_named(tmp_path: Path, count: Count, seed: int) -> None:
    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for number in range(count(200)):
            yield _case(tmp_path, number, seed)

    check_all(outcomes())


@pytest.mark.parametrize("lie", [WrongResultError, KeyError])
def test_the_check_can_fail(tmp_path: Path, lie: type[Exception]) -> None:
    def case() -> None:
        raise lie("good.wav")

    with pytest.raises(AssertionError, match="1 of 2"):
        check_all([("bad", run_case(case, name="good.wav")), ("good", run_case(lambda: None, name=""))])


def test_a_hang_and_a_crash_are_seen() -> None:
    import os
    import signal
    import time

    assert run_case(partial(time.sleep, 60), name="", seconds=0.2).kind == "hang"
    assert run_case(lambda: os.kill(os.getpid(), signal.SIGKILL), name="").kind == "crash"
