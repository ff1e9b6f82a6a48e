"""Test BEST-RQ runs (reports, resuming, quality measurements), and mismatched weights of every system."""

import dataclasses
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import fastssl
from fastssl.models.best_rq import BestRqConfig, BestRqForPreTraining
from fastssl.models.conformer import ConformerEncoder
from fastssl.train.checkpoints import initialise
from fastssl.train.config import QualityConfig
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from fastssl.train.systems import SYSTEMS, build_model, system_of
from tests.tiny import write_recording
from tests.train.conftest import WORKER, MakeConfig, MakeSystem, model_of


def test_best_rq_learns_reports_and_resumes(make_config: MakeConfig, make_system: MakeSystem, tmp_path: Path) -> None:
    config = make_system(make_config(**WORKER, **{"trainer.max_steps": 16, "trainer.keep_every": 8}), "best-rq")
    pretrain(config)
    run = Path(config.output)
    rows = [row for row in read_metrics(run / "metrics.csv") if "prediction_loss" in row]
    assert rows[-1]["prediction_loss"] < rows[0]["prediction_loss"]
    assert rows[0]["chance"] == pytest.approx(1 / 13)
    assert 1 < rows[0]["code_perplexity"] <= 13
    assert {round(13 * row["code_utilisation"], 6) for row in rows} <= set(range(1, 14))
    encoder = fastssl.load_encoder(run)
    assert isinstance(encoder, ConformerEncoder)

    # Repeat the second half.
    halves = dataclasses.replace(config, output=str(tmp_path / "halves"))
    run.rename(halves.output)
    checkpoints = Path(halves.output) / "checkpoints"
    expected = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    (checkpoints / "0000008.ckpt").replace(checkpoints / "last.ckpt")
    pretrain(halves, resume=True)
    found = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert found.keys() == expected.keys()

    # A run gives its quantiser and classifier too; with an encoder alone, they are newly initialised.
    assert isinstance(config.model, BestRqConfig)
    model = BestRqForPreTraining(config.model)
    assert initialise(model, halves.output)
    assert torch.equal(model.quantizer.codebook, expected["model.quantizer.codebook"])
    assert not initialise(model, str(Path(halves.output) / "encoder"))


@pytest.mark.parametrize("system", SYSTEMS)
def test_weights_of_another_system_are_refused(
    system: str, make_config: MakeConfig, make_system: MakeSystem, tmp_path: Path
) -> None:
    other = "wav2vec2" if system != "wav2vec2" else "best-rq"
    config = make_system(make_config(**{"trainer.max_steps": 1}), other)
    pretrain(config)
    with pytest.raises(ValueError, match=f"is a run of {other}, expected a run of {system}"):
        initialise(build_model(model_of(system)), config.output)
    assert system_of(model_of(system)) == system


@pytest.mark.usefixtures("rendered")
def test_quality_shows_everywhere_and_changes_nothing(
    make_config: MakeConfig, make_system: MakeSystem, tmp_path: Path
) -> None:
    plain = make_system(make_config(**{"data.valid": 0.5}), "best-rq")
    watched = dataclasses.replace(plain, output=str(tmp_path / "watched"), quality=QualityConfig(every=3))
    pretrain(plain)
    pretrain(watched)
    states = [
        torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for config in (plain, watched)
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())

    run = Path(watched.output)
    measured = [row for row in read_metrics(run / "metrics.csv") if "quality_effective_rank_0" in row]
    assert [row["update"] for row in measured] == [3, 6, 8]
    assert all(1 <= row["quality_rankme_2"] <= 32 for row in measured)
    board = EventAccumulator(str(run / "logs"))
    board.Reload()
    assert [event.step for event in board.Scalars("quality_davies_bouldin_1")] == [3, 6, 8]
    assert "% of the training time" in (run / "logs" / "pretrain.log").read_text()
    # Four more panels double the figure's height.
    heights = [imread(Path(config.output) / "report.png").shape[0] for config in (plain, watched)]
    assert heights[1] == 2 * heights[0]

    # A run resumed without measurements keeps its earlier rows of quality.
    more = dataclasses.replace(watched.trainer, max_steps=10)
    pretrain(dataclasses.replace(watched, trainer=more, quality=QualityConfig()), resume=True)
    rows = read_metrics(run / "metrics.csv")
    assert sum("quality_effective_rank_0" in row for row in rows) == 3
    assert rows[-1]["update"] == 10


def test_quality_of_a_single_recording_is_left_out_with_a_word(make_config: MakeConfig, tmp_path: Path) -> None:
    write_recording(tmp_path / "audio" / "only.wav", 3.0, seed=0)
    config = make_config(audio=tmp_path / "audio", **{"trainer.max_steps": 1})
    pretrain(dataclasses.replace(config, quality=QualityConfig(every=1)))
    log = (Path(config.output) / "logs" / "pretrain.log").read_text()
    assert "quality is not measured, because no recording is held out" in log


def test_quality_needs_held_out_recordings_and_layers_that_exist(make_config: MakeConfig) -> None:
    config = make_config(**{"data.valid": 0.0})
    with pytest.raises(ValueError, match=r"quality\.every: measures held-out recordings"):
        pretrain(dataclasses.replace(config, quality=QualityConfig(every=2)))
    assert not Path(config.output).exists()
    with pytest.raises(ValueError, match=r"quality\.layers: the model has layers 0 to 2, got 3"):
        dataclasses.replace(config, quality=QualityConfig(every=2, layers=(3,)))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_model_opens_the_folder_of_its_encoder_and_no_other(system: str, tmp_path: Path) -> None:
    model = build_model(model_of(system))
    model.speech_encoder.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    for name, tensor in opened.speech_encoder.state_dict().items():
        assert torch.equal(tensor, model.speech_encoder.state_dict()[name]), name
    other = build_model(model_of("best-rq" if SYSTEMS[system].config_class().model_type == "hubert" else "hubert"))
    with pytest.raises(ValueError, match=r"config\.json: model_type is"):
        type(other).from_pretrained(tmp_path)
