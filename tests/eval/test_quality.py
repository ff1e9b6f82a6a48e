"""Test that the quality measures without labels are correct and reproducible for every layer."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet
from torch import Tensor, nn

from fastssl import cli
from fastssl.data.corpus import open_corpus
from fastssl.data.rules import RULES
from fastssl.eval.quality import measure as quality_module
from fastssl.eval.quality.command import quality
from fastssl.eval.quality.measure import first_minutes, measure_quality, quality_loader
from fastssl.metrics import effective_rank, fit_kmeans, score_clusters
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.speech_encoder import EncoderOutput
from fastssl.packing import Layout, Packed
from tests.tiny import TINY_MODEL, write_recording


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    """Save an encoder with two layers of width 32 and dropout in `tmp_path / "model"`."""
    model = TINY_MODEL
    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig(**{field.name: getattr(model, field.name) for field in _FIELDS}))
    encoder.save_pretrained(tmp_path / "model")
    return encoder


_FIELDS = dataclasses.fields(EncoderConfig)


class _Samples(nn.Module):
    """An encoder whose only layer copies samples: 4 per frame, with frames 640 samples apart (25 a second)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=0, hidden_size=4, samples_per_frame=640)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, waveforms: Packed) -> EncoderOutput:
        frames = Packed.pack([part.unfold(0, 4, 640)[:, 0] * self.scale for part in waveforms.unpack()])
        return EncoderOutput(frames, [frames])


def _noise(frames: list[int], seed: int = 0) -> Packed:
    """Return noise from which `_Samples` makes these numbers of frames."""
    random = torch.Generator().manual_seed(seed)
    layout = Layout.from_lengths([640 * number for number in frames])
    return Packed(torch.randn(layout.total, 1, generator=random), layout)


def _rank(rows: Tensor) -> float:
    return effective_rank(torch.linalg.svdvals(rows.double()))


def test_numbers_of_an_encoder(encoder: Encoder, recordings: Path) -> None:
    loader = quality_loader(open_corpus(recordings, min_duration_s=1).cuts, normalize=True)
    encoder.eval()
    with torch.no_grad():
        outputs = [encoder(batch.waveforms) for batch in loader]
    encoder.train()
    results = measure_quality(encoder, (batch.waveforms for batch in loader))
    assert encoder.training
    assert [result.layer for result in results] == [0, 1, 2]
    for result in results:
        hidden = [output.hidden_states[result.layer] for output in outputs]
        frames = torch.cat([packed.values for packed in hidden])
        utterances = [utterance for packed in hidden for utterance in packed.unpack()]
        assert (result.frames, result.utterances) == (len(frames), len(utterances))
        assert result.effective_rank == pytest.approx(_rank(frames), rel=1e-6)
        # The recordings last 1 to 4 s, so each gives one or two segments: still fewer rows than the 32 features.
        pieces = [piece for frames in utterances for piece in frames.tensor_split(max(1, round(len(frames) / 100)))]
        assert len(utterances) < len(pieces)
        assert (result.rankme_of, result.rankme_rows) == ("segments", len(pieces))
        assert result.rankme == pytest.approx(_rank(torch.stack([piece.sum(0) for piece in pieces])), rel=1e-5)
        # K-means gets all frames, because there are fewer than its maximum.
        centred = frames - torch.from_numpy(frames.numpy().mean(0, dtype=np.float64)).float()
        clusters = len(frames) // 100
        scores = score_clusters([centred], fit_kmeans(centred.numpy(), clusters, seed=0))
        assert (result.clustered_frames, result.clusters) == (len(frames), clusters)
        assert result.inertia == pytest.approx(scores.inertia, rel=1e-6)
        assert result.davies_bouldin == pytest.approx(scores.davies_bouldin, rel=1e-6)
        assert result.log_inertia_per_frame == pytest.approx(math.log(result.inertia / len(frames)))


def test_a_seed_fixes_the_numbers() -> None:
    batches = [_noise([300, 200, 80], seed) for seed in (0, 1)]
    first, again, other = (
        measure_quality(_Samples(), batches, max_frames=700, seed=seed)[0]  # of 1160 frames
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.clustered_frames == 700
    assert first.inertia != other.inertia
    assert (first.effective_rank, first.rankme) == (other.effective_rank, other.rankme)


def test_a_stream_equals_all_at_once() -> None:
    at_once = _noise([300, 200, 80, 40])
    parts = [Packed.pack([waveform]) for waveform in at_once.unpack()]
    whole, streamed = (
        dataclasses.asdict(measure_quality(_Samples(), batches, max_frames=500)[0]) for batches in ([at_once], parts)
    )
    assert whole.pop("rankme_of") == streamed.pop("rankme_of")
    assert streamed == pytest.approx(whole, rel=1e-6)


def test_rankme_takes_utterances_where_they_are_enough_and_the_frame_rate_from_the_config() -> None:
    many, few = _noise([130, 90, 30, 70]), _noise([130, 90, 30])
    with torch.no_grad():
        samples = {id(packed): _Samples()(packed).features.unpack() for packed in (many, few)}
    result = measure_quality(_Samples(), [many])[0]
    assert (result.rankme_of, result.rankme_rows) == ("utterances", 4)
    assert result.rankme == pytest.approx(_rank(torch.stack([x.sum(0) for x in samples[id(many)]])), rel=1e-6)
    # A segment is two seconds or 50 frames, so the utterances give three, two and one.
    result = measure_quality(_Samples(), [few])[0]
    x, y, z = samples[id(few)]
    rows = [x[:44], x[44:87], x[87:], y[:45], y[45:], z]
    assert (result.rankme_of, result.rankme_rows) == ("segments", 6)
    assert result.rankme == pytest.approx(_rank(torch.stack([row.sum(0) for row in rows])), rel=1e-6)


def test_frames_of_the_clusters_are_a_fixed_number_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fit(frames: Any, clusters: int, *, seed: int) -> Tensor:
        seen.append(frames.copy())
        return fit_kmeans(frames, clusters, seed=seed)

    monkeypatch.setattr(quality_module, "fit_kmeans", fit)
    # The value of each frame is its own number.
    batches = []
    for begin in range(0, 4000, 250):
        waveform = torch.arange(begin, begin + 250.0).repeat_interleave(640)[:, None]
        batches.append(Packed.pack([waveform[: 640 * 100], waveform[640 * 100 :]]))
    result = measure_quality(_Samples(), batches, max_frames=1000)[0]
    assert (result.frames, result.clustered_frames, result.clusters) == (4000, 1000, 10)
    numbers = np.sort(seen[0][:, 0])
    steps = np.diff(numbers)
    assert len(numbers) == 1000
    assert (steps > 0.5).all()  # no frame twice
    np.testing.assert_allclose(steps, steps.round(), atol=1e-3)
    # The draw is even: a quarter of the frames of each eighth.
    share, _ = np.histogram(numbers - numbers[0], bins=8, range=(0, 4000))
    assert (abs(share - 125) < 45).all()


def test_the_encoder_is_left_as_it_was(encoder: Encoder) -> None:
    encoder.train()
    encoder.feature_extractor.eval()  # as if the user had frozen it
    modes = [module.training for module in encoder.modules()]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    measure_quality(encoder, [Packed.pack([torch.randn(16000 * 6, 1)])], layers=[1])
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_what_cannot_be_measured(encoder: Encoder) -> None:
    audio = Packed.pack([torch.randn(16000 * 6, 1)])
    assert [result.layer for result in measure_quality(encoder, [audio], layers=[2, 0])] == [0, 2]
    for layers in ([], [3], [-1]):
        with pytest.raises(ValueError, match="layers: the model has layers 0 to 2"):
            measure_quality(encoder, [audio], layers=layers)
    with pytest.raises(ValueError, match="max_frames: "):
        measure_quality(encoder, [audio], max_frames=0)
    with pytest.raises(ValueError, match="layer 0: frames: clustering needs at least 200, got 99"):
        measure_quality(encoder, [Packed.pack([torch.randn(32000, 1)])])
    with pytest.raises(ValueError, match="layer 0: rows: expected at least one row"):
        measure_quality(encoder, [])
    with torch.no_grad():
        encoder.get_parameter("encoder.layers.1.final_layer_norm.weight")[3] = math.nan
    with pytest.raises(ValueError, match="layer 2: rows: some are NaN"):
        measure_quality(encoder, [audio])


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_frames_that_are_all_the_same() -> None:
    result = measure_quality(_Samples(), [Packed.pack([torch.ones(640 * 250, 1)])])[0]
    assert result.effective_rank == pytest.approx(1)
    assert (result.inertia, result.used_clusters) == (0, 1)
    assert math.isnan(result.davies_bouldin)


def test_first_minutes_do_not_depend_on_the_order(recordings: Path) -> None:
    cuts = list(open_corpus(recordings, min_duration_s=1).cuts)
    taken = first_minutes(cuts, 0.2)
    assert [cut.id for cut in first_minutes(cuts[::-1], 0.2)] == [cut.id for cut in taken]
    duration_s = sum(cut.duration for cut in taken)
    assert 12 <= duration_s < 16
    assert [cut.id for cut in taken] != [cut.id for cut in cuts[: len(taken)]]
    # Fewer minutes take a prefix of these cuts; more minutes than exist take all cuts.
    assert first_minutes(cuts, 0.1) == taken[: len(first_minutes(cuts, 0.1))]
    assert {cut.id for cut in first_minutes(cuts, 60)} == {cut.id for cut in cuts}
    with pytest.raises(ValueError, match="minutes: must be positive, got 0"):
        first_minutes(cuts, 0)


def test_command(encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = tmp_path / "audio"
    for index in range(4):
        write_recording(audio / f"{index}.wav", 3.0, seed=index)
    (audio / "empty.wav").touch()
    broken = audio / "broken.flac"
    broken.write_bytes(_truncated_flac(tmp_path))
    out = tmp_path / "numbers" / "quality.json"
    command = ["quality", str(tmp_path / "model"), str(audio), "--output", str(out), "--layers", "[0,2]"]
    assert cli.main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Davies-Bouldin" in shown
    assert "only 0.2 of the 60 minutes requested are available" in shown
    assert "RankMe is based on only 4 segments for 32 dimensions" in shown
    report = json.loads(out.read_text())
    assert [layer["layer"] for layer in report["layers"]] == [0, 2]
    assert report["audio_hours"] == pytest.approx(12 / 3600)
    assert report["settings"] == {
        "minutes": 60.0,
        "max_frames": 102_400,
        "seed": 0,
        "channel": None,
        "rate": None,
        "frame_period_ms": None,
        "rules": RULES,
        "inference": None,
    }
    assert {Path(problem["name"]).name for problem in report["left_out"]} == {"empty.wav", "broken.flac"}
    assert "broken.flac does not decode" in shown.replace("\n", " ")
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["quality.json", "quality.png"]
    before = out.read_bytes()
    assert cli.main(command) == 0
    assert out.read_bytes() == before
    write_recording(tmp_path / "new.wav", 3.0, seed=9)
    (tmp_path / "new.wav").rename(audio / "new.wave")  # version 1 does not look for this extension
    assert cli.main([*command, "--rules", "1"]) == 0
    report = json.loads(out.read_text())
    assert report["settings"]["rules"] == 1
    assert report["audio_hours"] == pytest.approx(12 / 3600)
    assert cli.main([*command, "--rules", "99"]) == 1
    assert "--rules: must be from 1 to" in capsys.readouterr().err


def _truncated_flac(folder: Path) -> bytes:
    import soundfile

    random = np.random.default_rng(0)
    soundfile.write(folder / "whole.flac", 0.1 * random.standard_normal(48000), 16000)
    whole = (folder / "whole.flac").read_bytes()
    return whole[: len(whole) // 2]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_json_has_no_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recording(tmp_path / "audio" / "0.wav", 9.0, seed=0)
    silent = _Samples()
    vars(silent.config).update(receptive_field_samples=4, do_normalize=False, frame_period_ms=20.0)
    vars(silent).update(compressor=None, normalizes=False)
    monkeypatch.setattr("fastssl.eval.encode.load_encoder", lambda model, **_: silent)
    monkeypatch.setattr(_Samples, "forward", _constant)
    quality("any", tmp_path / "audio", tmp_path / "quality.json")
    layer = json.loads((tmp_path / "quality.json").read_text(), parse_constant=pytest.fail)["layers"][0]
    assert (layer["davies_bouldin"], layer["log_inertia_per_frame"], layer["inertia"]) == (None, None, 0.0)


def _constant(self: _Samples, waveforms: Packed) -> EncoderOutput:
    frames = Packed(torch.ones(300, 4), Layout.from_lengths([300]))
    return EncoderOutput(frames, [frames])


def test_command_refuses(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output: .* must be a file whose name ends with \.json"):
        quality(tmp_path / "model", recordings, tmp_path / "quality.png")
    with pytest.raises(ValueError, match="layers: the model has layers 0 to 2"):
        quality(tmp_path / "model", recordings, tmp_path / "quality.json", layers=[7])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.flac").write_bytes(_truncated_flac(tmp_path))
    with pytest.raises(ValueError, match=r"AUDIO: none of its recordings can be used; .*a\.flac does not decode"):
        quality(tmp_path / "model", broken, tmp_path / "quality.json")
    assert not (tmp_path / "quality.json").exists()


def test_loader_takes_no_random_number(recordings: Path) -> None:
    loader = quality_loader(CutSet.from_cuts(list(open_corpus(recordings, min_duration_s=1).cuts)[:2]), normalize=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert sum(len(batch.names) for batch in loader) == 2
    assert torch.equal(torch.get_rng_state(), before)
