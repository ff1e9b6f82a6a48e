"""Test encoder folders with wrong contents: errors name the file, and files outside the folder are never opened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.models.encoder import Encoder, EncoderConfig
from tests.interop.tiny_models import TINY


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": ["wav2vec2"]}, "model_type is .* expected one of"),
        ({"hidden_size": "48"}, "hidden_size: must be of type int, got '48'"),
        ({"hidden_size": None}, "hidden_size: must be of type int, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads: must be at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: must be at least 0, got -1"),
        ({"conv_dim": 32}, "conv_dim: must be a list"),
        ({"conv_stride": [0] * 7}, "conv_stride: must be at least 1, got 0"),
        ({"layer_norm_eps": None}, "layer_norm_eps: must be of type float, got None"),
        ({"num_conv_pos_embedding_groups": 7}, "num_conv_pos_embedding_groups: must divide hidden_size=.*, got 7"),
    ],
)
def test_values_that_no_config_has_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    Encoder(EncoderConfig.from_dict(TINY)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        Encoder.from_pretrained(tmp_path)


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    Encoder(EncoderConfig.from_dict(TINY)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    for content, message in {
        "[]": "must contain a JSON object, got a list",
        "{}": "weight_map must give a file name",
        '{"weight_map": {"a": 3}}': "weight_map must give a file name",
        '{"weight_map": {"a": "../model.safetensors"}}': "expected the name of a file in the same folder",
    }.items():
        index.write_text(content)
        with pytest.raises(ValueError, match=rf"index\.json: .*{message}"):
            Encoder.from_pretrained(tmp_path)
    index.unlink()
    for weights in ([1], {3: torch.ones(1)}, {"masked_spec_embed": "x"}):
        torch.save(weights, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: must contain a state dict"):
            Encoder.from_pretrained(tmp_path)
    whole = {name: tensor.long() for name, tensor in Encoder(EncoderConfig.from_dict(TINY)).state_dict().items()}
    torch.save(whole, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has dtype torch\.int64, expected a floating-point dtype"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("null")
    with pytest.raises(ValueError, match=r"config\.json: must contain a JSON object, got a NoneType"):
        Encoder.from_pretrained(tmp_path)
