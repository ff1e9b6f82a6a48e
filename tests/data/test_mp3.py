"""MP3s whose header gives no length, or a wrong one, are read whole; ordinary ones are not read to be measured."""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import AudioSource
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from numpy.typing import NDArray

from fastssl.data import mp3
from fastssl.data.audio import AudioError, read_waveform
from fastssl.data.corpus import Problem, open_corpus, write_manifest
from fastssl.data.scan import scan_file
from tests.data.making import noise

#: Samples that libsndfile removes from the start of a file by LAME, if it has its header.
DELAY = 576 + 529


def encode(samples: NDArray[np.float32], path: Path, *, rate: int = 16000, mode: str = "VARIABLE") -> list[bytes]:
    """Write an MP3 and return its frames; the first is the length header."""
    soundfile.write(path, samples, rate, format="MP3", bitrate_mode=mode, compression_level=0.3)
    data, frames, at = path.read_bytes(), [], 0
    while (header := mp3._header_at(data, at)) is not None:
        frames.append(data[at : at + header.size])
        at += header.size
    assert at == len(data)
    return frames


def speech(seconds: float, *, rate: int = 16000, loud_first: bool = True) -> NDArray[np.float32]:
    """Return (T,) noise for a fourth of the time and almost silence for the rest, or the other way round."""
    samples: NDArray[np.float32] = noise(seconds, rate=rate)[:, 0] * np.float32(2)
    samples[len(samples) // 4 :] *= np.float32(0.001)
    return samples if loud_first else samples[::-1].copy()


def scanned(path: Path, *, rules: int = 2) -> Cut:
    cut = scan_file(path, recording_id="a", rules=rules)
    assert not isinstance(cut, Problem), cut
    return cut


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("loud_first", [False, True])
def test_a_changing_bit_rate_without_a_header(tmp_path: Path, rate: int, loud_first: bool) -> None:
    path = tmp_path / "a.mp3"
    frames = encode(speech(12.0, rate=rate, loud_first=loud_first), path, rate=rate)
    expected, _ = soundfile.read(path, dtype="float32")
    path.write_bytes(b"".join(frames[1:]))
    cut = scanned(path)
    per_frame = 576 if rate < 32000 else 1152
    assert cut.recording.num_samples == (len(frames) - 1) * per_frame
    assert abs(len(soundfile.read(path)[0]) - cut.recording.num_samples) > rate  # libsndfile alone
    if rate != 16000:
        return
    whole = read_waveform(cut)
    assert len(whole) == cut.recording.num_samples
    np.testing.assert_allclose(whole[DELAY : DELAY + len(expected)], expected, atol=1e-6)
    for start_s in (0.0, 3.1, 11.0):
        first = round(start_s * rate)
        part = read_waveform(fastcopy(cut, start=start_s, duration=0.9))
        np.testing.assert_allclose(part, whole[first : first + len(part)], atol=1e-6)


def test_the_counted_length_is_kept_in_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "audio" / "a.mp3"
    path.parent.mkdir()
    frames = encode(speech(12.0), path)
    path.write_bytes(b"".join(frames[1:]))
    write_manifest(open_corpus(tmp_path / "audio", window_s=4.0), tmp_path / "cuts.jsonl.gz")
    cuts = list(open_corpus(tmp_path / "cuts.jsonl.gz", window_s=4.0).cuts)
    joined = np.concatenate([read_waveform(cut) for cut in cuts])
    assert len(cuts) == 4
    np.testing.assert_allclose(joined, read_waveform(scanned(path)), atol=1e-6)
    source = AudioSource(type="memory", channels=[0], source=path.read_bytes())
    kept = fastcopy(cuts[-1], recording=fastcopy(cuts[-1].recording, sources=[source]))
    np.testing.assert_array_equal(read_waveform(kept), read_waveform(cuts[-1]))
    # Old rules believe libsndfile, also about a manifest that newer ones wrote.
    old = scanned(path, rules=1)
    assert old.recording.num_samples == len(soundfile.read(path)[0]) < 7 * 16000
    last = list(open_corpus(tmp_path / "cuts.jsonl.gz", window_s=4.0, rules=1).cuts)[-1]
    with pytest.raises(AudioError):
        read_waveform(last)


ID3V2 = b"ID3\x03\x00\x00" + bytes([0, 0, 100, 0]) + bytes(100 * 128)
ID3V1 = b"TAG" + bytes(125)
APE = (
    b"APETAGEX"
    + struct.pack("<IIII", 2000, 5000, 1, 0xA0000000)
    + bytes(8)
    + bytes(5000 - 32)
    + b"APETAGEX"
    + bytes(24)
)


@pytest.mark.parametrize("between", [b"", ID3V1, ID3V2, ID3V1 + ID3V2, b"some garbage" * 20])
def test_joined_files(tmp_path: Path, between: bytes) -> None:
    path = tmp_path / "a.mp3"
    first, second = (encode(noise(seconds, seed=seed)[:, 0], path) for seconds, seed in ((3.0, 0), (5.0, 1)))
    path.write_bytes(ID3V2 + b"".join(first) + between + b"".join(second) + ID3V1)
    cut = scanned(path)
    # The header of the second file is a frame without sound.
    assert cut.recording.num_samples == (len(first) + len(second) - 1) * 576
    waveform = read_waveform(cut)
    for samples, begin in ((noise(3.0, seed=0), 0), (noise(5.0, seed=1), len(first) * 576)):
        found = waveform[begin + DELAY :][: len(samples)]
        assert np.corrcoef(found, samples[:, 0])[0, 1] > 0.8
    assert scanned(path, rules=1).duration == 3.0


@pytest.mark.parametrize(("before", "after"), [(b"", b""), (ID3V2, ID3V1), (ID3V2 + ID3V2, APE + ID3V1)])
def test_a_header_that_fits_the_size_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes, after: bytes
) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(before + b"".join(encode(speech(4.0), path)) + after)
    monkeypatch.setattr(mp3, "_count", None)  # calling it is an error
    assert scanned(path).duration == 4.0
    path.write_bytes(path.read_bytes()[: len(before) + 5000])  # whoever reads a damaged file reports it
    with pytest.raises(AudioError, match="ends after"):
        read_waveform(scanned(path))


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_constant_bit_rate_keeps_the_length_that_it_had(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "a.mp3"
    frames = encode(speech(8.0, rate=rate), path, rate=rate, mode="CONSTANT")
    path.write_bytes(b"".join(frames[1:]) + ID3V1)
    old, new = scanned(path, rules=1), scanned(path)
    assert old.duration == new.duration
    np.testing.assert_allclose(read_waveform(new), read_waveform(old), atol=1e-6)


def test_free_format(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    frames = encode(speech(6.0), path, mode="CONSTANT")[1:]
    assert len({len(frame) for frame in frames}) == 1
    path.write_bytes(b"".join(frames))
    expected = read_waveform(scanned(path))
    path.write_bytes(b"".join(frame[:2] + bytes([frame[2] & 0x0F]) + frame[3:] for frame in frames))
    cut = scanned(path)
    assert abs(cut.duration - len(frames) * 576 / 16000) < 0.1
    waveform = read_waveform(cut)
    length = min(len(waveform), len(expected))
    np.testing.assert_allclose(waveform[:length], expected[:length], atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_other_layers(tmp_path: Path, layer: int) -> None:
    """Silent frames at 32 kHz, all but the first of them at a fourth of its bit rate."""
    path = tmp_path / "a.mp3"
    headers = [bytes([0xFF, 0xFF - 2 * (layer - 1), bits << 4 | 2 << 2, 0xC0]) for bits in (12, 3)]
    frames = [header + bytes(mp3._header_at(header, 0).size - 4) for header in headers]  # type: ignore[union-attr]
    path.write_bytes(frames[0] * 2 + frames[1] * 300)
    cut = scanned(path)
    assert cut.recording.num_samples == 302 * (384 if layer == 1 else 1152)
    assert len(read_waveform(cut)) == cut.recording.num_samples // 2


def test_what_cannot_be_read_whole_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    mono, slow = encode(noise(3.0)[:, 0], path), encode(noise(3.0, rate=8000)[:, 0], path, rate=8000)
    stereo = encode(noise(3.0, channels=2), path)
    generator = np.random.default_rng(0)
    files = {
        "changes from 16000 to 8000 Hz at byte": mono + slow,
        "changes from one channel to two at byte": mono + stereo,
        "bytes that are not MP3 before byte": [*mono[1:50], generator.bytes(3000), *mono[50:]],
    }
    for reason, frames in files.items():
        path.write_bytes(b"".join(frames))
        problem = scan_file(path, recording_id="a")
        assert isinstance(problem, Problem)
        assert reason in problem.reason
        assert isinstance(scan_file(path, recording_id="a", rules=1), Cut)


def test_a_file_of_macos_beside_it_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    encode(noise(3.0)[:, 0], path)
    expected = read_waveform(scanned(path))
    (tmp_path / "._a.mp3").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(4000))
    np.testing.assert_array_equal(read_waveform(scanned(path)), expected)
    assert isinstance(scan_file(path, recording_id="a", rules=1), Problem)
    path.write_bytes(b"no audio")
    assert isinstance(scan_file(path, recording_id="a"), Problem)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_a_part_is_that_part_of_the_whole(tmp_path: Path, mode: str) -> None:
    """A frame of few bytes uses bytes of several frames before it, also of those before the part."""
    path = tmp_path / "a.mp3"
    soundfile.write(path, speech(20.0, rate=8000), 8000, format="MP3", bitrate_mode=mode, compression_level=0.9)
    cut = scanned(path)
    whole = read_waveform(cut)
    for start, stop in pairwise(range(0, 20, 1)):
        part = read_waveform(fastcopy(cut, start=float(start), duration=float(stop - start)))
        np.testing.assert_allclose(part, whole[16000 * start : 16000 * stop], atol=1e-6)


def test_a_block_of_frames_ends_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp3"
    frames = encode(speech(6.0), path)
    path.write_bytes(b"".join(frames[1:40]) + ID3V2 + b"".join(frames[40:]) + APE)
    monkeypatch.setattr(mp3, "_LARGEST_FRAME", 600)
    for size in (1200, 1201, 5000, 1 << 20):
        monkeypatch.setattr(mp3, "_BLOCK_BYTES", size)
        assert mp3.count_samples(path, 0) == (len(frames) - 1) * 576
