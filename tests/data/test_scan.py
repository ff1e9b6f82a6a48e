import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from numpy.typing import NDArray

from fastssl.data import joined
from fastssl.data.audio import AudioError, read_waveform
from fastssl.data.checks import check_source
from fastssl.data.corpus import enter_file, open_corpus, write_manifest
from fastssl.data.joined import JOINABLE, _ends_as_said, _utf8, is_joined
from fastssl.data.ogg import count_chained
from fastssl.data.scan import Problem, scan_file
from tests.data.making import noise, write


def scanned(path: Path, *, rules: int = 2) -> Cut:
    cut = scan_file(path, recording_id="a", rules=rules)
    assert not isinstance(cut, Problem), cut
    return cut


def encoded(samples: NDArray[np.float32], **settings: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, **settings)
    return file.getvalue()


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_chained_ogg_is_reported(tmp_path: Path, subtype: str) -> None:
    parts = [encoded(noise(seconds), format="OGG", subtype=subtype) for seconds in (3.0, 4.0)]
    path = tmp_path / "a.ogg"
    path.write_bytes(b"".join(parts))
    problem = scan_file(path, recording_id="a")
    assert isinstance(problem, Problem)
    assert "consists of 2 Ogg streams in a row, of which only the first (3.00 s) would be read" in problem.reason
    assert scanned(path, rules=1).duration == 3.0
    path.write_bytes(parts[0] * 2)  # also with the same serial number
    assert isinstance(scan_file(path, recording_id="a"), Problem)
    path.write_bytes(parts[0])
    assert scanned(path).duration == 3.0


@pytest.mark.parametrize("kind", sorted(JOINABLE))
@pytest.mark.parametrize("seconds", [(3.0, 4.0), (4.1, 0.2), (20.0, 1.0), (3.0, 3.01)])
def test_joined_files_are_reported(tmp_path: Path, kind: str, seconds: tuple[float, float]) -> None:
    parts = [encoded(noise(one), format=kind) for one in seconds]
    path = tmp_path / "a.wav"
    path.write_bytes(b"".join(parts))
    problem = scan_file(path, recording_id="a")
    assert isinstance(problem, Problem)
    assert f"is followed by another {kind} file, but only the first (" in problem.reason
    assert scanned(path, rules=1).duration < sum(seconds) + 0.1
    for whole in (parts[0], parts[0] + bytes(100_000), parts[0][: len(parts[0]) // 2]):
        path.write_bytes(whole)
        assert not is_joined(path, kind)


def test_frames_of_flac_are_numbered_as_in_utf_8() -> None:
    assert [_utf8(number) for number in (0, 127, 128, 2047, 2048, 65535, 65536)] == [
        chr(number).encode() for number in (0, 127, 128, 2047, 2048, 65535, 65536)
    ]
    assert _utf8(2**31 - 1) == b"\xfd" + b"\xbf" * 5


def test_streams_that_begin_together_are_no_chain(tmp_path: Path) -> None:
    def page(flags: int, body: int) -> bytes:
        return b"OggS\0" + bytes([flags]) + bytes(20) + bytes([1, body]) + bytes(body)

    path = tmp_path / "a.ogg"
    path.write_bytes(page(2, 30) + page(2, 40) + page(0, 255) + page(0, 0) + page(4, 10))
    assert count_chained(path) == 1
    path.write_bytes(path.read_bytes() * 3 + b"tail")
    assert count_chained(path) == 3
    path.write_bytes(b"RIFF")
    assert count_chained(path) == 0


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.wav", "GSM610"), ("a.w64", "GSM610"), ("a.wav", "G721_32"), ("a.au", "G723_24")]
)
def test_formats_that_cannot_seek_are_decoded_from_the_start(tmp_path: Path, name: str, subtype: str) -> None:
    cut = scanned(write(tmp_path / name, noise(3.0), subtype=subtype))
    whole = read_waveform(cut)
    assert abs(len(whole) - 48000) < 200
    np.testing.assert_array_equal(read_waveform(fastcopy(cut, start=1.5, duration=1.0)), whole[24000:40000])


@pytest.mark.parametrize("rules", [1, 2])
def test_absurd_samples_are_refused_by_name(tmp_path: Path, rules: int) -> None:
    samples = noise(2.0)
    samples[9000] = -1e29
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    cut = scanned(path, rules=rules)
    with pytest.raises(AudioError, match=r"has samples of 1e\+29, expected at most 1"):
        read_waveform(cut)
    assert len(read_waveform(fastcopy(cut, start=1.0, duration=1.0))) == 16000
    # Integers that nobody scaled are audio.
    write(path, noise(2.0) * np.float32(2**31), subtype="FLOAT")
    assert np.abs(read_waveform(scanned(path, rules=rules))).max() > 1e8


def opposite(seconds: float = 3.0, *, likeness: float = 1.0) -> NDArray[np.float32]:
    """Return (T, 2): the second channel is louder, and in opposite phase to the first."""
    left = noise(seconds)
    other = noise(seconds, seed=1)
    return np.hstack([left, -1.2 * (likeness * left + np.sqrt(1 - likeness**2) * other)]).astype(np.float32)


def test_channels_that_cancel_are_not_averaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "audio"
    samples = opposite()
    write(folder / "opposite.wav", samples, subtype="FLOAT")
    write(folder / "stereo.wav", noise(3.0, channels=2), subtype="FLOAT")
    write(folder / "silent.wav", np.zeros((48000, 2), np.float32), subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        corpus = open_corpus(folder, window_s=2.0)
    assert "the channels of 1 recordings cancel" in caplog.text
    assert "opposite.wav, read from channel 1" in corpus.notes[0]
    cuts = {cut.id: cut for cut in corpus.cuts}
    # Every part of a recording is read from the same channel, and from the one that is requested, if one is.
    for begin, name in ((0, "opposite.wav@0.000s"), (24000, "opposite.wav@1.500s")):
        np.testing.assert_array_equal(read_waveform(cuts[name]), samples[begin : begin + 24000, 1])
        np.testing.assert_array_equal(read_waveform(cuts[name], channel=0), samples[begin : begin + 24000, 0])
    expected = noise(3.0, channels=2)[:24000].mean(axis=1)
    np.testing.assert_array_equal(read_waveform(cuts["stereo.wav@0.000s"]), expected)
    assert "only_channel" not in cuts["silent.wav@0.000s"].custom

    write_manifest(corpus, tmp_path / "cuts.jsonl.gz")
    again = {cut.id: cut for cut in open_corpus(tmp_path / "cuts.jsonl.gz", min_duration_s=1).cuts}
    np.testing.assert_array_equal(read_waveform(again["opposite.wav@0.000s"]), samples[:24000, 1])
    # Old rules average, also the cuts of a newer manifest.
    for source in (folder, tmp_path / "cuts.jsonl.gz"):
        old = {cut.id: cut for cut in open_corpus(source, min_duration_s=1, window_s=2.0, rules=1).cuts}
        np.testing.assert_array_equal(read_waveform(old["opposite.wav@0.000s"]), samples[:24000].mean(axis=1))


def test_cuts_of_other_software_are_probed_too(tmp_path: Path) -> None:
    samples = opposite()
    recording = scanned(write(tmp_path / "a.wav", samples, subtype="FLOAT"), rules=1)
    assert recording.custom is None
    CutSet.from_cuts([recording]).to_file(tmp_path / "cuts.jsonl.gz")
    (cut,) = open_corpus(tmp_path / "cuts.jsonl.gz").cuts
    np.testing.assert_array_equal(read_waveform(cut), samples[:, 1])


@pytest.mark.parametrize(("likeness", "averaged"), [(0.5, True), (0.8, True), (0.95, False)])
def test_how_much_must_cancel(tmp_path: Path, likeness: float, averaged: bool) -> None:
    cut = scanned(write(tmp_path / "a.wav", opposite(likeness=likeness), subtype="FLOAT"))
    assert ("only_channel" not in cut.custom) == averaged


def test_many_unrelated_channels_do_not_cancel(tmp_path: Path) -> None:
    assert "only_channel" not in scanned(write(tmp_path / "a.wav", noise(2.0, channels=32))).custom


@pytest.mark.parametrize("extension", ["aif", "aifc", "aiff", "au", "caf", "rf64", "snd", "sph", "w64", "wave"])
def test_what_libsndfile_reads_is_read(tmp_path: Path, extension: str) -> None:
    kind = {"aif": "AIFF", "aifc": "AIFF", "snd": "AU", "sph": "NIST", "wave": "WAV"}.get(extension, extension.upper())
    path = tmp_path / f"a.{extension}"
    path.write_bytes(encoded(noise(3.0), format=kind, subtype="PCM_16"))
    (cut,) = open_corpus(tmp_path).cuts
    np.testing.assert_allclose(read_waveform(cut), noise(3.0)[:, 0], atol=1e-4)
    with pytest.raises(ValueError, match="no audio in"):
        open_corpus(tmp_path, rules=1)


def test_audio_that_is_not_read_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.wav", noise(3.0))
    for name in ("1.m4a", "2.M4A", "3.wma", ".hidden.m4a", "notes.txt"):
        (tmp_path / name).write_bytes(b"content")
    with caplog.at_level(logging.WARNING):
        corpus = open_corpus(tmp_path)
    assert len(corpus.cuts) == 1
    assert corpus.problems == []
    assert caplog.messages == corpus.notes
    assert "not read: 2 ending in .m4a, 1 ending in .wma; convert them, for example: ffmpeg -i in.m4a" in caplog.text
    (tmp_path / "a.wav").unlink()
    with pytest.raises(ValueError, match=r"no audio in .*2 ending in \.m4a"):
        open_corpus(tmp_path)


def test_rules_that_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", noise(3.0))
    for rules in (0, 3):
        with pytest.raises(ValueError, match=f"rules: must be from 1 to 2, got {rules}"):
            open_corpus(tmp_path, rules=rules)


def test_a_size_that_no_file_has_is_not_believed(tmp_path: Path) -> None:
    whole = encoded(noise(3.0), format="RF64")
    (tmp_path / "a.rf64").write_bytes(whole[:20] + b"\xff" * 24 + whole[44:])
    assert not is_joined(tmp_path / "a.rf64", "RF64")


@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_does_not_decide_the_channel(tmp_path: Path) -> None:
    samples = np.repeat(noise(3.0), 2, axis=1) * np.array([1.0, -0.9], np.float32)
    samples[24000, 1] = np.inf
    cut = scanned(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    assert cut.custom["only_channel"] == 0


def test_a_sparse_flac_is_not_searched_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "_MOST_SEARCHED", 1 << 20)
    path = tmp_path / "a.flac"
    path.write_bytes(encoded(noise(3.0), format="FLAC"))
    os.truncate(path, 2**40)
    assert not is_joined(path, "FLAC")


@pytest.mark.parametrize("samples", [1, 192, 257, 4096, 4097, 8192, 70_000])
def test_the_last_frame_of_a_flac_is_found(samples: int) -> None:
    whole = encoded(noise(samples / 16000), format="FLAC")
    assert _ends_as_said(io.BytesIO(whole), whole[:100])
    assert not _ends_as_said(io.BytesIO(whole + whole[:42] + bytes(100_000)), whole[:100])


def with_a_hole(path: Path, content: bytes, at: int, size: int = 2**40) -> Path:
    """Write a file with a hole in its content: it takes up no space, but all its zeros can be read."""
    with path.open("wb") as file:
        file.write(content[:at])
        file.truncate(at + size)
        file.seek(at + size)
        file.write(content[at:])
    return path


# How to encode each kind of file that libsndfile would search, with the length header of an MP3 or without one.
SEARCHED = {
    "a.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    "a.flac": {"format": "FLAC"},
    "a.mp3": {"format": "MP3"},
    "streamed.mp3": {"format": "MP3"},
}


@pytest.mark.parametrize("place", ["front", "middle", "end"])
@pytest.mark.parametrize("name", SEARCHED)
def test_compressed_audio_is_not_searched_through_a_hole(tmp_path: Path, name: str, place: str) -> None:
    """Each of these would take hours: the decoder looks for its next frame or its last page in every byte."""
    content = encoded(noise(3.0), **SEARCHED[name])
    if name == "streamed.mp3":
        content = content[content.index(content[:2], 4) :]
    intact = tmp_path / f"intact{Path(name).suffix}"
    intact.write_bytes(content)
    cut = scanned(intact)
    at = {"front": 0, "middle": len(content) // 2, "end": len(content)}[place]
    path = with_a_hole(tmp_path / name, content, at)
    problem = enter_file(path, recording_id="a")
    assert isinstance(problem, Problem)
    assert problem.name == str(path)
    assert "has holes of more than 256 MB" in problem.reason
    # A manifest may name it, too.
    path.replace(intact)
    with pytest.raises(AudioError, match="has holes of more than 256 MB"):
        check_source(cut, cut.recording.sources[0])
    for one in (cut, cut.perturb_volume(2.0)):
        with pytest.raises(AudioError, match="has holes of more than 256 MB"):
            read_waveform(one)


def test_holes_that_cost_nothing_are_no_fault(tmp_path: Path) -> None:
    """A small hole is searched in no time, and digital silence in a WAV may be a hole on some file systems."""
    flac = with_a_hole(tmp_path / "a.flac", content := encoded(noise(3.0), format="FLAC"), len(content), 2**20)
    wav = with_a_hole(tmp_path / "a.wav", content := encoded(noise(3.0), format="WAV"), len(content))
    for path in (flac, wav):
        assert isinstance(cut := enter_file(path, recording_id="a"), Cut)
        assert len(read_waveform(cut)) == 48000


def test_a_hole_in_a_tar_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = with_a_hole(tmp_path / "recording.000000.tar", content := encoded(noise(3.0), format="WAV"), len(content))
    wav = tmp_path / "a.wav"
    wav.write_bytes(content)
    cut = scanned(wav)
    cut.recording.sources[0].source = f"{path}/a.wav"
    cut.custom = {**cut.custom, "tar_member": [0, 2**40]}
    with pytest.raises(AudioError, match="has holes of more than 256 MB"):
        read_waveform(cut)
    cut.custom["tar_member"] = [0, len(content)]
    assert len(read_waveform(cut)) == 48000


@pytest.mark.parametrize("content", [b"<html>not found</html>" * 20, b"\xff\xfb\x90\x64" + bytes(100)])
def test_what_is_no_audio_is_not_called_missing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.mp3"
    path.write_bytes(content)
    problem = scan_file(path, recording_id="page")
    assert isinstance(problem, Problem)
    assert problem.reason == "does not decode: it contains no audio of a known format"


def test_a_name_that_no_file_can_have_is_cut() -> None:
    assert str(Problem("x" * 100_000, "cannot be opened")) == "x" * 97 + "... cannot be opened"
    assert str(Problem("x" * 4096, "cannot be opened")).startswith("x" * 4096)
