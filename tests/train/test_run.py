"""Test the files and scores of a finished run."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from fastssl.data.batches import WaveformDataset, fixed_batches
from fastssl.interop import load_encoder
from fastssl.nn.random import utterance_keys
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import VALIDATION_UPDATE
from fastssl.train.pretrain import pretrain
from tests.train.conftest import WORKER, MakeConfig


@pytest.mark.usefixtures("rendered")
def test_run_folder(make_config: MakeConfig) -> None:
    config = make_config(**WORKER)
    pretrain(config)
    run = Path(config.output)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "encoder",
        "logs",
        "metrics.csv",
        "report.png",
    ]
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "8 updates" in (run / "logs" / "pretrain.log").read_text()

    rows = read_metrics(run / "metrics.csv")
    training = [row for row in rows if "loss" in row]
    assert [row["update"] for row in training] == list(range(1, 9))
    assert [row["update"] for row in rows if "valid_loss" in row] == [4, 8]
    # Crops last up to 2 s and batches up to 6 s.
    assert 8 * 4 < training[-1]["audio_hours"] * 3600 <= 8 * 6
    assert training[3]["learning_rate"] == config.optimizer.lr
    assert training[3]["temperature"] == pytest.approx(2.0 * 0.9**3)
    assert training[0]["chance"] == pytest.approx(1 / 101, rel=1e-4)

    board = EventAccumulator(str(run / "logs"))
    board.Reload()
    assert [event.step for event in board.Scalars("accuracy")] == list(range(1, 9))
    assert board.Scalars("valid_loss")[-1].value == pytest.approx(rows[-1]["valid_loss"])

    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in load_encoder(run).state_dict().items():
        assert torch.equal(tensor, trained[f"model.wav2vec2.{name}"]), name


def test_loss_is_the_mean_over_masked_frames_and_validation_is_fixed(make_config: MakeConfig) -> None:
    config = make_config(**{"optimizer.lr": 1e-30, "trainer.max_steps": 4, "trainer.val_check_interval": 2})
    pretrain(config)
    rows = [row for row in read_metrics(Path(config.output) / "metrics.csv") if "valid_loss" in row]
    # The learning rate is negligible, so both validations give the same score.
    assert rows[0]["valid_contrastive_loss"] == rows[1]["valid_contrastive_loss"]

    data = PretrainDataModule(config.audio, config.data, normalize=True, seed=config.seed, accumulation=1)
    assert data.valid_corpus is not None
    specs = fixed_batches(data.valid_corpus.cuts, max_duration_s=6, crop_s=2, seed=config.seed)
    module = _trained_model(config.output)
    loss, frames = 0.0, 0
    for batch in (WaveformDataset(normalize=True)[spec] for spec in specs):
        keys = utterance_keys(config.seed, VALIDATION_UPDATE, batch.ids)
        with torch.no_grad():
            output = module(batch.waveforms, keys=keys, gumbel_temperature=1.0)
        loss += output.contrastive_loss.item()
        frames += output.masked_frames
    assert rows[0]["valid_contrastive_loss"] == pytest.approx(loss / frames, rel=1e-5)


def _trained_model(output: str) -> torch.nn.Module:
    import yaml

    from fastssl.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForPreTraining
    from fastssl.train.checkpoints import initialise

    model = Wav2Vec2ForPreTraining(
        Wav2Vec2Config.from_dict(yaml.safe_load((Path(output) / "config.yaml").read_text())["model"])
    )
    initialise(model, output)
    return model.eval()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_learn_on_the_gpu(make_config: MakeConfig, precision: str) -> None:
    changes = {"trainer.accelerator": "gpu", "trainer.precision": precision, "trainer.max_steps": 60}
    config = make_config(**changes, **{"trainer.val_check_interval": 60, "optimizer.clip_norm": 1.0})
    pretrain(config)
    rows = [row for row in read_metrics(Path(config.output) / "metrics.csv") if "loss" in row]
    assert rows[-1]["contrastive_loss"] < rows[0]["contrastive_loss"]
