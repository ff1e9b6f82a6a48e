"""Test that every option that names a model takes a name on the Hub, with a local cache in place of the Hub."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastssl import cli
from fastssl.interop import load_encoder
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import EncoderConfig
from fastssl.train.checkpoints import initialise
from fastssl.train.systems import build_model
from tests.hub import put_into_cache
from tests.train.conftest import MakeConfig, model_of

NAME = "somebody/tiny-speech"
SHORT = ["--trainer.progress", "false", "--data.num_workers", "0", "--trainer.max_steps", "2"]


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a wav2vec 2.0 with its quantiser on the stand-in Hub, and return the folder that it was copied from."""
    torch.manual_seed(5)
    model = build_model(model_of("wav2vec2"))
    encoder = model.speech_encoder
    encoder.save_pretrained(tmp_path / "original")
    put_into_cache(monkeypatch, tmp_path / "cache", NAME, tmp_path / "original")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "original"


def settings_of(system: str, config: Any, folder: Path) -> str:
    model = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    model.pop("gumbel_temperature", None)
    data = {"max_duration_s": 6, "crop_s": 2, "min_duration_s": 1}
    (folder / f"{system}.yaml").write_text(yaml.safe_dump({"system": system, "model": model, "data": data}))
    return str(folder / f"{system}.yaml")


def test_init_takes_the_weights(on_the_hub: Path, make_config: MakeConfig) -> None:
    model = build_model(make_config().model)
    assert not initialise(model, NAME)  # it has no quantiser
    for name, tensor in load_encoder(on_the_hub).state_dict().items():
        assert torch.equal(model.speech_encoder.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match=r"^--init: somebody/else: no such .* loading from the Hub failed"):
        initialise(model, "somebody/else")


def test_init_takes_the_heads_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and names of `Wav2Vec2ForPreTraining`, which the published base models have."""
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(model_of("wav2vec2"), num_hidden_layers=1)
    shape = {field.name: getattr(config, field.name) for field in dataclasses.fields(EncoderConfig)}
    heads = {
        name: getattr(config, name)
        for name in ("num_codevector_groups", "num_codevectors_per_group", "codevector_dim", "proj_codevector_dim")
    }
    theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**shape | heads))
    theirs.save_pretrained(tmp_path / "theirs")
    put_into_cache(monkeypatch, tmp_path / "cache", NAME, tmp_path / "theirs")
    model = build_model(config)
    assert initialise(model, NAME)
    assert torch.equal(model.state_dict()["project_q.weight"], theirs.state_dict()["project_q.weight"])


@pytest.mark.usefixtures("on_the_hub")
def test_every_command_takes_the_name(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = settings_of("wav2vec2", model_of("wav2vec2"), tmp_path)
    first = [str(recordings), "--recipe", recipe, "--init", NAME, "--output", str(tmp_path / "run"), *SHORT]
    assert cli.main(["pretrain", *first]) == 0, capsys.readouterr().err
    assert f"weights from {NAME}" in (tmp_path / "run" / "logs" / "pretrain.log").read_text()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["init"] == NAME

    student = DistillationConfig(**vars(model_of("distillation")) | {"feat_proj_layer_norm": True})
    recipe = settings_of("distillation", student, tmp_path)
    second = [str(recordings), "--recipe", recipe, "--teacher", NAME, "--output", str(tmp_path / "student"), *SHORT]
    assert cli.main(["distill", *second]) == 0, capsys.readouterr().err

    labels = [str(recordings), "--model", NAME, "--layer", "1", "--clusters", "3", "--output", str(tmp_path / "labels")]
    assert cli.main(["label", *labels]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "labels" / "settings.json").read_text())["model"] == NAME
    assert cli.main(["extract", NAME, str(recordings), "--output", str(tmp_path / "features")]) == 0
    assert cli.main(["quality", NAME, str(recordings), "--output", str(tmp_path / "quality.json")]) == 0

    for command, option in (("pretrain", "--init"), ("distill", "--teacher"), ("label", "--model")):
        arguments = {"pretrain": first, "distill": second, "label": labels}[command]
        unknown = [value.replace(NAME, "somebody/else") for value in arguments]
        unknown[unknown.index("--output") + 1] = str(tmp_path / f"none-{command}")
        capsys.readouterr()
        assert cli.main([command, *unknown]) == 1
        message = capsys.readouterr().err
        assert "somebody/else: no such file or folder here, and loading from the Hub failed" in message, option
