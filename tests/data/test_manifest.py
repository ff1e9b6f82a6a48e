"""Test that a manifest is only data: nothing that it names is executed, downloaded or passed to a shell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lhotse import Recording
from lhotse.audio.backend import get_current_audio_backend
from lhotse.cut import MonoCut
from lhotse.serialization import deserialize_item

from fastssl.data.audio import AudioError, read_waveform
from fastssl.data.corpus import open_corpus, write_manifest
from fastssl.data.manifest import BadLineError, ForbiddenSourceError, check_sources, deserialize
from tests.data.making import noise, write

Item = dict[str, Any]


@pytest.fixture
def recording(tmp_path: Path) -> Item:
    """Return the serialised manifest entry of a recording of 3 s."""
    return dict(Recording.from_file(write(tmp_path / "audio" / "plain.wav", noise(3.0))).to_dict())


def _source(kind: str, source: str) -> Item:
    return {"type": kind, "channels": [0], "source": source}


def _first(recording: Item, source: Item) -> Item:
    return {**recording, "sources": [source]}


def _second(recording: Item, source: Item) -> Item:
    return {**recording, "sources": [*recording["sources"], source]}


def _impulse_response(recording: Item, source: Item) -> Item:
    kwargs = {"rir": {**recording, "id": "room", "sources": [source]}, "rir_channels": [0]}
    return {**recording, "transforms": [{"name": "ReverbWithImpulseResponse", "kwargs": kwargs}]}


def _custom_field(recording: Item, source: Item) -> Item:
    cut = Recording.from_dict(dict(recording)).to_cut().to_dict()
    return {**cut, "custom": {"clean": {**recording, "sources": [source]}}}


def _mixed_cut(recording: Item, source: Item) -> Item:
    cut = Recording.from_dict(dict(recording)).to_cut().to_dict()
    noisy = {**cut, "id": "noise", "recording": {**recording, "sources": [source]}}
    tracks = [{"type": "MonoCut", "cut": cut, "offset": 0}, {"type": "MonoCut", "cut": noisy, "offset": 0}]
    return {"id": "mixed", "type": "MixedCut", "tracks": tracks}


PLACES = [_first, _second, _impulse_response, _custom_field, _mixed_cut]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["command", "url", "pipe", ""])
def test_sources_that_would_be_run_or_fetched_are_refused(
    place: Callable[[Item, Item], Item], kind: str, recording: Item, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    good = {**recording, "id": "good"}
    bad = place(recording, _source(kind, f"pipe:touch {ran}" if kind == "url" else f"touch {ran}"))
    manifest = tmp_path / "cuts.jsonl"
    manifest.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    corpus = open_corpus(manifest, max_bad_fraction=0.9)
    assert [cut.recording.id for cut in corpus.cuts] == ["good"]
    assert [str(problem).partition(";")[0] for problem in corpus.problems] == [
        f"{manifest}, line 2 has an audio source of type {kind!r}"
    ]
    assert not ran.exists()


def test_metadata_that_only_looks_like_a_source_is_not_refused(recording: Item) -> None:
    cut = Recording.from_dict(recording).to_cut().to_dict()
    cut["custom"] = {"type": "audiobook", "source": "https://example.org", "sources": ["LibriVox"]}
    assert deserialize(cut).custom["type"] == "audiobook"


@pytest.mark.parametrize("place", [_first, _second, _impulse_response])
def test_cuts_made_by_hand_do_not_run_commands(
    place: Callable[[Item, Item], Item], recording: Item, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    with pytest.raises(AudioError, match="source of type 'command'"):
        read_waveform(deserialize_item(place(recording, _source("command", f"touch {ran}"))).to_cut())
    assert not ran.exists()


@pytest.mark.parametrize("place", [_second, _impulse_response])
@pytest.mark.parametrize("suffix", [".opus", ".sph"])
def test_file_names_never_reach_a_shell(
    place: Callable[[Item, Item], Item], suffix: str, recording: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"x'; touch ran; ' ; touch ran;{suffix}"
    (tmp_path / name).write_bytes(b"not audio")
    backend = get_current_audio_backend()
    with pytest.raises(AudioError, match="does not decode"):
        read_waveform(deserialize_item(place(recording, _source("file", name))).to_cut())
    assert not (tmp_path / "ran").exists()
    assert get_current_audio_backend() is backend


def test_recordings_of_several_files_and_with_reverberation_are_read(recording: Item, tmp_path: Path) -> None:
    other = str(write(tmp_path / "audio" / "other.wav", noise(3.0, seed=1)))
    two = _second(recording, {**_source("file", other), "channels": [1]})
    assert len(read_waveform(Recording.from_dict(two).to_cut(), channel=1)) == 48000
    assert (
        len(read_waveform(Recording.from_dict(_impulse_response(recording, _source("file", other))).to_cut())) == 48000
    )


def test_a_manifest_named_like_a_pipe_is_a_file(
    recording: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "pipe:touch ran; cat cuts.jsonl"
    for path in (name, "cuts.jsonl"):
        Path(path).write_text(json.dumps(recording) + "\n")
    assert open_corpus(name).num_recordings == 1
    assert not (tmp_path / "ran").exists()


def test_a_manifest_is_not_written_to_a_pipe(recording: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("pipe:touch ran; cat >rest; true ")
    folder.mkdir()
    write_manifest(open_corpus("audio"), folder / "cuts.jsonl.gz")
    assert not Path("ran").exists()
    assert [path.name for path in folder.iterdir()] == ["cuts.jsonl.gz"]


def test_a_line_is_a_cut_or_a_recording(recording: Item) -> None:
    supervision = {"id": "a", "recording_id": "b", "start": 0.0, "duration": 1.0}
    with pytest.raises(BadLineError, match="is not a cut or a recording, but a SupervisionSegment"):
        deserialize(supervision)


def test_a_window_takes_only_its_place_from_the_manifest(recording: Item, tmp_path: Path) -> None:
    cut = Recording.from_dict(dict(recording)).to_cut().to_dict()
    parent = {"id": "whole", "start": 0.0, "duration": 3.0, "recording": {"sources": []}, "channel": 7}
    (tmp_path / "cuts.jsonl").write_text(json.dumps({**cut, "custom": {"window_of": parent}}) + "\n")
    (whole,) = open_corpus(tmp_path / "cuts.jsonl", window_s=None).cuts
    assert (whole.id, whole.channel, len(read_waveform(whole))) == ("whole", 0, 48000)


def test_commands_in_a_shar_directory_are_refused(recording: Item, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    cut = MonoCut("one", 0.0, 3.0, 0).to_dict()
    (tmp_path / "cuts.000000.jsonl").write_text(json.dumps(cut) + "\n")
    line = {"cut_id": "one", "recording": _second(recording, _source("command", f"touch {ran}"))}
    (tmp_path / "recording.000000.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(
        ValueError, match=r"cuts\.000000\.jsonl, line 1 has an unusable entry .* has an audio source of type"
    ):
        open_corpus(tmp_path)
    assert not ran.exists()


def test_check_sources_goes_to_any_depth() -> None:
    deep: object = _source("command", "true")
    for _ in range(40):
        deep = [{"more": deep}]
    with pytest.raises(ForbiddenSourceError):
        check_sources(deep)
    for _ in range(5000):
        deep = [{"more": deep}]
    with pytest.raises(BadLineError, match="nested more than 100 deep"):
        check_sources(deep)
