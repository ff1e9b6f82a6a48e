"""Runs of BEST-RQ: what they report and leave, and that they resume."""

import dataclasses
from pathlib import Path

import pytest
import torch

import fastssl
from fastssl.models.best_rq import BestRqConfig, BestRqForPreTraining
from fastssl.models.conformer import ConformerEncoder
from fastssl.train.checkpoints import initialise
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from fastssl.train.systems import SYSTEMS, build_model, system_of
from tests.train.conftest import MakeConfig, MakeSystem, model_of


def test_best_rq_learns_reports_and_resumes(make_config: MakeConfig, make_system: MakeSystem, tmp_path: Path) -> None:
    config = make_system(make_config(**{"trainer.max_steps": 16, "trainer.keep_every": 8}), "best-rq")
    pretrain(config)
    run = Path(config.output)
    rows = [row for row in read_metrics(run / "metrics.csv") if "prediction_loss" in row]
    assert rows[-1]["prediction_loss"] < rows[0]["prediction_loss"]
    assert rows[0]["chance"] == pytest.approx(1 / 13)
    assert 1 < rows[0]["code_perplexity"] <= 13
    assert {round(13 * row["code_utilisation"], 6) for row in rows} <= set(range(1, 14))
    encoder = fastssl.load_encoder(run)
    assert isinstance(encoder, ConformerEncoder)

    # The second half again.
    halves = dataclasses.replace(config, output=str(tmp_path / "halves"))
    run.rename(halves.output)
    checkpoints = Path(halves.output) / "checkpoints"
    expected = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    (checkpoints / "0000008.ckpt").replace(checkpoints / "last.ckpt")
    pretrain(halves, resume=True)
    found = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert found.keys() == expected.keys()

    # Quantiser and classifier come along; an encoder alone leaves them fresh.
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
    with pytest.raises(ValueError, match=f"is a run of {other}, and this is to be one of {system}"):
        initialise(build_model(model_of(system)), config.output)
    assert system_of(model_of(system)) == system
