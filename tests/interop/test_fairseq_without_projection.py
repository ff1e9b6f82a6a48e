"""Test checkpoints in which the projection or the norm before it is missing: wide front ends, s3prl's DistilHuBERT."""

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastssl
from fastssl.packing import Packed
from tests.interop.test_fairseq import CONV, SETTINGS, assert_opens, fairseq_weights, make_encoder
from tests.interop.tiny_models import assert_close

WIDE = CONV.removesuffix("[(32,2,2)]") + "[(48, 2, 2)]"
DISTILLER: dict[str, Any] = {
    "extractor_mode": "default",
    "extractor_conv_feature_layers": CONV,
    "extractor_dropout": 0.0,
    "feature_grad_mult": 0.1,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "attention_type": "original",
    "dropout": 0.01,
    "attention_dropout": 0.02,
    "activation_dropout": 0.03,
    "encoder_layerdrop": 0.05,
    "final_dim": 48,
    "out_layer_type": "expand-last",
    "n_tasks": 2,
    "task_emb_type": "expand-last",
    "pred_layer_id": [4, 12],
}


def reference(weights: dict[str, Tensor], waveform: Tensor, *, heads: int = 4) -> Tensor:
    """Compute the features of (N,) samples from a checkpoint's weights as fairseq and s3prl do (post-norm, group norm).

    `layer_norm` and `post_extract_proj` apply only if the weights have them.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = waveform.view(1, 1, -1)
    for layer, stride in enumerate((5, 2, 2, 2, 2, 2, 2)):
        stem = f"feature_extractor.conv_layers.{layer}"
        x = F.conv1d(x, weights[f"{stem}.0.weight"], stride=stride)
        if layer == 0:
            x = F.group_norm(x, x.shape[1], weights[f"{stem}.2.weight"], weights[f"{stem}.2.bias"])
        x = F.gelu(x)
    x = x[0].T
    if "layer_norm.weight" in weights:
        x = norm("layer_norm", x)
    if "post_extract_proj.weight" in weights:
        x = linear("post_extract_proj", x)
    stem = "encoder.pos_conv.0"
    direction = weights[f"{stem}.weight_v"]
    kernel = weights[f"{stem}.weight_g"] * direction / direction.norm(dim=(0, 1), keepdim=True)
    positions = F.conv1d(x.T[None], kernel, weights[f"{stem}.bias"], padding=kernel.shape[2] // 2, groups=4)
    x = norm("encoder.layer_norm", x + F.gelu(positions[0, :, : len(x)]).T)
    for layer in range(3):
        stem = f"encoder.layers.{layer}"
        parts = (linear(f"{stem}.self_attn.{kind}_proj", x).unflatten(1, (heads, -1)).transpose(0, 1) for kind in "qkv")
        mixed = F.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)
        x = norm(f"{stem}.self_attn_layer_norm", x + linear(f"{stem}.self_attn.out_proj", mixed))
        x = norm(f"{stem}.final_layer_norm", x + linear(f"{stem}.fc2", F.gelu(linear(f"{stem}.fc1", x))))
    return x


def assert_features(path: Path, weights: dict[str, Tensor]) -> Any:
    encoder = fastssl.load_encoder(path)
    waveforms = [torch.randn(16_000), torch.randn(4_321)]
    with torch.no_grad():
        found = encoder(Packed.pack([waveform[:, None] for waveform in waveforms])).features.unpack()
    for ours, waveform in zip(found, waveforms, strict=True):
        assert_close(ours, reference(weights, waveform), 2e-4, "features")
    return encoder


def test_the_reference_is_right(tmp_path: Path) -> None:
    weights = fairseq_weights(make_encoder())
    torch.save({"args": argparse.Namespace(**SETTINGS), "model": weights}, tmp_path / "model.pt")
    assert_features(tmp_path / "model.pt", weights)


def test_frames_as_wide_as_the_layers_have_no_projection(tmp_path: Path) -> None:
    encoder = make_encoder(conv_dim=(32,) * 6 + (48,))
    weights = fairseq_weights(encoder)
    del weights["post_extract_proj.weight"], weights["post_extract_proj.bias"]
    settings = SETTINGS | {"conv_feature_layers": WIDE}
    torch.save({"args": argparse.Namespace(**settings), "model": weights}, tmp_path / "model.pt")
    found = assert_features(tmp_path / "model.pt", weights)
    assert torch.equal(found.feature_projection.projection.weight, torch.eye(48))
    # It can be saved, opened again and trained: the projection is a parameter like the others.
    found.save_pretrained(tmp_path / "again")
    assert_features(tmp_path / "again", weights)


def test_a_projection_that_should_be_there_is_still_missed(tmp_path: Path) -> None:
    weights = fairseq_weights(make_encoder())
    del weights["post_extract_proj.weight"]
    torch.save({"args": argparse.Namespace(**SETTINGS), "model": weights}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"weights are missing: feature_projection\.projection\.weight"):
        fastssl.load_encoder(tmp_path / "model.pt")


def test_a_small_file_gets_no_large_projection(tmp_path: Path) -> None:
    """The identity of 65,536 channels would have 17 GB, that of 4096 has 67 MB."""
    weights = fairseq_weights(make_encoder())
    del weights["post_extract_proj.weight"], weights["post_extract_proj.bias"]
    settings = SETTINGS | {"conv_feature_layers": WIDE.replace("48", "4096"), "encoder_embed_dim": 4096}
    torch.save({"args": argparse.Namespace(**settings), "model": weights}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="weights are missing"):
        fastssl.load_encoder(tmp_path / "model.pt")


def student(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return an encoder of a DistilHuBERT and its weights in s3prl's layout, with heads."""
    encoder = make_encoder(model_type="hubert", feat_proj_layer_norm=False, feat_proj_dropout=0.0, **options)
    weights = {name: tensor for name, tensor in fairseq_weights(encoder).items() if name != "mask_emb"}
    heads = {"output_layer.0.weight": torch.ones(96, 48), "output_layer.2.weight": torch.ones(2, 48, 48)}
    return encoder, weights | heads


def test_s3prls_distilhubert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, weights = student()
    assert "layer_norm.weight" not in weights
    config = {"distiller": DISTILLER, "teacher": {"model": "hubert_base"}}
    checkpoint = {"Distiller": weights, "Config": config, "Args": argparse.Namespace(seed=1), "Step": 200_000}
    # An optimiser of s3prl, whose old checkpoints name its module so; it is not there when the file is read.
    with monkeypatch.context() as patch:
        module = ModuleType("optimizers")
        made: Any = type("BertAdam", (), {"__module__": "optimizers"})
        vars(module)["BertAdam"] = made
        patch.setitem(sys.modules, "optimizers", module)
        torch.save(checkpoint | {"Scheduler": made()}, tmp_path / "distilhubert.ckpt")
    found = assert_features(tmp_path / "distilhubert.ckpt", weights)
    with torch.no_grad():
        encoder.masked_spec_embed.copy_(found.masked_spec_embed)  # s3prl's student has no mask vector
    assert found.config == encoder.config
    assert not found.config.feat_proj_layer_norm
    torch.save(checkpoint | {"Distiller": weights | {"mask_emb": encoder.masked_spec_embed}}, tmp_path / "again.ckpt")
    assert_opens(tmp_path / "again.ckpt", encoder)
    found.save_pretrained(tmp_path / "folder")
    assert_features(tmp_path / "folder", weights)


def test_a_student_without_projection(tmp_path: Path) -> None:
    _, weights = student(conv_dim=(32,) * 6 + (48,))
    del weights["post_extract_proj.weight"], weights["post_extract_proj.bias"]
    config = {"distiller": DISTILLER | {"extractor_conv_feature_layers": WIDE}}
    torch.save({"Distiller": weights, "Config": config}, tmp_path / "model.ckpt")
    assert_features(tmp_path / "model.ckpt", weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_emb_type": "add"}, "task_emb_type='add' is not supported, because it changes the input of the layers"),
        ({"attention_type": "sparse"}, "attention_type='sparse' is not supported, only 'original'"),
        ({"activation_fn": "relu"}, "activation_fn='relu' is not supported, only 'gelu'"),
    ],
)
def test_other_students_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, weights = student()
    torch.save({"Distiller": weights, "Config": {"distiller": DISTILLER | change}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=rf"model\.ckpt: {re.escape(message)}"):
        fastssl.load_encoder(tmp_path / "model.ckpt")


@pytest.mark.parametrize("config", [{"transformer": {"hidden_size": 768}}, None, 3])
def test_other_models_of_s3prl_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    torch.save({"Transformer": {}, "Config": config, "Global_step": 3}, tmp_path / "tera.ckpt")
    message = (
        r"tera\.ckpt: is a checkpoint of s3prl \(it has 'Config, Global_step, Transformer'\); of these only DistilH"
    )
    with pytest.raises(ValueError, match=message):
        fastssl.load_encoder(tmp_path / "tera.ckpt")
