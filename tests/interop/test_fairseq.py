"""Test that checkpoints in fairseq's and WavLM's formats open without running any code in them."""

import argparse
import enum
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.interop.names import FAIRSEQ, TORCHAUDIO, renamed
from fastssl.models.encoder import Encoder, EncoderConfig
from tests.interop.tiny_models import LARGE, TINY, assert_same_weights, disturb

CONV = "[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32,2,2)] + [(32,2,2)]"
#: fairseq's settings of the tiny model; `OURS` has fastssl's settings of the same model.
SETTINGS: dict[str, Any] = {
    "extractor_mode": "default",
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "activation_fn": "gelu",
    "dropout": 0.01,
    "attention_dropout": 0.02,
    "activation_dropout": 0.03,
    "dropout_input": 0.04,
    "encoder_layerdrop": 0.05,
    "layer_norm_first": False,
    "conv_feature_layers": CONV,
    "conv_bias": False,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "feature_grad_mult": 0.1,
    "required_seq_len_multiple": 2,
}
OURS = TINY | {
    "hidden_dropout": 0.01,
    "attention_dropout": 0.02,
    "activation_dropout": 0.03,
    "feat_proj_dropout": 0.04,
    "layerdrop": 0.05,
    "feature_grad_mult": 0.1,
    "do_normalize": False,
}
SETTINGS_LARGE = SETTINGS | {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
WAVLM = {
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "num_buckets": 20,
    "max_distance": 25,
    "normalize": True,
}


def make_encoder(**options: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.from_dict(OURS | options)).eval()
    disturb(encoder)
    return encoder


def fairseq_name(name: str, encoder: Encoder) -> str:
    """Return fairseq's name for one of our weights, derived from its module classes, not from the package's table."""
    parts = name.split(".")
    if name == "masked_spec_embed":
        return "mask_emb"
    if parts[0] == "feature_extractor":
        inside = {"conv": "0", "layer_norm": "2.1" if encoder.config.feat_extract_norm == "layer" else "2"}[parts[3]]
        return f"feature_extractor.conv_layers.{parts[2]}.{inside}.{parts[4]}"
    if parts[0] == "feature_projection":
        return {"layer_norm": "layer_norm", "projection": "post_extract_proj"}[parts[1]] + "." + parts[2]
    if parts[1] == "pos_conv_embed" and parts[2] == "layers":
        return f"encoder.pos_conv.{parts[3]}.0.{parts[5]}"
    if parts[1] == "pos_conv_embed":
        return "encoder.pos_conv.0." + {"original0": "weight_g", "original1": "weight_v"}.get(parts[-1], parts[-1])
    if parts[1] == "layer_norm":
        return name
    block, rest = parts[3], ".".join(parts[4:])
    if block == "attention":
        for ours, theirs in (
            ("gru_rel_pos_const", "grep_a"),
            ("gru_rel_pos_linear", "grep_linear"),
            ("rel_attn_embed", "relative_attention_bias"),
        ):
            rest = rest.replace(ours, theirs)
        rest = f"self_attn.{rest}"
    elif block == "layer_norm":
        rest = f"self_attn_layer_norm.{rest}"
    elif block == "feed_forward":
        rest = rest.replace("intermediate_dense", "fc1").replace("output_dense", "fc2")
    else:
        rest = f"{block}.{rest}"
    return f"encoder.layers.{parts[2]}.{rest}"


def fairseq_weights(encoder: Encoder, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + fairseq_name(name, encoder): tensor for name, tensor in encoder.state_dict().items()}


@pytest.fixture
def theirs() -> Iterator[Callable[..., Any]]:
    """Make classes of packages that are not installed. Tests remove them again before they read a checkpoint."""
    added = []

    def make(path: str) -> Any:
        module, _, name = path.rpartition(".")
        parts = module.split(".")
        for package in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
            if package not in sys.modules:
                sys.modules[package] = ModuleType(package)
                added.append(package)
        made = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, made)
        return made

    def forget() -> None:
        while added:
            del sys.modules[added.pop()]

    make.forget = forget  # type: ignore[attr-defined]
    yield make
    forget()


def filled(made: Any, **state: Any) -> Any:
    instance = made.__new__(made)
    vars(instance).update(state)
    return instance


def assert_opens(path: Path, encoder: Encoder) -> None:
    again = fastssl.load_encoder(path)
    assert not again.training
    assert again.config == encoder.config
    assert_same_weights(dict(again.state_dict()), dict(encoder.state_dict()))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("size", ["base", "large"])
def test_wav2vec2_with_arguments(size: str, zipped: bool, theirs: Any, tmp_path: Path) -> None:
    """The oldest format: an argparse namespace, and not a zip file before PyTorch 1.6."""
    large = size == "large"
    encoder = make_encoder(**LARGE if large else {}, do_normalize=large)
    args = argparse.Namespace(arch="wav2vec2", normalize=large, **SETTINGS_LARGE if large else SETTINGS)
    meter = filled(theirs("fairseq.meters.AverageMeter"), val=1.0, sum=torch.ones(1))
    heads = {
        "quantizer.vars": torch.ones(1, 4, 2),
        "project_q.weight": torch.ones(2, 2),
        "final_proj.bias": torch.ones(1),
    }
    checkpoint = {
        "args": args,
        "model": fairseq_weights(encoder) | heads,
        "extra_state": {"train_meters": {"loss": meter}, "best": 1.0},
        "last_optimizer_state": None,
    }
    torch.save(checkpoint, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    theirs.forget()
    assert_opens(tmp_path / "model.pt", encoder)


def test_hubert_with_hydras_config(theirs: Any, tmp_path: Path) -> None:
    encoder = make_encoder(model_type="hubert", do_normalize=True, **LARGE)
    dictionary = filled(theirs("fairseq.data.dictionary.Dictionary"), symbols=["<s>"], indices={"<s>": 0})
    checkpoint = {
        "args": None,
        "cfg": {
            "_name": None,
            "task": {"_name": "hubert_pretraining", "normalize": True},
            "model": {"_name": "hubert", "label_rate": 50, **SETTINGS_LARGE},
        },
        "model": fairseq_weights(encoder) | {"label_embs_concat": torch.ones(5, 2), "final_proj.weight": torch.ones(2)},
        "task_state": {"dictionaries": [dictionary]},
    }
    torch.save(checkpoint, tmp_path / "hubert.pt")
    theirs.forget()
    assert_opens(tmp_path / "hubert.pt", encoder)


@pytest.mark.parametrize("size", ["base", "large"])
def test_wavlm(size: str, tmp_path: Path) -> None:
    sizes = {"base": ({}, SETTINGS), "large": (LARGE, SETTINGS_LARGE)}
    ours, settings = sizes[size]
    encoder = make_encoder(model_type="wavlm", num_buckets=20, max_bucket_distance=25, do_normalize=True, **ours)
    torch.save({"cfg": settings | WAVLM, "model": fairseq_weights(encoder)}, tmp_path / "WavLM.pt")
    assert_opens(tmp_path / "WavLM.pt", encoder)


def test_data2vec(tmp_path: Path) -> None:
    encoder = make_encoder(model_type="data2vec-audio", num_conv_pos_embeddings=3, conv_pos_kernel_size=7)
    settings = SETTINGS | {"_name": "data2vec_audio", "extractor_mode": "layer_norm", "conv_pos": 22}
    cfg = {"model": settings | {"pos_conv_depth": 3}, "task": {"normalize": False}}
    torch.save({"cfg": cfg, "model": fairseq_weights(encoder) | {"_ema": None}}, tmp_path / "data2vec.pt")
    assert_opens(tmp_path / "data2vec.pt", encoder)


def test_a_model_for_another_sampling_rate_is_refused(tmp_path: Path) -> None:
    encoder, path = make_encoder(), tmp_path / "telephone.pt"
    nested = {"model": {"w2v_args": {"model": SETTINGS, "task": {"sample_rate": 8000}}}, "task": {"sample_rate": 16000}}
    namespace = argparse.Namespace(sample_rate=8000, **SETTINGS)
    for cfg in ({"model": SETTINGS, "task": {"sample_rate": 8000}}, namespace, nested):
        torch.save({"cfg": cfg, "model": fairseq_weights(encoder)}, path)
        with pytest.raises(ValueError, match=r"telephone\.pt: sample_rate is 8000, expected 16000: fastssl resamples"):
            fastssl.load_encoder(path)
    torch.save({"cfg": {"model": SETTINGS, "task": {"sample_rate": 16000}}, "model": fairseq_weights(encoder)}, path)
    assert_opens(path, encoder)


def test_fine_tuned_with_arguments(tmp_path: Path) -> None:
    encoder = make_encoder(do_normalize=True)
    args = argparse.Namespace(
        arch="wav2vec_ctc",
        normalize=True,
        dropout=0.5,
        w2v_args=argparse.Namespace(arch="wav2vec2", normalize=False, **SETTINGS),
    )
    weights = fairseq_weights(encoder, "w2v_encoder.w2v_model.") | {"w2v_encoder.proj.weight": torch.ones(3, 48)}
    torch.save({"args": args, "model": weights}, tmp_path / "960h.pt")
    assert_opens(tmp_path / "960h.pt", encoder)


def test_fine_tuned_with_omegaconf(theirs: Any, tmp_path: Path) -> None:
    """A config nested in the config, pickled the way omegaconf does: with types and references to other parts."""
    encoder = make_encoder(model_type="hubert", do_normalize=True)
    container, node = theirs("omegaconf.dictconfig.DictConfig"), theirs("omegaconf.nodes.AnyNode")
    metadata = theirs("omegaconf.base.ContainerMetadata")
    sentinel = theirs("fairseq.models.hubert.hubert.HubertConfig")
    choices = enum.Enum("Choices", {"default": "default"}, module="fairseq.dataclass.constants")  # type: ignore[misc]
    theirs("fairseq.dataclass.constants.Choices")
    sys.modules["fairseq.dataclass.constants"].Choices = choices  # type: ignore[attr-defined]

    def config(values: dict[str, Any], parent: Any = None) -> Any:
        made = filled(
            container, _metadata=filled(metadata, ref_type=dict, object_type=sentinel, any=Any), _parent=parent
        )
        made._content = {
            key: config(value, made)
            if isinstance(value, dict)
            else filled(node, _metadata=None, _parent=made, _val=value)
            for key, value in values.items()
        }
        return made

    settings = SETTINGS | {"extractor_mode": choices("default"), "_name": "hubert", "normalize": "${task.normalize}"}
    pretrained = config({"model": settings, "task": {"normalize": True}})
    cfg = {"model": {"_name": "hubert_ctc", "normalize": "${task.normalize}", "w2v_args": pretrained}, "task": None}
    weights = fairseq_weights(encoder, "w2v_encoder.w2v_model.") | {"w2v_encoder.proj.weight": torch.ones(3, 48)}
    torch.save({"cfg": cfg, "args": None, "model": weights}, tmp_path / "ctc.pt")
    theirs.forget()
    assert_opens(tmp_path / "ctc.pt", encoder)


@pytest.mark.parametrize("large", [False, True])
def test_names_agree_with_torchaudio(large: bool) -> None:
    """torchaudio has its own table from fairseq's names to torchaudio's names."""
    theirs = pytest.importorskip("torchaudio.models.wav2vec2.utils.import_fairseq")
    encoder = make_encoder(**LARGE if large else {})
    for name in encoder.state_dict():
        if name != "masked_spec_embed":  # torchaudio drops the mask vector
            key = fairseq_name(name, encoder)
            (ours,) = renamed({key: torch.ones(1)}, FAIRSEQ)
            (through,) = renamed({theirs._map_key(key): torch.ones(1)}, TORCHAUDIO)
            assert ours == through, key


class Evil:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "extra_state"])
def test_nothing_is_run(place: str, zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    checkpoint = {"args": argparse.Namespace(**SETTINGS), "model": fairseq_weights(make_encoder())}
    for call, name in (
        (Evil(os.system, f"touch {mark}"), f"{os.name}.system"),
        # Pickle may write `subprocess` under its Python 2 name, `commands`.
        (Evil(subprocess.check_call, ["touch", str(mark)]), r"(subprocess|commands)\.check_call"),
        (Evil(eval, f"open({str(mark)!r}, 'w')"), "eval"),
    ):
        torch.save(checkpoint | {place: call}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"evil\.pt: cannot be read as a fairseq checkpoint: it names {name},"):
            fastssl.load_encoder(tmp_path / "evil.pt")
        assert not mark.exists()


def test_not_even_what_is_expected_there_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check a function of an installed fairseq, and `getattr`, which Python uses to pickle enumerations."""
    ran = []
    module = ModuleType("fairseq.tasks")

    def run(*args: Any) -> None:
        ran.append(args)

    run.__module__, run.__qualname__ = "fairseq.tasks", "run"
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fairseq", ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.tasks", module)
    encoder = make_encoder()
    args = argparse.Namespace(**SETTINGS)
    extra = {"task": Evil(run, 1), "enum": Evil(getattr, Evil(run, 2), "x")}
    torch.save({"args": args, "model": fairseq_weights(encoder), "extra_state": extra}, tmp_path / "model.pt")
    ran.clear()
    allowed = set(torch.serialization.get_safe_globals())
    assert_opens(tmp_path / "model.pt", encoder)
    assert not ran
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_fn": "relu"}, "activation_fn='relu' is not supported, only 'gelu'"),
        ({"layer_type": "conformer"}, "layer_type='conformer' is not supported"),
        ({"quantize_input": True}, "quantize_input=True is not supported"),
        ({"crop_seq_to_multiple": 4}, "crop_seq_to_multiple=4 is not supported"),
        ({"extractor_mode": "raw"}, "extractor_mode='raw' is not supported, only default and layer_norm"),
        ({"relative_position_embedding": True}, "only with relative_position_embedding and gru_rel_pos"),
        ({"pos_conv_depth": 2}, "feat_extract_norm: must be 'layer' for data2vec-audio"),
        ({"conv_feature_layers": "__import__('os').system('true')"}, "is not a sum of lists"),
        ({"conv_feature_layers": "[(512, 10)]"}, "is not a list of"),
        ({"conv_feature_layers": "[(512, 10, 5)] * 10**9"}, "is not a sum of lists"),
        ({"conv_feature_layers": "[(512, 10, 5)] * 99 * 99"}, "is not a sum of lists"),
        ({"conv_feature_layers": "[(512,"}, "is not a sum of lists"),
        ({"encoder_embed_dim": 0}, "hidden_size: must be at least 1, got 0"),
        ({"encoder_embed_dim": 64}, r"has shape \(48,\), expected \(64,\)"),
        ({"encoder_layers": 2}, r"unknown to the encoder: encoder\.layers\.2"),
        ({"encoder_layers": 4}, r"weights are missing: encoder\.layers\.3"),
        ({"encoder_embed_dim": "many"}, "encoder_embed_dim='many' is not of type int"),
        ({"conv_bias": 1}, "conv_bias=1 is not of type bool"),
    ],
)
def test_what_is_not_served_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"args": argparse.Namespace(**SETTINGS | settings), "model": fairseq_weights(make_encoder())}, path)
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}"):
        fastssl.load_encoder(path)


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    args = argparse.Namespace(**SETTINGS)
    for content, message in (
        ({"state_dict": {}}, "expected the entry 'model', and 'cfg' or 'args'"),
        ({"model": {}}, "expected the entry 'model', and 'cfg' or 'args'"),
        ({"args": args, "model": {3: torch.ones(1)}}, "contains no speech encoder; looked for"),
        ([1], "it contains a list, expected a dictionary"),
        ({"args": args, "model": {"encoder.embed.weight": torch.ones(1)}}, "contains no speech encoder; looked for"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"model\.pt: .*{re.escape(message)}"):
            fastssl.load_encoder(path)
    for data in (b"", b"not a pickle", b"PK\x03\x04 no archive"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.pt: cannot be read as a fairseq checkpoint"):
            fastssl.load_encoder(path)
