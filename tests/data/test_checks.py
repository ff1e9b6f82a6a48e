"""Test that a recording is checked where it enters a corpus, and that the check says what is wrong."""

import gzip
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet, Recording
from lhotse.utils import fastcopy

from fastssl.data.audio import AudioError, check_rate, read_waveform
from fastssl.data.corpus import open_corpus
from fastssl.data.recordings import read_chunks
from fastssl.names import shown
from tests.data.damage import run_damaged
from tests.data.making import noise, write

Line = dict[str, Any]


@pytest.fixture
def line(tmp_path: Path) -> Line:
    """Return a good line of a manifest: a cut of all 6 s of a recording."""
    cut = Recording.from_file(write(tmp_path / "audio" / "a.wav", noise(6.0))).to_cut()
    return dict(cut.to_dict())


def problems_of(path: Path) -> list[str]:
    return [str(problem) for problem in open_corpus(path, max_bad_fraction=0.9).problems]


def problem_of(line: Line, folder: Path) -> str:
    """Return the only problem of a manifest of two lines, of which the first is good."""
    good = Recording.from_file(write(folder / "good.wav", noise(6.0))).to_cut().to_dict()
    manifest = folder / "cuts.jsonl"
    manifest.write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    (problem,) = problems_of(manifest)
    return problem


def lying(factor: float) -> Callable[[Line], None]:
    def lie(line: Line) -> None:
        line["duration"] = 6.0 * factor
        line["recording"] |= {"num_samples": round(96000 * factor), "duration": 6.0 * factor}

    return lie


def put(**fields: object) -> Callable[[Line], None]:
    return lambda line: line.update(fields)


def put_recording(**fields: object) -> Callable[[Line], None]:
    return lambda line: line["recording"].update(fields)


def put_source(**fields: object) -> Callable[[Line], None]:
    return lambda line: line["recording"]["sources"][0].update(fields)


def transformed(name: str, **kwargs: object) -> Callable[[Line], None]:
    return put_recording(transforms=[{"name": name, "kwargs": kwargs}])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(id=7), "has id 7, expected text"),
        (put(id="x" * 5000), "has id 'xxx"),
        (put(id="\ud800"), "has id"),
        (put(start=-1.0), "has start -1.0, expected a finite number from 0 on"),
        (put(start=float("nan")), "has start nan"),
        (put(start="0"), "has start '0'"),
        (put(start=True), "has start True"),
        (put(duration=float("inf")), "has duration inf, expected a finite number above 0"),
        (put(duration=0), "has duration 0"),
        (put(duration=10**400), "has duration 1000"),
        (put(duration=20.0), "lasts 6.00 s, but its cut ends at 20.00 s"),
        (put(start=3.2, duration=3.0), "its cut ends at 6.20 s"),
        (put(duration=1e9), "its cut ends at 1000000000.00 s"),
        (put(channel=1), r"has channels [0], but its manifest asks for [1]"),
        (put(channel="0"), "has channel '0', expected"),
        (put(channel=None), "has channel"),
        (put(custom=[1]), "is not a cut or a recording: AttributeError"),
        (put(custom={"window_of": 5}), "has window_of 5, expected an object with id, start and duration"),
        (put(custom={"window_of": {"id": "w", "start": 0.0, "duration": "6"}}), "has window_of"),
        (put(custom={"tar_member": None}), "has tar_member None, expected [offset, size] in bytes"),
        (put(custom={"tar_member": [0, 100]}), "has source"),
        (put(recording=None), "is not a cut or a recording"),
        (put(recording=[]), "is not a cut or a recording"),
        (put(supervisions=5), "is not a cut or a recording"),
        (put(type="PaddingCut"), "is not a cut or a recording"),
        (put_recording(id=None), "has recording id None"),
        (put_recording(sampling_rate=16000.5), "has sampling_rate 16000.5, expected a whole number of Hz"),
        (put_recording(sampling_rate=True), "has sampling_rate True"),
        (put_recording(sampling_rate=100), "is at 100 Hz, expected at least 4000 Hz; its header may be damaged"),
        (put_recording(sampling_rate=99_999_990), "needs a filter of 65"),
        (put_recording(num_samples=0), "has num_samples 0, expected a whole number above 0"),
        (put_recording(num_samples=96000.0), "has num_samples 96000.0"),
        (
            put_recording(duration=9.0),
            "has a recording duration of 9.00 s, but num_samples and sampling_rate give",
        ),
        (put_recording(sources=[]), "has sources [], expected a list"),
        (put_recording(channel_ids={"0": 1}), "has channel_ids"),
        (put_recording(transforms=[7]), "is not a cut or a recording"),
        (put_recording(transforms=None), "is not a cut or a recording"),
        (put_source(channels=[0, 0]), "has a channel twice"),
        (put_source(channels=[]), "has channels of a source []"),
        (put_source(source=7), "has source 7, expected a path"),
        (put_source(source="x\0y"), "is not the name of a file"),
        (put_source(type="memory"), "has audio in memory"),
        (transformed("Speed", factor=float("nan")), "has factor of a transform nan"),
        (transformed("Speed", factor=1e-9), "has factor of a transform"),
        (transformed("Resample", source_sampling_rate=1, target_sampling_rate=16000), "multiply its samples"),
        (transformed("Resample", source_sampling_rate=16001, target_sampling_rate=16003), "needs a filter of"),
        (put_recording(transforms=[{"name": "Volume"}]), "has a transform, or an impulse response, that lacks a field"),
        (
            put_recording(
                transforms=[
                    {"name": "Volume", "kwargs": {"factor": 2.0}},
                    {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": {"sampling_rate": 16000}}},
                ]
            ),
            "is not a cut or a recording",
        ),
        (put_recording(transforms=[{"name": "Volume", "kwargs": {"factor": 1.0}}] * 21), "has 21 transforms"),
        (transformed("Volume", factor=[1.0]), "has factor of a transform [1.0], expected a finite number"),
        (transformed("Volume", factor=10**400), "has factor of a transform 1000"),
        (
            transformed("Narrowband", codec="mulaw", source_sampling_rate=1, restore_orig_sr=True),
            "has transforms that multiply its samples by more than 100",
        ),
        (
            transformed("Narrowband", codec="mulaw", source_sampling_rate=10**7 + 1, restore_orig_sr=True),
            "needs a filter of",
        ),
        (transformed("ReverbWithImpulseResponse", rir_generator="sh"), "has rir_generator 'sh', expected an object"),
        (transformed("ReverbWithImpulseResponse", rir_generator={"sr": 10**9}), "may have more than 200,000 samples"),
        (transformed("ReverbWithImpulseResponse", rir_generator={"max_T60": 1e9}), "may have more than 200,000"),
        (transformed("ReverbWithImpulseResponse", rir_generator={"sr": "16000"}), "has sr of rir_generator '16000'"),
        (
            transformed("ReverbWithImpulseResponse", rir_generator={"sr": 16000}, rir_channels=[0] * 101),
            "has transforms that multiply its samples by more than 100",
        ),
        (lying(1000), "is said to have 96,000,000"),
        (lying(1e6), "is said to last more than 10 days"),
    ],
)
def test_what_a_line_says_is_checked(
    change: Callable[[Line], None], reason: str, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastssl.data.checks._SAMPLES_PER_BYTE", 10)
    change(line)
    problem = problem_of(line, tmp_path)
    of_file = reason.startswith(("is said to have", "is not the name of a file"))
    assert problem.startswith(
        shown(line["recording"]["sources"][0]["source"]) if of_file else f"{tmp_path}/cuts.jsonl, line 2"
    )
    assert reason in problem
    assert "\n" not in problem
    assert len(problem) < 600


def test_a_recording_that_is_a_little_shorter_than_its_cut_is_used(line: Line, tmp_path: Path) -> None:
    (tmp_path / "cuts.jsonl").write_text(json.dumps(line | {"duration": 6.09}) + "\n")
    (cut,) = open_corpus(tmp_path / "cuts.jsonl").cuts
    assert len(read_waveform(cut)) == 96000


@pytest.mark.parametrize("bits", ["PCM_16", "PCM_24"])
def test_silence_is_as_long_as_it_says(bits: str, tmp_path: Path) -> None:
    """The most that a byte of FLAC contains is less than what is believed."""
    write(tmp_path / "silence.flac", np.zeros((16000 * 600, 1), np.float32), subtype=bits)
    size = (tmp_path / "silence.flac").stat().st_size
    assert size < 16000 * 600 / 200
    assert open_corpus(tmp_path, window_s=None).duration_s == 600


def test_a_cut_that_is_longer_than_its_recording_is_not_shortened(tmp_path: Path) -> None:
    cut = Recording.from_file(write(tmp_path / "a.wav", noise(6.0))).to_cut()
    with pytest.raises(AudioError, match=r"lasts 6\.00 s, but its cut ends at 20\.00 s"):
        read_waveform(fastcopy(cut, duration=20.0))
    with pytest.raises(AudioError, match=r"lasts 6\.00 s, but its cut ends at 20\.00 s"):
        next(read_chunks(fastcopy(cut, duration=20.0), chunk_s=10.0, overlap_s=1.0, normalize=False))
    lying = fastcopy(cut.recording, num_samples=320000, duration=20.0).to_cut()
    with pytest.raises(AudioError, match=r"ends after 6\.00 s, but its header says 20\.00 s"):
        read_waveform(lying)
    with pytest.raises(AudioError, match=r"ends after 6\.00 s|does not decode"):
        list(read_chunks(lying, chunk_s=5.0, overlap_s=1.0, normalize=False))


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 16001, 22050, 44100, 48000, 96010, 192000, 384000])
def test_rates_that_are_used(rate: int) -> None:
    check_rate(rate)


@pytest.mark.parametrize("rate", [1, 3999, 192_010, 655_330, 99_999_990, 10**18 + 1])
def test_rates_that_are_refused(rate: int) -> None:
    with pytest.raises(AudioError, match=r"expected at least 4000 Hz|needs a filter of \d+ MB"):
        check_rate(rate)


def test_the_headers_of_files_are_checked(tmp_path: Path) -> None:
    write(tmp_path / "good.wav", noise(3.0))
    write(tmp_path / "slow.wav", noise(300.0, rate=100), rate=100)
    write(tmp_path / "odd.flac", noise(0.1, rate=655_330), rate=655_330)
    corpus = open_corpus(tmp_path, min_duration_s=0, max_bad_fraction=0.9)
    assert [str(problem) for problem in corpus.problems] == [
        f"{tmp_path}/odd.flac needs a filter of 427 MB to be resampled from 655330 to 16000 Hz; resample it to a usual "
        "rate, such as 16000 Hz, first",
        f"{tmp_path}/slow.wav is at 100 Hz, expected at least 4000 Hz; its header may be damaged",
    ]


def test_only_regular_files_are_opened(line: Line, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.wav"
    os.mkfifo(fifo)
    write(tmp_path / "good.wav", noise(3.0))
    assert [str(problem) for problem in open_corpus(tmp_path, max_bad_fraction=0.9).problems] == [
        f"{fifo} is not a regular file"
    ]
    with pytest.raises(ValueError, match=r"fifo\.wav is not a regular file"):
        open_corpus(fifo)
    for path, reason in (
        (str(fifo), "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "gone.wav"), "does not exist"),
        (f"{tmp_path}/good.wav/x.wav", "does not exist"),
        ("x" * 4000, "cannot be opened: File name too long"),
    ):
        line["recording"]["sources"][0]["source"] = path
        assert problem_of(line, tmp_path / "audio") == f"{path} {reason}"


def test_an_impulse_response_is_checked(line: Line, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.wav")
    room = json.loads(json.dumps(line["recording"] | {"id": "room"}))
    room["sources"][0]["source"] = str(tmp_path / "fifo.wav")
    transformed("ReverbWithImpulseResponse", rir=room, rir_channels=[0])(line)
    assert "has a transform with an impulse response that is not a regular file" in problem_of(line, tmp_path)


def test_an_impulse_response_is_not_an_hour_long(line: Line, tmp_path: Path) -> None:
    """A silent hour takes a few kB as FLAC, and each crop would be convolved with it."""
    path = write(tmp_path / "room.flac", np.zeros(61 * 16000, np.float32))
    room = Recording.from_file(path, recording_id="room").to_dict()
    transformed("ReverbWithImpulseResponse", rir=room, rir_channels=[0])(line)
    problem = problem_of(line, tmp_path)
    assert "has a transform with an impulse response that lasts 61.00 s, expected at most 60 s" in problem


@pytest.mark.parametrize("where", ["recording", "impulse response"])
def test_no_transform_is_left_out_silently(where: str, line: Line, tmp_path: Path) -> None:
    """Lhotse reads a recording without any of its transforms if one of them lacks its name or options."""
    incomplete = [{"name": "Volume", "kwargs": {"factor": 0.5}}, {"kwargs": {"factor": 0.5}}]
    if where == "recording":
        put_recording(transforms=incomplete)(line)
    else:
        room = json.loads(json.dumps(line["recording"] | {"id": "room", "transforms": incomplete}))
        transformed("ReverbWithImpulseResponse", rir=room, rir_channels=[0])(line)
    assert "has a transform, or an impulse response, that lacks a field" in problem_of(line, tmp_path)


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_a_manifest_must_be_a_regular_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"source: .*{name} is not a Lhotse manifest .*: it is not a regular file"):
        open_corpus(tmp_path / name)


BAD_LINES = [
    (b'{"id": ', "is not valid JSON"),
    (b'{"id": "\xff"}', "is not valid JSON: 'utf-8' codec"),
    (b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
    (b'{"id": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    (b"[1, 2]", "is not a cut or a recording"),
    (b'{"id": "a", "text": "hello"}', "is not a cut or a recording"),
    (b'{"a":' * 200 + b"1" + b"}" * 200, "is nested more than 100 deep"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_a_bad_line_is_a_problem_and_the_others_are_used(bad: bytes, reason: str, line: Line, tmp_path: Path) -> None:
    good = [json.dumps(line | {"id": f"cut {index}"}).encode() for index in range(5)]
    manifest = tmp_path / "cuts.jsonl.gz"
    manifest.write_bytes(gzip.compress(b"\n".join([*good[:3], b"", bad, *good[3:], b""])))
    corpus = open_corpus(manifest, max_bad_fraction=0.2)
    assert [cut.id for cut in corpus.cuts] == [f"cut {index}" for index in range(5)]
    assert [str(problem)[: len(f"{manifest}, line 5 {reason}")] for problem in corpus.problems] == [
        f"{manifest}, line 5 {reason}"
    ]
    with pytest.raises(ValueError, match=r"1 of 6 recordings .*\n.*line 5 is n"):
        open_corpus(manifest)


def test_a_manifest_that_breaks_off_is_refused(line: Line, tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    lines = [json.dumps(line | {"id": draws.bytes(500).hex()}).encode() + b"\n" for _ in range(100)]
    whole = b"".join(lines)
    (tmp_path / "cut.jsonl").write_bytes(whole[:-20])
    packed = gzip.compress(whole)
    (tmp_path / "short.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    middle = len(packed) // 2
    (tmp_path / "broken.jsonl.gz").write_bytes(packed[:middle] + b"\xff" * 100 + packed[middle + 100 :])
    (tmp_path / "sum.jsonl.gz").write_bytes(packed[:-8] + b"\0" * 8)
    with pytest.raises(ValueError, match=r"cut\.jsonl is damaged after line 99, .*lost: the next line is cut off"):
        open_corpus(tmp_path / "cut.jsonl", max_bad_fraction=0.9)
    for name in ("short", "broken", "sum"):
        with pytest.raises(ValueError, match=rf"{name}\.jsonl\.gz is damaged after line \d+, .*copy or make it again"):
            open_corpus(tmp_path / f"{name}.jsonl.gz", max_bad_fraction=0.9)


def test_a_line_may_be_long_but_not_endless(line: Line, tmp_path: Path) -> None:
    manifest = tmp_path / "cuts.jsonl.gz"
    manifest.write_bytes(gzip.compress(b" " * 2**24 + b"\n"))
    with pytest.raises(ValueError, match="line 1 is longer than 16 MB"):
        open_corpus(manifest)
    manifest.write_bytes(gzip.compress(json.dumps(line | {"custom": {"note": "x" * 10**6}}).encode()))
    assert open_corpus(manifest).num_recordings == 1


def test_a_manifest_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress((b" " * 2**23 + b"\n") * 9))
    with pytest.raises(ValueError, match=r"cuts\.jsonl\.gz .* unpacks to more than 500 times its size"):
        open_corpus(tmp_path / "cuts.jsonl.gz")
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(b"\n" * 300_000))
    with pytest.raises(ValueError, match="200001 of its first 200001 lines are blank"):
        open_corpus(tmp_path / "cuts.jsonl.gz")


@pytest.mark.parametrize("bad", ["{", '{"id":"","start":0,"duration":1,"channel":0,"type":"MonoCut"}'])
def test_a_manifest_of_short_bad_lines_is_not_read_to_its_end(bad: str, line: Line, tmp_path: Path) -> None:
    (tmp_path / "cuts.jsonl").write_text(json.dumps(line) + f"\n{bad}" * 30_000 + "\n")
    with pytest.raises(ValueError, match=r"10002 of the first 10003 lines cannot be used, .*, line 10003 .*"):
        open_corpus(tmp_path / "cuts.jsonl", max_bad_fraction=1.0)


def test_an_empty_manifest_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        open_corpus(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"no audio in .*b\.jsonl"):
        open_corpus(tmp_path / "b.jsonl")


def test_a_manifest_from_windows_is_read(line: Line, tmp_path: Path) -> None:
    text = "\r\n".join(json.dumps(line | {"id": name}) for name in "ab") + "\r\n"
    (tmp_path / "cuts.jsonl").write_text(text, encoding="utf-8-sig", newline="")
    assert [cut.id for cut in open_corpus(tmp_path / "cuts.jsonl").cuts] == ["a", "b"]


def test_folders_may_be_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "good.wav", noise(3.0))
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        Path("d").mkdir()
        os.chdir("d")
    file.rename("deep.wav")
    monkeypatch.chdir(tmp_path)
    (cut,) = open_corpus(tmp_path).cuts
    assert cut.id == "d/" * 1100 + "deep.wav"
    assert len(read_waveform(cut)) == 48000
    Path("d/" * 1100, "deep.wav").unlink()
    for number in range(1100, 0, -1):  # pytest would recurse
        Path("d/" * number).rmdir()


def test_the_only_channel_is_one_of_the_channels(tmp_path: Path) -> None:
    cut = Recording.from_file(write(tmp_path / "two.wav", noise(6.0, channels=2))).to_cut().to_dict()
    assert problem_of(cut | {"custom": {"rules": 2, "only_channel": 2}}, tmp_path).endswith(
        "line 2 has only_channel 2, expected one of [0, 1]"
    )


@pytest.mark.parametrize("source", ["x" * 5000, "x\0", "/".join(["x" * 200] * 30)])
def test_a_source_that_cannot_be_looked_at_is_named(source: str) -> None:
    with pytest.raises(
        ValueError, match=r"source: .* (cannot be opened: File name too long|is not the name of a file)"
    ):
        open_corpus(source)


def test_a_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "good.wav", noise(3.0))
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert problems_of(tmp_path) == [f"{closed} cannot be listed: Permission denied"]
    with pytest.raises(ValueError, match=r"1 of 1 recordings .*\n.*closed cannot be listed"):
        open_corpus(closed)


def test_windows_of_two_recordings_are_not_joined(line: Line, tmp_path: Path) -> None:
    other = json.loads(json.dumps(line))
    other["recording"]["id"] = "other"
    parent = {"custom": {"window_of": {"id": "whole", "start": 0.0, "duration": 6.0}}}
    lines = [line | parent, other | parent | {"id": "another"}]
    (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(ValueError, match="2 cuts with id 'whole'"):
        open_corpus(tmp_path / "cuts.jsonl", window_s=None)


@pytest.fixture
def shar(tmp_path: Path) -> Path:
    for index in range(4):
        write(tmp_path / "audio" / f"{index}.wav", noise(3.0, seed=index))
    (tmp_path / "shar").mkdir()
    open_corpus(tmp_path / "audio").cuts.to_shar(tmp_path / "shar", fields={"recording": "wav"}, shard_size=10)
    return tmp_path / "shar"


def test_a_bad_line_of_a_shard_is_a_problem(shar: Path) -> None:
    path = shar / "cuts.000000.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join([lines[0], b"{", *lines[2:], b""])))
    corpus = open_corpus(shar, max_bad_fraction=0.5)
    assert [cut.id for cut in corpus.cuts] == ["0.wav", "2.wav", "3.wav"]
    assert [str(problem).partition(":")[0] for problem in corpus.problems] == [f"{path}, line 2 is not valid JSON"]
    for cut, seed in zip(corpus.cuts, (0, 2, 3), strict=True):
        np.testing.assert_allclose(read_waveform(cut), noise(3.0, seed=seed)[:, 0], atol=1e-4)


def test_a_mixed_cut_in_a_shard_is_a_problem(shar: Path) -> None:
    path = shar / "cuts.000000.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    track = {"type": "MonoCut", "cut": json.loads(lines[1]), "offset": 0}
    mixed = json.dumps({"id": "1.wav", "type": "MixedCut", "tracks": [track]}).encode()
    path.write_bytes(gzip.compress(b"\n".join([lines[0], mixed, *lines[2:], b""])))
    (problem,) = open_corpus(shar, max_bad_fraction=0.5).problems
    assert str(problem) == f"{path}, line 2 is not a cut of exactly one recording"


def test_a_bad_recording_in_a_tar_file_is_a_problem(shar: Path) -> None:
    path = shar / "recording.000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"num_samples": 48000', b'"num_samples": 48e04', 1))
    (problem,) = open_corpus(shar, max_bad_fraction=0.5).problems
    assert "cuts.000000.jsonl.gz, line 1 has num_samples 480000.0" in str(problem)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], r"unexpected end of data|ends before the recording of"),
        (lambda data: b"", "empty file"),
        (lambda data: b"\xff" * 2000, r"bad|invalid"),
        # A size of -1024 bytes, in base 256, would send `tarfile` back to the same header for ever.
        (lambda data: _with_size(data, b"\xff" * 10 + b"\xfc\x00"), r"backwards|bad|damaged"),
        (lambda data: _with_size(data, b"\x80" + b"\x7f" * 11), r"damaged"),
    ],
)
def test_a_damaged_tar_file_is_named(damage: Callable[[bytes], bytes], reason: str, shar: Path) -> None:
    path = shar / "recording.000000.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"source: {path} .*({reason}).*copy or make it again"):
        open_corpus(shar, max_bad_fraction=0.9)


def _with_size(data: bytes, size: bytes) -> bytes:
    """Write another size into the header of the first member, with the right checksum."""
    header = data[:124] + size + data[136:148] + b" " * 8 + data[156:512]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:] + data[512:]


def test_the_tar_files_of_a_shar_must_be_regular_files(shar: Path) -> None:
    (shar / "recording.000000.tar").unlink()
    os.mkfifo(shar / "recording.000000.tar")
    with pytest.raises(ValueError, match=r"recording\.000000\.tar is not a regular file"):
        open_corpus(shar)


@pytest.mark.parametrize("member", [[0, 10**12], [10**12, 5], [-1, 5], [0, 0], [1], "ab", [True, 5], [1.0, 5]])
def test_a_place_in_a_tar_file_must_be_inside_it(member: object, shar: Path, tmp_path: Path) -> None:
    cuts = list(open_corpus(shar).cuts)
    cuts[0].custom["tar_member"] = member
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    (problem,) = problems_of(tmp_path / "cuts.jsonl.gz")
    assert "has tar_member" in problem or "is said to end after" in problem


def test_damaged_manifests_are_survived(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lhotse's
        outcomes = run_damaged(tmp_path, count=150, seed=0)
    assert sum(outcomes.values()) == 150
    assert min(outcomes["refused"], outcomes["opened with problems"], outcomes["opened"]) >= 5
