"""Test features, quality, probes and labels of a compressed encoder at a rate or period from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from fastssl.eval.extract import extract
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.eval.probe.command import probe
from fastssl.eval.probe.features import EncoderSource, FeatureStore
from fastssl.eval.probe.heads import Window
from fastssl.eval.probe.run import RANDOM, run_probe
from fastssl.eval.probe.settings import ProbeSettings
from fastssl.eval.probe.tables import Table, read_table
from fastssl.eval.quality.command import quality
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.packing import Packed
from tests.models.test_compressed import SHAPE
from tests.tiny import write_recording

_CONFIG = EncoderConfig(**SHAPE, compressor="integrate-and-fire")


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    """Save a small encoder with a compressor in `tmp_path / "model"`."""
    torch.manual_seed(0)
    encoder = Encoder(_CONFIG).eval()
    encoder.save_pretrained(tmp_path / "model")
    return encoder


def _read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def test_extract_at_a_frame_period(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    extract(model, recordings, output, frame_period_ms=55.0)
    features = load_file(output / "features-00000.safetensors")
    for entry in _read(output):
        samples, _ = soundfile.read(entry["file"], dtype="float32")
        samples = (samples - samples.mean()) / samples.std()
        with torch.inference_mode():
            expected = encoder(Packed.pack([torch.from_numpy(samples)[:, None]]), frame_period_ms=55.0)
        found = features[str(entry["key"])]
        torch.testing.assert_close(found, expected.features.values, rtol=0, atol=1e-4)
        # The obtained period is near the requested one; it differs by at most a frame and the incomplete windows.
        assert expected.compressed is not None
        assert entry["frame_period_s"] == pytest.approx(expected.compressed.frame_period_ms.item() / 1000)
        assert abs(float(str(entry["frame_period_s"])) - 0.055) < 0.003
    assert json.loads((output / "settings.json").read_text())["frame_period_ms"] == 55.0
    with pytest.raises(ValueError, match=r"begun with other settings \(frame_period_ms: 55\.0 there, 60\.0 now"):
        extract(model, recordings, output, frame_period_ms=60.0)
    extract(model, recordings, tmp_path / "all", rate=0.0)
    assert {entry["frame_period_s"] for entry in _read(tmp_path / "all")} == {0.02}
    frames = {entry["key"]: entry["frames"] for entry in _read(tmp_path / "all")}
    for entry in _read(output):
        assert 2 * float(str(entry["frames"])) < float(str(frames[entry["key"]])) < 3.2 * float(str(entry["frames"]))


def test_chunks_of_compressed_recordings_neither_overlap_nor_leave_gaps(encoder: Encoder, tmp_path: Path) -> None:
    write_recording(tmp_path / "audio" / "long.wav", 11.3, seed=5)
    model, audio = tmp_path / "model", tmp_path / "audio"
    options = {"chunk_s": 3.0, "overlap_s": 0.5}
    extract(model, audio, tmp_path / "all", layer=0, rate=0.0, **options)  # type: ignore[arg-type]
    extract(model, audio, tmp_path / "some", layer=0, frame_period_ms=50.0, **options)  # type: ignore[arg-type]
    extract(model, audio, tmp_path / "whole", layer=0, frame_period_ms=50.0)
    (every,), (some,), (whole,) = (_read(tmp_path / name) for name in ("all", "some", "whole"))
    assert every["frames"] == 564
    assert abs(int(str(some["frames"])) - int(str(whole["frames"]))) <= 4  # at most one frame per seam


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 2.5}, r"--rate: must be from 0 to 2, got 2\.5"),
        ({"frame_period_ms": 10.0}, "--frame_period_ms: must be from 20 to inf, got 10"),
        ({"rate": 0.5, "frame_period_ms": 40.0}, "--rate and frame_period_ms: give one of the two, got"),
    ],
)
def test_rates_out_of_range(
    encoder: Encoder, recordings: Path, tmp_path: Path, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract(tmp_path / "model", recordings, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_encoders_without_a_compressor(recordings: Path, tmp_path: Path) -> None:
    Encoder(EncoderConfig(**_CONFIG.__dict__ | {"compressor": "none"})).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"--rate and --frame_period_ms: .*plain has no compressor"):
        quality(tmp_path / "plain", recordings, tmp_path / "q.json", rate=0.5)
    assert not (tmp_path / "q.json").exists()


def test_quality_at_a_frame_period(
    encoder: Encoder, recordings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    results = {}
    for name, options in {"all": {"rate": 0.0}, "some": {"frame_period_ms": 40.0}}.items():
        results[name] = quality(tmp_path / "model", recordings, tmp_path / f"{name}.json", **options)[2]  # type: ignore[arg-type]
        assert (
            json.loads((tmp_path / f"{name}.json").read_text())["settings"] | options
            == json.loads((tmp_path / f"{name}.json").read_text())["settings"]
        )
    assert results["some"].frames == pytest.approx(results["all"].frames / 2, rel=0.03)
    every, some = (
        json.loads((tmp_path / f"{name}.json").read_text())["mean_frame_period_ms"] for name in ("all", "some")
    )
    assert every == pytest.approx(20.0)
    assert some == pytest.approx(20 * results["all"].frames / results["some"].frames)
    assert some != 40.0  # the requested period, which the average only approximates
    assert f"mean frame period: {some:.1f} ms (40 ms requested)" in caplog.text
    # The number of two-second segments is about the same.
    assert results["some"].rankme_of == results["all"].rankme_of == "segments"
    assert abs(results["some"].rankme_rows - results["all"].rankme_rows) <= 3


def _table(folder: Path, recordings: Path) -> Table:
    rows = "".join(f"{path}\t{path.parent.name}\t12\n" for path in sorted(recordings.rglob("*.wav")))
    (folder / "table.tsv").write_text(f"path\tspeaker\tdigits\n{rows}")
    return read_table(folder / "table.tsv")


def test_probes_have_the_same_context_at_every_frame_period(
    encoder: Encoder, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _table(tmp_path, recordings)
    assert EncoderSource(encoder).frame_period_s is None
    store, frames = FeatureStore(), {}
    windows: list[float] = []
    of_seconds = Window.of_seconds

    def noted(context_s: float, frame_period_s: float) -> Window:
        windows.append(frame_period_s)
        return of_seconds(context_s, frame_period_s)

    monkeypatch.setattr(Window, "of_seconds", noted)
    settings = ProbeSettings("digits", steps=2, learning_rates=(1e-3,))
    for period_ms in (20.0, 50.0):
        assert encoder.compressor is not None
        encoder.compressor.frame_period_ms = period_ms
        results = run_probe({"e": encoder}, table, table, table, settings, features=store, baselines=(RANDOM,))
        assert [result.encoder for result in results] == ["e", RANDOM]
        features = store.get(EncoderSource(encoder), table, name="e")
        frames[period_ms] = sum(part.shape[1] for part in features.frames)
        assert features.mean_frame_period_s(encoder.config) == pytest.approx(period_ms / 1000, rel=0.03)
    assert frames[50.0] == pytest.approx(0.4 * frames[20.0], rel=0.03)  # not the other period's features
    assert windows[0] == 0.02  # the period of an encoder without a compressor
    assert windows[2] == pytest.approx(0.05, rel=0.03)
    average = Encoder(EncoderConfig(**_CONFIG.__dict__ | {"compressor": "average", "compressor_factor": 3}))
    assert EncoderSource(average).frame_period_s == pytest.approx(0.06)


def test_probe_command_says_the_rate(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    _table(tmp_path, recordings)
    settings = ProbeSettings("speaker", seeds=1, steps=2, learning_rates=(1e-3,))
    table = tmp_path / "table.tsv"
    probe(str(tmp_path / "model"), table, settings, dev=table, test=table, output=tmp_path / "p.json", rate=0.5)
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["settings"]["rate"] == 0.5
    assert found["settings"]["rate_bounds"] == [0.0, 1.0]
    # The period counts every frame, although the probe averages them.
    assert encoder.compressor is not None
    encoder.compressor.rate = 0.5
    of_test = FeatureStore().get(EncoderSource(encoder), read_table(table), name="e")
    period_ms = 1000 * of_test.mean_frame_period_s(encoder.config)
    periods = {result["encoder"]: result["frame_period_ms"] for result in found["results"]}
    assert periods == pytest.approx({str(tmp_path / "model"): period_ms, RANDOM: periods[RANDOM], "log-mel": 10.0})
    assert 20 < period_ms < 40


def test_labels_are_of_every_frame(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    settings = LabelSettings(model=str(tmp_path / "model"), layer=1, clusters=5)
    label(recordings, tmp_path / "labels", settings, num_workers=0)
    lines = [json.loads(line) for line in (tmp_path / "labels" / "labels.jsonl").read_text().splitlines()]
    for line in lines:
        assert len(line["custom"]["labels"]) == (round(line["duration"] * 16000) - 400) // 320 + 1
    Encoder(EncoderConfig(**_CONFIG.__dict__ | {"compressor": "average", "compressor_factor": 2})).save_pretrained(
        tmp_path / "average"
    )
    with pytest.raises(ValueError, match="a compressor with a fixed factor"):
        label(recordings, tmp_path / "none", LabelSettings(model=str(tmp_path / "average"), clusters=5), num_workers=0)


def test_the_average_weight_is_what_periods_are_solved_from(encoder: Encoder) -> None:
    """Check that the rate for a requested frame period follows from each utterance's own mean weight."""
    assert encoder.compressor is not None
    waveforms = Packed.pack([torch.randn(32_000, 1), torch.randn(50_000, 1)])
    with torch.inference_mode():
        compressed = encoder(waveforms, frame_period_ms=25.0).compressed
    assert compressed is not None
    assert compressed.weights is not None
    assert compressed.learned_weights is not None
    for mixed, learned in zip(
        *(Packed(part, compressed.layout).unpack() for part in (compressed.weights, compressed.learned_weights)),
        strict=True,
    ):
        rate = (1 - 20 / 25) / (1 - learned.mean())
        np.testing.assert_allclose(mixed, rate * learned + 1 - rate, atol=1e-5)
