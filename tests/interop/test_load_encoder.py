"""Test `load_encoder`: opened encoders compute what the original does, and errors name what it cannot open."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastssl
from fastssl.interop.hub import may_be_id
from fastssl.interop.load import torchaudio_config
from fastssl.interop.names import TORCHAUDIO, renamed
from fastssl.models.encoder import Encoder, EncoderConfig
from tests.interop.tiny_models import (
    EVERY_FAMILY,
    TINY,
    TORCHAUDIO_FACTORIES,
    assert_close,
    assert_same_weights,
    disturb,
    transformers_model,
    waveforms_of,
)

HEADS = ["ForCTC", "ForSequenceClassification"]


def assert_opens(source: Any, theirs: Any) -> None:
    encoder = fastssl.load_encoder(source)
    assert not encoder.training
    assert encoder.config == EncoderConfig.from_dict(theirs.config.to_dict())
    assert_same_weights(dict(encoder.state_dict()), dict(theirs.base_model.state_dict()))


def old_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names that Transformers gave to weight norm with PyTorch 1."""
    names = {name: name.replace("parametrizations.weight.original", "weight_") for name in weights}
    return {
        name.replace("weight_0", "weight_g").replace("weight_1", "weight_v"): weights[old]
        for old, name in names.items()
    }


@pytest.mark.parametrize("head", HEADS)
@EVERY_FAMILY
def test_transformers_folders_of_every_kind(variant: str, head: str, tmp_path: Path) -> None:
    theirs = transformers_model(variant, head, vocab_size=11, classifier_proj_size=20)
    theirs.save_pretrained(tmp_path / "whole")
    assert_opens(tmp_path / "whole", theirs)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_opens(str(tmp_path / "shards"), theirs)
    (tmp_path / "old").mkdir()
    theirs.config.save_pretrained(tmp_path / "old")
    torch.save(old_names(theirs.state_dict()), tmp_path / "old" / "pytorch_model.bin")
    assert_opens(tmp_path / "old", theirs)


@EVERY_FAMILY
def test_transformers_models_in_memory(variant: str) -> None:
    for theirs in (transformers_model(variant), transformers_model(variant, "ForCTC", vocab_size=11)):
        assert_opens(theirs, theirs)
        accelerated = fastssl.accelerate(copy.deepcopy(theirs))
        assert_opens(accelerated, theirs)
        encoder = fastssl.load_encoder(theirs)
        with torch.no_grad():
            next(iter(encoder.parameters())).add_(1.0)
        assert not torch.equal(next(iter(encoder.parameters())), next(iter(theirs.base_model.parameters())))


def test_dtype_is_the_models() -> None:
    theirs = transformers_model("hubert base").to(torch.bfloat16)
    assert {parameter.dtype for parameter in fastssl.load_encoder(theirs).parameters()} == {torch.bfloat16}


@pytest.mark.gpu
def test_device_is_the_models() -> None:
    theirs = transformers_model("hubert base").cuda()
    assert {parameter.device for parameter in fastssl.load_encoder(theirs).parameters()} == {theirs.device}


def test_runs_and_encoders(tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig.from_dict(TINY | {"do_normalize": False})).train()
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    for source in (tmp_path / "run", tmp_path / "run" / "encoder"):
        again = fastssl.load_encoder(source)
        assert again.config == encoder.config
        assert_same_weights(dict(again.state_dict()), dict(encoder.state_dict()))
    assert fastssl.load_encoder(encoder) is encoder
    assert not encoder.training


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for name, change, message in (
        (
            "missing",
            lambda w: w.pop("encoder.layers.1.layer_norm.bias"),
            r"weights are missing: encoder\.layers\.1\.la",
        ),
        (
            "extra",
            lambda w: w.update({"encoder.layers.9.x": torch.ones(1)}),
            r"unknown to the encoder: encoder\.layers\.9\.x",
        ),
        (
            "shape",
            lambda w: w.update(masked_spec_embed=torch.ones(3)),
            r"masked_spec_embed has shape \(3,\), exp.*\(48,",
        ),
    ):
        folder = tmp_path / name
        Encoder(EncoderConfig.from_dict(TINY)).save_pretrained(folder)
        _rewrite(folder, change)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            fastssl.load_encoder(folder)


def test_a_head_is_no_left_over_weight_and_the_mask_vector_may_be_missing(tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig.from_dict(TINY))
    encoder.save_pretrained(tmp_path)

    def change(weights: dict[str, Tensor]) -> None:
        del weights["masked_spec_embed"]
        weights["lm_head.weight"] = torch.ones(3, 48)

    _rewrite(tmp_path, change)
    again = dict(fastssl.load_encoder(tmp_path).state_dict())
    assert_same_weights(again, dict(encoder.state_dict()) | {"masked_spec_embed": again["masked_spec_embed"]})


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    Encoder(EncoderConfig.from_dict(TINY)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        fastssl.load_encoder(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"contains no weights \(looked for model\.safetensors, .*pytorch_model\.bin"):
        fastssl.load_encoder(tmp_path)
    index = {"weight_map": {"masked_spec_embed": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002\.safetensors: is missing, but model\.safetensors\.index"
    ):
        fastssl.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not valid JSON"):
        fastssl.load_encoder(tmp_path)


def test_what_is_not_known_is_told_what_is(tmp_path: Path) -> None:
    opened = "expected a run of .*fairseq.*Transformers model.*torchaudio"
    with pytest.raises(ValueError, match=f"Linear cannot be loaded; {opened}"):
        fastssl.load_encoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"int cannot be loaded; {opened}"):
        fastssl.load_encoder(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{tmp_path}/nothing: no such file or folder; {opened}"):
        fastssl.load_encoder(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"contains no model \(looked for .*config\.json and .*encoder"):
        fastssl.load_encoder(tmp_path)
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=5
        )
    )
    with pytest.raises(ValueError, match=r"BertModel \(model_type 'bert'\) cannot be loaded"):
        fastssl.load_encoder(bert)


def test_parts_that_are_not_served_are_named_with_their_place(tmp_path: Path) -> None:
    theirs = transformers_model("wav2vec2 base", hidden_act="relu")
    with pytest.raises(ValueError, match="path_or_model: Wav2Vec2Model: hidden_act='relu' is not supported"):
        fastssl.load_encoder(theirs)
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: hidden_act='relu' is not supported"):
        fastssl.load_encoder(tmp_path)


class Hub:
    """Replacement for huggingface_hub's download that records the calls."""

    def __init__(self, folder: Path | None, error: Exception | None = None) -> None:
        self.folder, self.error = folder, error
        self.asked: list[tuple[str, list[str]]] = []
        self.cached: set[bool] = set()

    def __call__(self, name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        self.asked.append((name, allow_patterns))
        self.cached.add(local_files_only)
        if self.error is not None:
            raise self.error
        return str(self.folder)


def test_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    theirs = transformers_model("hubert base")
    theirs.save_pretrained(tmp_path / "new")
    theirs.config.save_pretrained(tmp_path / "old")
    torch.save(theirs.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    for kind, calls in (("new", 1), ("old", 2)):
        hub = Hub(tmp_path / kind)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        assert_opens("facebook/hubert-base-ls960", theirs)
        assert [name for name, _ in hub.asked] == ["facebook/hubert-base-ls960"] * calls
        assert "compressor.safetensors" in hub.asked[0][1]
        # A pickle is downloaded only if the repository has no safer format.
        assert ["pytorch_model.bin" in patterns for _, patterns in hub.asked] == [False, True][:calls]
        assert hub.cached == {False}
        fastssl.load_encoder("facebook/hubert-base-ls960", download=False)
        assert hub.cached == {False, True}
    # A local folder takes precedence over the Hub.
    (tmp_path / "facebook" / "hubert-base-ls960").mkdir(parents=True)
    with pytest.raises(ValueError, match="contains no model"):
        fastssl.load_encoder("facebook/hubert-base-ls960")


def test_why_the_hub_did_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    monkeypatch.chdir(tmp_path)
    for error in (LocalEntryNotFoundError("no\nconnection"), HFValidationError("no"), OSError("no")):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(None, error))
        kind = type(error).__name__
        with pytest.raises(ValueError, match=f"runs/demo: no such .*loading from the Hub failed: {kind}: no$"):
            fastssl.load_encoder("runs/demo")
        with pytest.raises(ValueError, match=r"runs/demo: no such .*a model that a file names is not downloaded$"):
            fastssl.load_encoder("runs/demo", download=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"runs/demo: no such .*pip install huggingface_hub"):
        fastssl.load_encoder("runs/demo")


def test_what_may_be_a_name_on_the_hub() -> None:
    assert all(may_be_id(name) for name in ("facebook/hubert-base-ls960", "a/b.c_d-1"))
    assert not any(may_be_id(name) for name in ("a", "/a/b", "a/b/c", "./a", "../a", "a/", "~/a", "C:\\a", "a b/c"))


TORCHAUDIO_BASE: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(32, 10, 5), *[(32, 3, 2)] * 4, *[(32, 2, 2)] * 2],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 48,
    "encoder_projection_dropout": 0.11,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 3,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.12,
    "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.13,
    "encoder_dropout": 0.14,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.15,
    "aux_num_out": None,
}
TORCHAUDIO_LARGE = TORCHAUDIO_BASE | {
    "extractor_mode": "layer_norm",
    "extractor_conv_bias": True,
    "encoder_layer_norm_first": True,
    "aux_num_out": 7,
}
TORCHAUDIO_WAVLM = {"encoder_num_buckets": 20, "encoder_max_distance": 25}


def torchaudio_model(kind: str) -> Any:
    models = pytest.importorskip("torchaudio.models")
    settings = TORCHAUDIO_LARGE if "large" in kind else TORCHAUDIO_BASE
    torch.manual_seed(0)
    if "wavlm" in kind:
        model = models.wavlm_model(**settings | TORCHAUDIO_WAVLM)
    else:
        model = models.wav2vec2_model(**settings)
    disturb(model)
    return model.eval()


@pytest.mark.parametrize("kind", ["wav2vec2 base", "wav2vec2 large", "wavlm base", "wavlm large"])
def test_torchaudio_models_have_the_same_features(kind: str) -> None:
    model = torchaudio_model(kind)
    encoder = fastssl.load_encoder(model)
    waveforms = waveforms_of(16_000, 4_321, 400, 30_011)
    with torch.no_grad():
        output = encoder(waveforms)
        for row, waveform in enumerate(waveforms.unpack()):
            expected, _ = model.extract_features(waveform.view(1, -1))
            if "large" in kind:  # torchaudio applies the last norm only in `forward`
                expected[-1] = model.encoder.transformer.layer_norm(expected[-1])
            for layer, (ours, state) in enumerate(zip(output.hidden_states[1:], expected, strict=True)):
                assert_close(ours.unpack()[row], state[0], 2e-4, f"layer {layer}")
    assert isinstance(encoder, fastssl.Encoder)
    config = encoder.config
    assert config.model_type == kind.split()[0]
    dropouts = (config.feat_proj_dropout, config.attention_dropout, config.activation_dropout, config.hidden_dropout)
    assert (*dropouts, config.layerdrop) == (0.11, 0.12, 0.13, 0.14, 0.15)
    assert not config.do_normalize


def test_what_holds_a_torchaudio_model() -> None:
    torchaudio = pytest.importorskip("torchaudio")
    from torchaudio.pipelines._wav2vec2.utils import _extend_model

    model = torchaudio_model("wav2vec2 base")
    expected = dict(fastssl.load_encoder(model).state_dict())
    for normalizes in (True, False):
        encoder = fastssl.load_encoder(_extend_model(model, normalize_waveform=normalizes))
        assert encoder.config.do_normalize is normalizes
        assert encoder.config.model_type == "wav2vec2"
    pretraining = torchaudio.models.HuBERTPretrainModel(model, nn.Identity(), nn.Identity(), None)
    encoder = fastssl.load_encoder(pretraining)
    assert isinstance(encoder, fastssl.Encoder)
    assert encoder.config.model_type == "hubert"
    expected["masked_spec_embed"] = encoder.masked_spec_embed.detach()  # part of torchaudio's mask generator
    assert_same_weights(dict(encoder.state_dict()), expected)


def test_torchaudio_models_with_the_weight_norm_of_old() -> None:
    model = torchaudio_model("wav2vec2 base")
    expected = fastssl.load_encoder(model)
    conv = model.encoder.transformer.pos_conv_embed.conv
    weights = {name: parameter.detach().clone() for name, parameter in conv.parametrizations.weight.named_parameters()}
    nn.utils.parametrize.remove_parametrizations(conv, "weight")
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(conv, dim=2)
    with torch.no_grad():
        conv.weight_g.copy_(weights["original0"])
        conv.weight_v.copy_(weights["original1"])
    assert "encoder.transformer.pos_conv_embed.conv.weight_g" in model.state_dict()
    found = fastssl.load_encoder(model)
    assert isinstance(found, fastssl.Encoder)
    assert isinstance(expected, fastssl.Encoder)
    with torch.no_grad():
        found.masked_spec_embed.copy_(expected.masked_spec_embed)
    assert_same_weights(dict(found.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("name", TORCHAUDIO_FACTORIES)
def test_every_factory_of_torchaudio_has_an_encoder_of_its_shapes(name: str) -> None:
    models = pytest.importorskip("torchaudio.models")
    with torch.device("meta"):
        model = getattr(models, name)()
        encoder = Encoder(torchaudio_config(model))
    found = {key: tensor.shape for key, tensor in renamed(model.state_dict(), TORCHAUDIO).items()}
    expected = {key: tensor.shape for key, tensor in encoder.state_dict().items() if key != "masked_spec_embed"}
    assert found == expected
