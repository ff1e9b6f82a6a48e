"""Test `fastssl extract` with an encoder whose architecture is not wav2vec 2.0's."""

from pathlib import Path

import soundfile
import torch
from safetensors import safe_open

from fastssl.eval.extract import extract
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.packing import Packed


def test_features_are_those_of_the_encoder(recordings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ConformerConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, conv_dim=(16, 16)
    )
    encoder = ConformerEncoder(config).eval()
    encoder.save_pretrained(tmp_path / "model")
    assert extract(tmp_path / "model", recordings, tmp_path / "out", layer=1) == []
    paths = sorted(recordings.rglob("*.wav"))
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(shard, framework="pt") as features, torch.inference_mode():
        assert len(features.keys()) == len(paths)
        for path in paths:
            samples, _ = soundfile.read(path, dtype="float32")
            expected = encoder(Packed.pack([torch.from_numpy(samples)[:, None]])).hidden_states[1].values
            assert torch.equal(features.get_tensor(path.relative_to(recordings).as_posix()), expected)
