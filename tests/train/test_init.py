"""Test training that starts from given weights (`--init`)."""

from pathlib import Path

import pytest
import torch

from fastssl.train.checkpoints import initialise
from fastssl.train.pretrain import pretrain
from fastssl.train.systems import build_model
from tests.train.conftest import MakeConfig


def test_run_gives_all_its_weights_and_no_optimiser(make_config: MakeConfig) -> None:
    first = make_config("first", **{"trainer.max_steps": 2})
    pretrain(first)
    saved = torch.load(Path(first.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = build_model(first.model)
    assert initialise(model, first.output)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"]), name

    # With a negligible learning rate, the weights stay at their initial values.
    changes = {"trainer.max_steps": 1, "optimizer.lr": 1e-30, "model.hidden_dropout": 0.0}
    second = make_config("second", init=first.output, **changes)
    pretrain(second)
    checkpoint = torch.load(Path(second.output) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    for name, tensor in checkpoint["state_dict"].items():
        assert torch.equal(tensor, saved[name]), name
    assert {float(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()} == {1.0}


def test_folder_of_an_encoder_leaves_the_quantiser_fresh(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config().model
    source, model, untouched = (build_model(config) for _ in range(3))
    source.speech_encoder.save_pretrained(tmp_path / "encoder")
    untouched.load_state_dict(model.state_dict())
    # A folder that Transformers can open, and a run with only its encoder left.
    for folder in (tmp_path / "encoder", tmp_path):
        assert not initialise(model, str(folder))
        for name, tensor in model.state_dict().items():
            expected = source if name.startswith("wav2vec2.") else untouched
            assert torch.equal(tensor, expected.state_dict()[name]), name


def test_other_architectures_and_other_folders_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config().model
    build_model(config).speech_encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"model\.hidden_size is 32 there and 16 here"):
        initialise(build_model(make_config(**{"model.hidden_size": 16}).model), str(tmp_path))
    # The weights have the same shapes, but the setting changes how they are used.
    with pytest.raises(ValueError, match=r"is False there and True here.* add: --model\.do_stable_layer_norm false$"):
        initialise(build_model(make_config(**{"model.do_stable_layer_norm": True}).model), str(tmp_path))
    with pytest.raises(ValueError, match=r"add: --model\.conv_dim '\[16,16,16,16,16,16,16\]'$"):
        initialise(build_model(make_config(**{"model.conv_dim": (8,) * 7}).model), str(tmp_path))
    with pytest.raises(ValueError, match=r"neither a run \(no .*last\.ckpt\) nor a model"):
        initialise(build_model(config), str(tmp_path / "nowhere"))
    refused = make_config("refused", init=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--init"):
        pretrain(refused)
    assert not Path(refused.output).exists()
