"""Test pre-training with a compressor: started from a plain encoder, guided by segments, and resumed."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from fastssl.data.batches import UpdateSampler, WaveformDataset
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.interop import load_encoder
from fastssl.train.checkpoints import initialise
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from fastssl.train.run_labels import attach_given
from fastssl.train.systems import build_model
from tests.tiny import write_recording
from tests.train.conftest import WORKER, MakeConfig, MakeSystem, rewound


def _compressed(config: PretrainConfig, segments: Path | None = None) -> PretrainConfig:
    data = dataclasses.replace(config.data, segments=None if segments is None else str(segments))
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, compressor="integrate-and-fire"), data=data
    )


@pytest.fixture
def segments(recordings: Path, tmp_path: Path) -> Path:
    """Make a folder of MFCC segments for the recordings."""
    folder = tmp_path / "segments"
    label(recordings, folder, LabelSettings(clusters=7, segment_price=500.0), num_workers=0)
    return folder


@pytest.mark.parametrize("system", ["wav2vec2", "hubert", "best-rq"])
def test_a_run_learns_boundaries_and_resumes_to_the_bit(
    system: str, make_config: MakeConfig, make_system: MakeSystem, segments: Path
) -> None:
    whole = _compressed(make_system(make_config("whole", **WORKER, **{"trainer.keep_every": 4}), system), segments)
    pretrain(whole)
    rows = read_metrics(Path(whole.output) / "metrics.csv")
    for row in rows:
        prefix = "" if "frame_period_ms" in row else "valid_"
        for name in ("segment_loss", "frame_loss", "quantity_loss"):
            assert row[f"{prefix}{name}"] > 0
        assert 20 < row[f"{prefix}frame_period_ms"] < 100
    encoder = load_encoder(whole.output)
    assert encoder.compressor is not None
    broken = rewound(whole, Path(whole.output).with_name("broken"), update=4)
    pretrain(broken, resume=True)
    expected, found = (
        torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for config in (whole, broken)
    )
    assert any(".compressor." in key for key in expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_plain_encoder_learns_to_compress(make_config: MakeConfig) -> None:
    plain = make_config("plain", **{"trainer.max_steps": 1})
    pretrain(plain)
    config = _compressed(make_config("compressed"))
    model, untouched = build_model(config.model), build_model(config.model)
    untouched.load_state_dict(model.state_dict())
    assert not initialise(model, plain.output)  # False: the compressor is newly initialised
    saved = torch.load(Path(plain.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in model.state_dict().items():
        expected = untouched.state_dict()[name] if ".compressor." in name else saved[f"model.{name}"]
        assert torch.equal(tensor, expected), name
    # Dropping the compressor of a trained encoder would change the encoder, so it is refused.
    model.speech_encoder.save_pretrained(Path(plain.output) / "made")
    with pytest.raises(ValueError, match=r"model\.compressor is integrate-and-fire there and none here"):
        initialise(build_model(plain.model), str(Path(plain.output) / "made"))
    # False, because the encoder's folder has no quantiser, which is therefore newly initialised.
    assert not initialise(build_model(config.model), str(Path(plain.output) / "made"))


def test_segments_go_with_the_crops_of_a_run(make_config: MakeConfig, segments: Path) -> None:
    config = _compressed(make_config(), segments)
    data = PretrainDataModule(config.audio, config.data, normalize=False, seed=0, accumulation=1)
    assert set(attach_given(config, data)) == {"segments"}
    specs = iter(UpdateSampler(data.train_corpus.cuts, max_duration_s=6, crop_s=2, seed=0))
    dataset = WaveformDataset(normalize=False, segments=data._labels["segments", "train"])
    model = build_model(config.model)
    for _ in range(4):
        batch = dataset[next(specs)]
        assert batch.labels is None
        assert batch.segments is not None
        frames = model.speech_encoder.extract_features(batch.waveforms).layout.total
        assert batch.segments.weights.shape == batch.segments.ends.shape == (frames,)
        assert 0 < batch.segments.weights.min() < batch.segments.weights.max() <= 1


def test_held_out_folders_get_segments_of_the_same_classes(
    make_config: MakeConfig, segments: Path, tmp_path: Path
) -> None:
    for index in range(3):
        write_recording(tmp_path / "valid" / f"{index}.wav", 2.0, seed=50 + index)
    changes = {"data.valid": str(tmp_path / "valid"), "trainer.max_steps": 4}
    config = _compressed(make_config(**changes), segments)
    pretrain(config)
    made = Path(config.output) / "segments-valid"
    assert (made / "kmeans.safetensors").read_bytes() == (segments / "kmeans.safetensors").read_bytes()
    assert '"segment_price": 500.0' in (made / "settings.json").read_text()
    assert read_metrics(Path(config.output) / "metrics.csv")[-1]["valid_segment_loss"] > 0


def test_segments_that_do_not_serve(
    make_config: MakeConfig, make_system: MakeSystem, segments: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"data\.segments: only --model\.compressor integrate-and-fire learns from segments"
    ):
        make_config(**{"data.segments": str(segments)})
    with pytest.raises(ValueError, match=r"data\.segments: only --model\.compressor"):
        make_system(_compressed(make_config(), segments), "best-rq")
    with pytest.raises(ValueError, match="no labels there"):
        pretrain(_compressed(make_config(), tmp_path / "nowhere"))
    label(Path(make_config().audio), tmp_path / "plain", LabelSettings(clusters=7), num_workers=0)
    with pytest.raises(ValueError, match=r"has no segments; make it with `fastssl label --segment_ms`"):
        pretrain(_compressed(make_config(), tmp_path / "plain"))
    lines = (segments / "labels.jsonl").read_text().splitlines(keepends=True)
    (segments / "labels.jsonl").write_text("".join(lines[:7]))
    config = _compressed(make_config(), segments)
    with pytest.raises(ValueError, match=r"(?s)data\.segments: 7 of 14 recordings have no matching labels.*\.wav"):
        pretrain(config)
    assert not Path(config.output).exists()


def test_settings_are_kept(make_config: MakeConfig, segments: Path) -> None:
    config = _compressed(make_config(**{"trainer.max_steps": 1}), segments)
    pretrain(config)
    kept = yaml.safe_load((Path(config.output) / "config.yaml").read_text())
    assert kept["data"]["segments"] == str(segments)
    assert kept["model"]["compression_range"] == [0.0, 1.0]
