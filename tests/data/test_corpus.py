import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, Recording, RecordingSet

from fastssl.data.audio import read_waveform
from fastssl.data.corpus import Corpus, cut_name, open_corpus, split_corpus, write_manifest
from tests.data.making import noise, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of recordings of 3 to 6 s with various formats, rates and channel counts."""
    root = tmp_path / "audio"
    write(root / "b" / "first.wav", noise(3.0))
    write(root / "b" / "SECOND.WAV", noise(3.5, rate=8000), rate=8000)
    write(root / "a.flac", noise(4.0, rate=44100, channels=2), rate=44100)
    write(root / "b" / "c" / "deep.ogg", noise(5.0))
    write(root / "d.mp3", noise(6.0))
    (root / "notes.txt").write_text("not audio, and not said to be")
    write(root / ".hidden.wav", noise(3.0))
    write(root / ".trash" / "thrown-away.wav", noise(3.0))
    return root


def test_folder(folder: Path) -> None:
    corpus = open_corpus(folder)
    assert [cut.id for cut in corpus.cuts] == ["a.flac", "b/SECOND.WAV", "b/c/deep.ogg", "b/first.wav", "d.mp3"]
    assert corpus.problems == []
    assert corpus.num_recordings == 5
    assert corpus.duration_s == pytest.approx(21.5, abs=0.1)
    first = next(iter(corpus.cuts))
    assert (first.recording.sampling_rate, first.recording.num_channels, first.duration) == (44100, 2, 4.0)
    assert cut_name(first) == str(folder / "a.flac")
    assert [len(read_waveform(cut)) for cut in corpus.cuts] == [round(16000 * cut.duration) for cut in corpus.cuts]


def test_relative_paths_are_made_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert cut_name(next(iter(open_corpus("audio").cuts))) == str(folder / "a.flac")


def test_links_to_folders_are_followed_once(folder: Path) -> None:
    elsewhere = write(folder.parent / "elsewhere" / "linked.wav", noise(3.0)).parent
    (folder / "link").symlink_to(elsewhere)
    (folder / "b" / "loop").symlink_to(folder)
    assert "link/linked.wav" in [cut.id for cut in open_corpus(folder).cuts]
    assert open_corpus(folder).num_recordings == 6


def test_one_file(folder: Path) -> None:
    corpus = open_corpus(folder / "b" / "first.wav")
    assert [cut.id for cut in corpus.cuts] == ["first.wav"]


def test_what_cannot_be_used_is_named(folder: Path) -> None:
    (folder / "empty.wav").touch()
    (folder / "text.flac").write_text("this is not audio")
    write(folder / "nothing.wav", noise(0.0))
    write(folder / "short.wav", noise(1.5))
    corpus = open_corpus(folder, max_bad_fraction=0.5)
    reasons = {Path(problem.name).name: problem.reason for problem in corpus.problems}
    assert set(reasons) == {"empty.wav", "text.flac", "nothing.wav", "short.wav"}
    assert reasons["empty.wav"] == reasons["nothing.wav"] == "is empty"
    assert reasons["text.flac"].startswith("does not open as audio")
    assert reasons["short.wav"] == "is 1.50 s long, below min_duration_s=2"
    assert corpus.num_recordings == 5


def test_too_many_problems_are_an_error(folder: Path) -> None:
    (folder / "empty.wav").touch()
    with pytest.raises(ValueError, match=r"1 of 6 recordings .*\n.*empty.wav is empty"):
        open_corpus(folder)
    with pytest.raises(ValueError, match="5 of 6 recordings"):
        open_corpus(folder, min_duration_s=5.5, max_bad_fraction=0.5)


def test_nothing_usable_is_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    write(tmp_path / "short.wav", noise(1.0))
    with pytest.raises(ValueError, match="1 of 1 recordings"):
        open_corpus(tmp_path, max_bad_fraction=1.0)


def test_folder_without_audio(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=rf"no audio in {tmp_path} \(looked for .wav, .flac, .ogg"):
        open_corpus(tmp_path)


def test_source_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/gone does not exist"):
        open_corpus(tmp_path / "gone")
    (tmp_path / "table.csv").touch()
    with pytest.raises(ValueError, match=r"table\.csv is neither a folder, nor a Lhotse manifest"):
        open_corpus(tmp_path / "table.csv")


def test_long_recordings_become_windows(tmp_path: Path) -> None:
    samples = noise(130.0, rate=8000)
    path = write(tmp_path / "long.wav", samples, rate=8000, subtype="FLOAT")
    write(tmp_path / "short.wav", noise(3.0))
    cuts = list(open_corpus(tmp_path, window_s=60.0).cuts)
    windows = [cut for cut in cuts if cut.recording.id == "long.wav"]
    assert [window.id for window in windows] == ["long.wav@0.000s", "long.wav@43.333s", "long.wav@86.667s"]
    assert [cut_name(window) for window in windows] == [str(path), f"{path}@43.3s", f"{path}@86.7s"]
    edges = [round(window.start * 8000) for window in windows] + [len(samples)]
    assert [round(window.end * 8000) for window in windows] == edges[1:]
    assert [len(read_waveform(window)) for window in windows] == pytest.approx([130 * 16000 / 3] * 3, abs=2)
    assert [cut.id for cut in open_corpus(tmp_path, window_s=None).cuts] == ["long.wav", "short.wav"]


def test_a_manifest_gives_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    write(folder / "long.wav", noise(13.0))
    corpus = open_corpus(folder, window_s=6.0)
    assert len(corpus.cuts) == 8
    manifest = tmp_path / "deep" / "cuts.jsonl.gz"
    write_manifest(corpus, manifest)
    assert [path.name for path in manifest.parent.iterdir()] == ["cuts.jsonl.gz"]
    again = open_corpus(manifest, window_s=6.0)
    assert list(again.cuts) == list(corpus.cuts)
    whole = open_corpus(manifest, window_s=None)
    assert list(whole.cuts) == list(open_corpus(folder, window_s=None).cuts)


def test_recordings_manifest(folder: Path, tmp_path: Path) -> None:
    recordings = RecordingSet.from_recordings(Recording.from_file(path) for path in sorted(folder.glob("b/*.wav")))
    recordings.to_file(tmp_path / "recordings.jsonl.gz")
    corpus = open_corpus(tmp_path / "recordings.jsonl.gz")
    assert [cut.id for cut in corpus.cuts] == ["first"]


def test_manifest_with_missing_files_and_short_cuts(folder: Path, tmp_path: Path) -> None:
    cuts = list(open_corpus(folder).cuts)
    cuts[0] = cuts[0].truncate(duration=1.0, preserve_id=True)
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    (folder / "d.mp3").unlink()
    corpus = open_corpus(tmp_path / "cuts.jsonl.gz", max_bad_fraction=0.5)
    assert [str(problem) for problem in corpus.problems] == [
        f"{folder / 'a.flac'} is 1.00 s long, below min_duration_s=2",
        f"{folder / 'd.mp3'} does not exist",
    ]


def test_manifests_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "cuts.jsonl.gz"
    path.write_bytes(b"neither gzip nor JSON")
    with pytest.raises(ValueError, match=r"cuts\.jsonl\.gz is not a Lhotse manifest"):
        open_corpus(path)
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"path": "a.wav", "text": "hello"}) + "\n")
    with pytest.raises(ValueError, match=r"cuts\.jsonl\.gz is not a Lhotse manifest"):
        open_corpus(path)


def test_two_cuts_of_one_id(folder: Path, tmp_path: Path) -> None:
    cuts = list(open_corpus(folder).cuts)
    CutSet.from_cuts([*cuts, cuts[2]]).to_file(tmp_path / "cuts.jsonl.gz")
    with pytest.raises(ValueError, match=r"2 cuts with id 'b/c/deep\.ogg'"):
        open_corpus(tmp_path / "cuts.jsonl.gz")


def test_write_manifest_wants_its_extension(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: .*cuts.json must end with .jsonl.gz"):
        write_manifest(open_corpus(folder), tmp_path / "cuts.json")


def test_an_interrupted_manifest_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(folder)

    def fail(values: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("fastssl.data.corpus.json_line", fail)
    output = tmp_path / "out" / "cuts.jsonl.gz"
    with pytest.raises(OSError, match="no space"):
        write_manifest(corpus, output)
    assert list(output.parent.iterdir()) == []


def export(cuts: CutSet, output: Path, *, kind: str, shard_size: int = 100) -> Path:
    output.mkdir()
    cuts.to_shar(output, fields={"recording": kind}, shard_size=shard_size)
    return output


def test_shar(folder: Path, tmp_path: Path) -> None:
    cuts = open_corpus(folder).cuts
    corpus = open_corpus(export(cuts, tmp_path / "shar", kind="flac", shard_size=2))
    assert [cut.id for cut in corpus.cuts] == [cut.id for cut in cuts]
    for packed, plain in zip(corpus.cuts, cuts, strict=True):
        np.testing.assert_allclose(read_waveform(packed), read_waveform(plain), atol=1e-4)
        # Lhotse can load the cuts too.
        assert packed.load_audio().shape == plain.load_audio().shape
    write_manifest(corpus, tmp_path / "cuts.jsonl.gz")
    again = list(open_corpus(tmp_path / "cuts.jsonl.gz").cuts)
    np.testing.assert_array_equal(read_waveform(again[3]), read_waveform(list(corpus.cuts)[3]))


def test_shar_windows_are_read_by_offset(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "long.wav", noise(25.0))
    shar = export(open_corpus(tmp_path / "audio").cuts, tmp_path / "shar", kind="wav")
    cuts = list(open_corpus(shar, window_s=10.0).cuts)
    assert len(cuts) == 3
    joined = np.concatenate([read_waveform(cut) for cut in cuts])
    np.testing.assert_allclose(joined, noise(25.0)[:, 0], atol=1e-4)


def test_shar_of_windows_has_each_as_its_own_recording(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "long.wav", noise(25.0))
    shar = export(open_corpus(tmp_path / "audio", window_s=10.0).cuts, tmp_path / "shar", kind="wav")
    cuts = list(open_corpus(shar, window_s=None).cuts)
    joined = np.concatenate([read_waveform(cut) for cut in cuts])
    np.testing.assert_allclose(joined, noise(25.0)[:, 0], atol=1e-4)


def test_shar_without_recordings(folder: Path, tmp_path: Path) -> None:
    shar = export(open_corpus(folder).cuts, tmp_path / "shar", kind="flac")
    (shar / "recording.000000.tar").unlink()
    with pytest.raises(ValueError, match=r"cuts.000000.jsonl.gz has no shard of recordings"):
        open_corpus(shar)


@pytest.fixture
def windowed(tmp_path: Path) -> Corpus:
    for index in range(20):
        write(tmp_path / f"{index}.wav", noise(2.0 + 3 * (index % 3), rate=8000), rate=8000)
    return open_corpus(tmp_path, window_s=3.0)


def recordings_of(corpus: Corpus) -> set[str]:
    return {cut.recording.id for cut in corpus.cuts}


def test_split_keeps_recordings_together(windowed: Corpus) -> None:
    train, valid = split_corpus(windowed, fraction=0.25, seed=0)
    assert len(recordings_of(valid)) == 5
    assert not recordings_of(train) & recordings_of(valid)
    assert [cut.id for cut in windowed.cuts if cut in valid.cuts.data] == [cut.id for cut in valid.cuts]
    assert len(train.cuts) + len(valid.cuts) == len(windowed.cuts)


def test_split_depends_on_the_seed_and_not_on_the_order(windowed: Corpus) -> None:
    _, valid = split_corpus(windowed, fraction=0.25, seed=0)
    backwards = Corpus(CutSet.from_cuts(reversed(list(windowed.cuts))))
    assert recordings_of(split_corpus(backwards, fraction=0.25, seed=0)[1]) == recordings_of(valid)
    assert recordings_of(split_corpus(windowed, fraction=0.25, seed=1)[1]) != recordings_of(valid)
    fewer = Corpus(CutSet.from_cuts(cut for cut in windowed.cuts if cut.recording.id != "7.wav"))
    assert len(recordings_of(split_corpus(fewer, fraction=0.25, seed=0)[1]) ^ recordings_of(valid)) <= 2


@pytest.mark.parametrize(
    ("number", "fraction", "expected"), [(20, 0.001, 1), (20, 0.999, 19), (2, 0.5, 1), (1, 0.5, 0)]
)
def test_split_has_something_on_both_sides(windowed: Corpus, number: int, fraction: float, expected: int) -> None:
    names = sorted(recordings_of(windowed))[:number]
    corpus = Corpus(CutSet.from_cuts(cut for cut in windowed.cuts if cut.recording.id in names))
    train, valid = split_corpus(corpus, fraction=fraction, seed=0)
    assert (len(recordings_of(train)), len(recordings_of(valid))) == (number - expected, expected)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_split_wants_a_fraction(windowed: Corpus, fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        split_corpus(windowed, fraction=fraction, seed=0)
