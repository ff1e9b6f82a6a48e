import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastssl.data import synthetic
from fastssl.data.synthetic import speak_corpus, voice

pytest.importorskip("espeakng_loader", reason="espeakng_loader is not installed")


def rows(corpus: Path) -> list[dict[str, str]]:
    with (corpus / "utterances.tsv").open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table, delimiter="\t"))


def contents(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(corpus.iterdir())}


def test_the_table_is_true(spoken_corpus: Path) -> None:
    table = rows(spoken_corpus)
    assert list(table[0]) == ["path", "speaker", "text", "phonemes", "seconds"]
    assert {row["path"] for row in table} == {path.name for path in spoken_corpus.iterdir()} - {"utterances.tsv"}
    assert {row["speaker"] for row in table} == {"s00", "s01", "s02", "s03"}
    for row in table:
        info = soundfile.info(spoken_corpus / row["path"])
        assert (info.samplerate, info.channels) == (16000, 1)
        assert info.duration == pytest.approx(float(row["seconds"]), abs=1e-3)
        assert 1.0 <= info.duration <= 20.0
        assert row["text"][0].isupper()
        assert row["text"][-1] in ".?!"
    total_s = sum(float(row["seconds"]) for row in table)
    assert 120.0 <= total_s < 140.0
    assert {path.suffix for path in spoken_corpus.iterdir()} == {".flac", ".wav", ".tsv"}


def test_it_sounds_like_what_the_table_says(spoken_corpus: Path) -> None:
    for row in rows(spoken_corpus):
        words = row["phonemes"].split(" | ")
        # espeak-ng joins some pairs of words, such as "of the".
        assert 0.7 * len(row["text"].split()) <= len(words) <= 1.1 * len(row["text"].split())
        phonemes = [phoneme for word in words for phoneme in word.split()]
        assert 6 < len(phonemes) / float(row["seconds"]) < 22
        samples, _ = soundfile.read(spoken_corpus / row["path"])
        assert np.abs(samples).max() <= 1.0
        assert samples.std() > 0.01
        # Never digital silence.
        assert np.abs(samples[: len(samples) // 400 * 400].reshape(-1, 400)).max(axis=1).min() > 0


def test_phonemes_follow_the_accent(spoken_corpus: Path) -> None:
    """Scots (s02) has a rhotic r; the others have none, or an American one."""
    sounds = dict.fromkeys(("s00", "s01", "s02"), "")
    for row in rows(spoken_corpus):
        if row["speaker"] in sounds:
            sounds[row["speaker"]] += row["phonemes"]
    assert " r " in sounds["s02"]
    assert " r " not in sounds["s00"] + sounds["s01"]


def test_bytes_are_a_function_of_the_seed(spoken_corpus: Path, tmp_path: Path) -> None:
    """Check this process, where espeak-ng has already spoken, and a new one."""
    expected = contents(spoken_corpus)
    assert contents(speak_corpus(tmp_path / "again", minutes=2, seed=0, speakers=4)) == expected
    command = [sys.executable, "-m", "fastssl.data.synthetic", "elsewhere", "--minutes", "2", "--speakers", "4"]
    root = Path(synthetic.__file__).parents[2]
    subprocess.run(
        command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    )
    assert contents(tmp_path / "elsewhere") == expected


def test_more_minutes_only_add(spoken_corpus: Path, tmp_path: Path) -> None:
    shorter = rows(speak_corpus(tmp_path / "shorter", minutes=0.5, seed=0, speakers=4))
    assert shorter == rows(spoken_corpus)[: len(shorter)]


def test_another_seed_says_something_else(spoken_corpus: Path, tmp_path: Path) -> None:
    other = rows(speak_corpus(tmp_path / "other", minutes=0.5, seed=1, speakers=4))
    assert not {row["text"] for row in other} & {row["text"] for row in rows(spoken_corpus)}


def test_lengths_are_those_of_read_speech(tmp_path: Path) -> None:
    table = rows(speak_corpus(tmp_path / "long", minutes=8, seed=0, speakers=16))
    seconds = np.array([float(row["seconds"]) for row in table])
    assert 0.4 < ((seconds > 11) & (seconds < 17)).mean() < 0.8
    assert 0.05 < (seconds < 6).mean() < 0.4
    assert len({row["speaker"] for row in table}) == 16


def test_voices_are_different() -> None:
    voices = [voice(number) for number in range(104)]
    assert len({one.name for one in voices}) == 104
    assert len({one.name.split("+")[0] for one in voices[:16]}) == 8
    assert np.ptp([one.pitch for one in voices[:16]]) > 25
    assert np.ptp([one.rate for one in voices[:16]]) > 40


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        speak_corpus(tmp_path / "corpus", minutes=1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"output: .* exists and is not an empty folder"):
        speak_corpus(tmp_path, minutes=1)
    (tmp_path / "empty").mkdir()
    assert (speak_corpus(tmp_path / "empty", minutes=0.1) / "utterances.tsv").exists()


@pytest.mark.parametrize(("minutes", "speakers"), [(0.0, 16), (1.0, 0), (float("inf"), 1)])
def test_numbers_out_of_range(tmp_path: Path, minutes: float, speakers: int) -> None:
    with pytest.raises(ValueError, match="minutes and speakers: must be positive"):
        speak_corpus(tmp_path / "corpus", minutes=minutes, speakers=speakers)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[demo\]'"):
        speak_corpus(tmp_path / "corpus", minutes=1)
    assert list(tmp_path.iterdir()) == []
