"""Test `fastssl label`: k-means labels and segments of recordings, interrupted runs, and refused settings."""

import dataclasses
import json
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import SupervisionSet
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fastssl.data.audio import read_waveform
from fastssl.data.corpus import open_corpus
from fastssl.data.labels import LABELS_FILE, SETTINGS_FILE, LabelTable, read_lines, read_settings
from fastssl.data.mfcc import mfcc
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.files import WriteError
from fastssl.interop import load_encoder
from fastssl.models.encoder import Encoder
from fastssl.models.hubert import HubertConfig
from fastssl.packing import Packed
from tests.tiny import write_recording

_SETTINGS = LabelSettings(clusters=7)
_ENCODER = HubertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    activation_dropout=0.1,
    feat_proj_dropout=0.0,
    layerdrop=0.1,
    do_normalize=True,
    feature_grad_mult=1.0,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)


def _labels(folder: Path) -> dict[str, list[int]]:
    return {line["id"]: line["custom"]["labels"] for line in read_lines(folder / LABELS_FILE)}


def test_labels_are_the_nearest_centres_and_reproducible(recordings: Path, tmp_path: Path) -> None:
    assert label(recordings, tmp_path / "one", _SETTINGS, num_workers=0) == []
    label(recordings, tmp_path / "two", _SETTINGS, num_workers=2)
    found = _labels(tmp_path / "one")
    assert len(found) == 14
    assert found == _labels(tmp_path / "two")
    centres = load_file(tmp_path / "one" / "kmeans.safetensors")["centres"]
    assert centres.shape == (7, 39)
    for cut in open_corpus(recordings, min_duration_s=0.1).cuts:
        frames = mfcc(read_waveform(cut))
        assert found[cut.id] == torch.cdist(frames.double(), centres.double()).argmin(1).tolist()
    # Another seed gives other classes.
    label(recordings, tmp_path / "three", dataclasses.replace(_SETTINGS, seed=1), num_workers=0)
    assert _labels(tmp_path / "three") != found


def test_a_price_makes_segments(recordings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, free, dear = (tmp_path / name for name in ("plain", "free", "dear"))
    caplog.set_level("INFO")
    label(recordings, plain, _SETTINGS, num_workers=0)
    label(recordings, free, dataclasses.replace(_SETTINGS, segment_price=0.0), num_workers=0)
    label(recordings, dear, dataclasses.replace(_SETTINGS, segment_price=2000.0), num_workers=0)
    assert _labels(plain) == _labels(free)
    centres = load_file(dear / "kmeans.safetensors")["centres"].double()
    changes = {}
    for folder in (plain, dear):
        changes[folder] = sum(np.count_nonzero(np.diff(labels)) for labels in _labels(folder).values())
    assert 0 < changes[dear] < changes[plain] / 2
    frames = sum(map(len, _labels(dear).values()))
    assert f"lasts {10 * frames / (changes[dear] + 14):.0f} ms on average" in caplog.text
    # Smoothing lowers the total cost: frames and segments together cost no more than with the nearest classes.
    for cut in open_corpus(recordings, min_duration_s=0.1).cuts:
        distances = torch.cdist(mfcc(read_waveform(cut)).double(), centres).square().numpy()
        costs = []
        for folder in (plain, dear):
            labels = np.array(_labels(folder)[cut.id])
            costs.append(distances[np.arange(len(labels)), labels].sum() + 2000 * np.count_nonzero(np.diff(labels)))
        assert costs[1] <= costs[0]
    with pytest.raises(ValueError, match=r"segment_price: None there, 2000\.0 now"):
        label(recordings, plain, dataclasses.replace(_SETTINGS, segment_price=2000.0), num_workers=0)
    with pytest.raises(ValueError, match="segment_price"):
        LabelSettings(segment_price=-1.0)


def test_segments_become_as_long_as_is_asked(recordings: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(_SETTINGS, segment_ms=150.0)
    label(recordings, tmp_path / "segments", settings, num_workers=0)
    found = _labels(tmp_path / "segments")
    count = sum(1 + np.count_nonzero(np.diff(labels)) for labels in found.values())
    assert 10 * sum(map(len, found.values())) / count == pytest.approx(150, rel=0.03)
    # The folder keeps its price, for labels of other recordings made from it and for further recordings of its own.
    label(recordings, tmp_path / "other", LabelSettings(), kmeans=tmp_path / "segments", num_workers=0)
    assert _labels(tmp_path / "other") == found
    text = (tmp_path / "segments" / LABELS_FILE).read_text()
    (tmp_path / "segments" / LABELS_FILE).write_text(text[: len(text) // 2])
    label(recordings, tmp_path / "segments", settings, num_workers=0)
    assert _labels(tmp_path / "segments") == found


def test_segments_of_a_length_that_cannot_be(recordings: Path, tmp_path: Path) -> None:
    for milliseconds, frames in ((10.5, "1.05"), (60_000.0, "6e+03")):
        wrong = dataclasses.replace(_SETTINGS, segment_ms=milliseconds)
        with pytest.raises(ValueError, match=rf"--segment_ms: must lie between .*asks for {re.escape(frames)} frames"):
            label(recordings, tmp_path / "none", wrong, num_workers=0)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="--segment_ms and --segment_price: give only one of them"):
        LabelSettings(segment_ms=60.0, segment_price=5.0)
    with pytest.raises(ValueError, match="--segment_ms: must be positive"):
        LabelSettings(segment_ms=0.0)


def test_interruption_loses_nothing_and_new_recordings_are_added(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio, whole, broken = tmp_path / "audio", tmp_path / "whole", tmp_path / "broken"
    shutil.copytree(recordings, audio)
    label(audio, whole, _SETTINGS, num_workers=0)
    shutil.copytree(whole, broken)
    text = (broken / LABELS_FILE).read_text()
    # As if the process had been killed in the middle of a line.
    (broken / LABELS_FILE).write_text(text[: len(text) // 2])
    before = len(_labels(broken))
    assert 3 < before < 14
    decoded: list[int] = []

    def count(waveform: NDArray[np.float32]) -> torch.Tensor:
        decoded.append(len(waveform))
        return mfcc(waveform)

    monkeypatch.setattr("fastssl.eval.label.frames.mfcc", count)
    label(audio, broken, _SETTINGS, num_workers=0)
    assert len(decoded) == 14 - before
    assert (broken / LABELS_FILE).read_text() == text

    write_recording(audio / "new.wav", 2.0, seed=99)
    write_recording(audio / "speaker0" / "00.wav", 3.0, seed=98)  # replaces a labelled recording
    label(audio, broken, _SETTINGS, num_workers=0)
    assert len(decoded) == 14 - before + 2
    table = LabelTable(broken)
    assert len(table) == 15
    # The file has one line per recording, and only for recordings that exist now.
    assert len(SupervisionSet.from_file(broken / LABELS_FILE)) == 15
    assert len((broken / LABELS_FILE).read_text().splitlines()) == 15
    assert all(table.problem(cut) is None for cut in open_corpus(audio, min_duration_s=0.1).cuts)


def test_other_settings_and_other_folders_are_refused(recordings: Path, tmp_path: Path) -> None:
    label(recordings, tmp_path / "labels", _SETTINGS, num_workers=0)
    with pytest.raises(ValueError, match=r"begun with other settings \(clusters: 7 there, 8 now\)"):
        label(recordings, tmp_path / "labels", LabelSettings(clusters=8), num_workers=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="exists, is not empty, and contains no labels"):
        label(recordings, tmp_path / "other", _SETTINGS, num_workers=0)
    with pytest.raises(ValueError, match="give more audio or fewer clusters"):
        label(recordings, tmp_path / "many", LabelSettings(clusters=100_000), num_workers=0)
    assert not (tmp_path / "many").exists()
    with pytest.raises(ValueError, match="--layer: 3 is a layer of --model, which is missing"):
        LabelSettings(layer=3)


def test_layer_of_a_model_and_a_kmeans_model_that_is_there(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Encoder(_ENCODER).save_pretrained(tmp_path / "model")
    settings = LabelSettings(model="model", layer=1, clusters=5)
    label(recordings, tmp_path / "train", settings, num_workers=1)
    assert read_settings(tmp_path / "train")["model"] == str(tmp_path / "model")
    encoder = load_encoder(tmp_path / "model")
    centres = load_file(tmp_path / "train" / "kmeans.safetensors")["centres"]

    held_out = tmp_path / "held_out"
    write_recording(held_out / "x.wav", 1.7, seed=50)
    label(held_out, tmp_path / "valid", LabelSettings(), kmeans=tmp_path / "train", num_workers=0)
    samples, _ = soundfile.read(held_out / "x.wav", dtype="float32")
    waveform = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    with torch.no_grad():
        states = encoder(Packed.pack([torch.from_numpy(waveform.astype(np.float32))[:, None]])).hidden_states[1].values
    expected = torch.cdist(states.double(), centres.double()).argmin(1).tolist()
    assert _labels(tmp_path / "valid")["x.wav"] == expected
    with pytest.raises(ValueError, match="the model has layers 0 to 2, got 3"):
        label(recordings, tmp_path / "no", dataclasses.replace(settings, layer=3))
    # Held-out recordings must be labelled from the same features.
    Encoder(_ENCODER).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"--kmeans: .*model had other weights when .*train was made"):
        label(held_out, tmp_path / "other", LabelSettings(), kmeans=tmp_path / "train", num_workers=0)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"--kmeans: .*train was made from a layer of .*model, which .*no such file"):
        label(held_out, tmp_path / "other", LabelSettings(), kmeans=tmp_path / "train", num_workers=0)
    assert not (tmp_path / "other").exists()


def test_damaged_folders_are_refused(recordings: Path, tmp_path: Path) -> None:
    label(recordings, tmp_path / "labels", _SETTINGS, num_workers=0)
    centres = tmp_path / "labels" / "kmeans.safetensors"
    whole = centres.read_bytes()
    centres.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"kmeans\.safetensors: is damaged"):
        label(recordings, tmp_path / "labels", _SETTINGS, num_workers=0)
    centres.write_bytes(whole)
    (tmp_path / "labels" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: is damaged"):
        label(recordings, tmp_path / "labels", _SETTINGS, num_workers=0)


def test_recordings_that_cannot_be_labelled_are_named(recordings: Path, tmp_path: Path) -> None:
    shutil.copytree(recordings, tmp_path / "audio")
    broken, hollow = tmp_path / "audio" / "broken.wav", tmp_path / "audio" / "hollow.wav"
    broken.write_bytes(b"no audio")
    soundfile.write(hollow, np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    # So loud that its frames would not be finite; this must not affect k-means or the labels of the other recordings.
    loud = tmp_path / "audio" / "loud.wav"
    soundfile.write(loud, np.full(16000, 3e38, np.float32), 16000, subtype="FLOAT")
    problems = label(tmp_path / "audio", tmp_path / "labels", _SETTINGS, num_workers=0)
    assert [problem.name for problem in problems] == [str(broken), str(hollow), str(loud)]
    assert "has samples of 3e+38" in problems[-1].reason
    assert len(_labels(tmp_path / "labels")) == 14
    torch.manual_seed(0)
    Encoder(dataclasses.replace(_ENCODER, do_normalize=False)).save_pretrained(tmp_path / "model")
    settings = LabelSettings(model=str(tmp_path / "model"), clusters=7)
    problems = label(tmp_path / "audio", tmp_path / "of_model", settings, num_workers=0)
    assert {problem.name for problem in problems} == {str(broken), str(hollow), str(loud)}
    assert len(_labels(tmp_path / "of_model")) == 14


def test_labels_keep_whether_recordings_were_normalised(recordings: Path, tmp_path: Path) -> None:
    audio, model = recordings / "speaker0", tmp_path / "model"
    torch.manual_seed(0)
    layer_norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    encoder = Encoder(dataclasses.replace(_ENCODER, do_normalize=True, **layer_norm))  # type: ignore[arg-type]
    encoder.save_pretrained(model)
    settings = LabelSettings(model=str(model), clusters=7)
    label(audio, tmp_path / "labels", settings, num_workers=0)
    assert read_settings(tmp_path / "labels")["normalize"] is True
    expected = _labels(tmp_path / "labels")
    # The model's config changes, and the labels are lost: they are made again as before, and so are held-out ones.
    preprocessor = model / "preprocessor_config.json"
    preprocessor.write_text(preprocessor.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    (tmp_path / "labels" / LABELS_FILE).write_text("")
    label(audio, tmp_path / "labels", settings, num_workers=0)
    assert _labels(tmp_path / "labels") == expected
    label(audio, tmp_path / "held_out", LabelSettings(), kmeans=tmp_path / "labels", num_workers=0)
    assert _labels(tmp_path / "held_out") == expected
    # Labels of earlier versions do not say, and were made as the model's config said.
    label(audio, tmp_path / "raw", settings, num_workers=0)
    raw = _labels(tmp_path / "raw")
    assert raw != expected
    path = tmp_path / "raw" / "settings.json"
    path.write_text(path.read_text().replace('"normalize": false,', ""))
    assert "normalize" not in read_settings(tmp_path / "raw")
    (tmp_path / "raw" / LABELS_FILE).write_text("")
    label(audio, tmp_path / "raw", settings, num_workers=0)
    assert _labels(tmp_path / "raw") == raw
    # These versions did not read processor_config.json.
    inner = preprocessor.read_text().replace('"do_normalize": false', '"do_normalize": true')
    (model / "processor_config.json").write_text(f'{{"feature_extractor": {inner}}}')
    (tmp_path / "raw" / LABELS_FILE).write_text("")
    label(audio, tmp_path / "raw", settings, num_workers=0)
    assert _labels(tmp_path / "raw") == raw
    label(audio, tmp_path / "raw_too", LabelSettings(), kmeans=tmp_path / "raw", num_workers=0)
    assert _labels(tmp_path / "raw_too") == raw


def test_recordings_that_decode_to_less_than_a_frame_are_named(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Like a damaged MP3 that decodes to 0.1 s less than its header says.
    monkeypatch.setattr("fastssl.eval.label.frames.read_waveform", lambda cut, channel: np.zeros(50, np.float32))
    two = LabelSettings(clusters=2)
    with pytest.raises(ValueError, match=r"the number of frames \(0\), got 2"):
        label(recordings, tmp_path / "labels", two, num_workers=0)
    monkeypatch.undo()
    label(recordings, tmp_path / "labels", two, num_workers=0)
    (tmp_path / "labels" / LABELS_FILE).write_text("")
    monkeypatch.setattr("fastssl.eval.label.frames.read_waveform", lambda cut, channel: np.zeros(50, np.float32))
    problems = label(recordings, tmp_path / "labels", two, num_workers=0)
    assert len(problems) == 14
    assert all("is shorter than one frame" in problem.reason for problem in problems)


def test_full_disk_keeps_what_is_there(recordings: Path, tmp_path: Path) -> None:
    label(recordings, tmp_path / "whole", _SETTINGS, num_workers=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"labels\.jsonl cannot be written: File too large"):
            label(recordings, tmp_path / "labels", _SETTINGS, num_workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = (tmp_path / "labels" / LABELS_FILE).read_text()
    assert 0 < len(kept) <= 4000
    assert kept.endswith("\n")
    label(recordings, tmp_path / "labels", _SETTINGS, num_workers=0)
    text = (tmp_path / "whole" / LABELS_FILE).read_text()
    assert (tmp_path / "labels" / LABELS_FILE).read_text() == text


def test_labels_keep_the_rules_that_they_were_begun_with(recordings: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels" / "settings.json"
    label(recordings, path.parent, _SETTINGS, num_workers=0)
    settings = json.loads(path.read_text())
    assert settings.pop("rules") == 2
    path.write_text(json.dumps(settings))  # as an earlier version wrote it
    shutil.copytree(recordings, tmp_path / "audio")
    soundfile.write(tmp_path / "audio" / "new.aiff", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "audio" / "new.wav", np.zeros(16000), 16000)
    assert label(tmp_path / "audio", path.parent, _SETTINGS, num_workers=0) == []
    assert len(_labels(path.parent)) == 15
    with pytest.raises(ValueError, match=r"begun with other settings \(rules: 1 there, 2 now\)"):
        label(recordings, path.parent, dataclasses.replace(_SETTINGS, rules=2), num_workers=0)
    # Held-out audio is read as the audio of the k-means model was, if nothing else is asked.
    label(tmp_path / "audio", tmp_path / "valid", LabelSettings(), kmeans=path.parent, num_workers=0)
    label(tmp_path / "audio", tmp_path / "newer", LabelSettings(rules=2), kmeans=path.parent, num_workers=0)
    found = [(json.loads((tmp_path / name / "settings.json").read_text())["rules"]) for name in ("valid", "newer")]
    assert found == [1, 2]
    assert [len(_labels(tmp_path / name)) for name in ("valid", "newer")] == [15, 16]
    with pytest.raises(ValueError, match="--rules: must be from 1 to 2, got 3"):
        LabelSettings(rules=3)


def test_a_model_that_labels_name_is_not_downloaded(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        raise ValueError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    label(recordings, tmp_path / "labels", LabelSettings(clusters=3, fit_frames=200), num_workers=0)
    path = tmp_path / "labels" / SETTINGS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "someone/model"}))
    with pytest.raises(
        ValueError, match=r"from a layer of someone/model, .*a model that a file names is not downloaded"
    ):
        label(recordings, tmp_path / "out", LabelSettings(), kmeans=tmp_path / "labels", num_workers=0)
    with pytest.raises(ValueError, match=r"loading from the Hub failed"):
        label(recordings, tmp_path / "out", LabelSettings("a/b"), kmeans=tmp_path / "labels", num_workers=0)
    assert asked == [("someone/model", True), ("a/b", False)]


def test_damaged_settings_and_centres_are_named(recordings: Path, tmp_path: Path) -> None:
    label(recordings, tmp_path / "labels", LabelSettings(clusters=3, fit_frames=200), num_workers=0)
    path, centres = tmp_path / "labels" / SETTINGS_FILE, tmp_path / "labels" / "kmeans.safetensors"
    whole = path.read_text()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            label(recordings, tmp_path / "out", LabelSettings(), kmeans=tmp_path / "labels", num_workers=0)

    for changes, message in (
        ({"model": ["a\x1b"]}, r"settings\.json: model is \['a\\x1b'\], expected str or NoneType"),
        ({"seed": 0.5}, r"settings\.json: seed is 0\.5, expected int"),
        ({"clusters": 1e400}, r"settings\.json: is damaged"),
        ({"clusters": True}, r"settings\.json: is damaged"),
        ({"price": "x"}, r"settings\.json: price is 'x', expected int or float or NoneType"),
        ({"clusters": 4}, r"kmeans\.safetensors: is damaged \(centres are not fp32, \(4, width\)\)"),
    ):
        path.write_text(json.dumps(json.loads(whole) | changes))
        refused(message)
    path.write_text(whole)
    for tensor, message in (
        (torch.full((3, 39), torch.nan), r"kmeans\.safetensors: is damaged \(centres are NaN"),
        (torch.zeros(3, 5), r"kmeans\.safetensors has centres of width 5, but the frames have width 39"),
    ):
        save_file({"centres": tensor}, centres)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        refused(message)
