"""Test encoders with the adapters of fine-tuned models: those of MMS in the layers, and convolutions after them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastssl
from fastssl.eval.extract import extract
from fastssl.models.encoder import AdaptedEncoderConfig, Encoder, EncoderConfig
from fastssl.models.multiplications import count_multiplications
from fastssl.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForPreTraining
from fastssl.packing import Packed
from fastssl.train.checkpoints import initialise
from tests.hub import put_into_cache
from tests.interop.tiny_models import (
    ADAPTER,
    BUCKETS,
    LARGE,
    TINY,
    VARIANTS,
    WITH_ADAPTERS,
    assert_close,
    assert_same_weights,
    transformers_model,
    waveforms_of,
)
from tests.tiny import write_recording

transformers = pytest.importorskip("transformers")

_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MMS = LARGE | {"adapter_attn_dim": 8}
#: Name of a variant -> prefix of Transformers' class names, and changes to TINY.
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    **WITH_ADAPTERS,
    "mms": ("Wav2Vec2", MMS),
    "hubert, mms": ("Hubert", MMS),
    "unispeech, mms": ("UniSpeech", MMS),
    "unispeech-sat, mms": ("UniSpeechSat", MMS),
    "wavlm, adapter": ("WavLM", BUCKETS | ADAPTER | {"adapter_kernel_size": 2, "adapter_stride": 3}),
    "data2vec, adapter": ("Data2VecAudio", VARIANTS["data2vec"][1] | ADAPTER | {"output_hidden_size": 48}),
}
EVERY_ADAPTED = pytest.mark.parametrize("variant", ADAPTED)
LENGTHS = (9_000, 400, 3_210, 720, 1_100)


def adapted_model(variant: str, head: str = "Model", **options: Any) -> Any:
    family, settings = ADAPTED[variant]
    name = next(name for name, (other, _) in VARIANTS.items() if other == family)
    return transformers_model(name, head, **settings | {"do_normalize": False} | options)


@EVERY_ADAPTED
def test_features_and_hidden_states_equal_transformers_on_each_utterance_alone(variant: str) -> None:
    theirs = adapted_model(variant)
    encoder = fastssl.load_encoder(theirs)
    waveforms = waveforms_of(*LENGTHS)
    with torch.no_grad():
        output = encoder(waveforms)
        for row, waveform in enumerate(waveforms.unpack()):
            expected = theirs(waveform.view(1, -1), output_hidden_states=True)
            found = output.features.unpack()[row]
            assert_close(found, expected.last_hidden_state[0], 2e-4, "features")
            assert found.shape == expected.last_hidden_state[0].shape
            # Transformers' last state of a pre-norm model comes before the final norm, and has no counterpart here.
            for layer, state in enumerate(expected.hidden_states[:-1]):
                assert_close(output.hidden_states[layer].unpack()[row], state[0], 2e-4, f"hidden state {layer}")
            assert torch.equal(encoder(Packed.pack([waveform])).features.values, found)
    assert encoder.config.feature_width == output.features.values.shape[1]
    if isinstance(encoder, Encoder) and encoder.adapter is not None:
        kept = encoder.config.feature_period_ms / encoder.config.frame_period_ms
        stride = theirs.config.adapter_stride**theirs.config.num_adapter_layers
        assert kept == stride
    else:
        assert output.features is output.hidden_states[-1]
        assert encoder.config.feature_period_ms == 20


@EVERY_ADAPTED
def test_every_parameter_counts_and_none_is_left_out(variant: str) -> None:
    """A gradient with respect to every parameter, the adapters' included, equals that of Transformers."""
    quiet: dict[str, Any] = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}
    theirs = adapted_model(variant, **quiet).train()
    encoder = fastssl.load_encoder(theirs).train()
    waveforms = waveforms_of(8_000, 3_300)

    def score(frames: Tensor) -> Tensor:
        return (frames * torch.sin(torch.arange(frames.numel())).view_as(frames)).sum()

    torch.stack([score(frames) for frames in encoder(waveforms).features.unpack()]).sum().backward()
    alone = [theirs(waveform.view(1, -1)).last_hidden_state[0] for waveform in waveforms.unpack()]
    torch.stack([score(frames) for frames in alone]).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in encoder.named_parameters():
        if name != "masked_spec_embed":
            scale = expected[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
            assert scale > 0, name
            assert parameter.grad is not None
            assert (parameter.grad - expected[name]).abs().max() <= 1e-3 * scale, name


@EVERY_ADAPTED
def test_round_trip_through_transformers_is_exact(variant: str, tmp_path: Path) -> None:
    theirs = adapted_model(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    encoder = fastssl.load_encoder(tmp_path / "theirs")
    assert type(encoder.config) is AdaptedEncoderConfig
    assert encoder.config == fastssl.load_encoder(theirs).config
    assert_same_weights(dict(encoder.state_dict()), dict(theirs.state_dict()))
    encoder.save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(again) is type(theirs)
    assert_same_weights(dict(again.state_dict()), dict(encoder.state_dict()))
    assert fastssl.load_encoder(tmp_path / "ours").config == encoder.config
    card = (tmp_path / "ours" / "README.md").read_text()
    config = encoder.config
    assert f"each (frames, {config.feature_width}), one every {config.feature_period_ms:g} ms" in card


def test_settings_without_an_effect_in_transformers_have_none_here() -> None:
    for values in (
        {"model_type": "hubert", "add_adapter": True},
        {"model_type": "wavlm", "do_stable_layer_norm": True, "adapter_attn_dim": 8},
        {"model_type": "wav2vec2", "do_stable_layer_norm": False, "adapter_attn_dim": 8},
    ):
        config = EncoderConfig.from_dict(TINY | values)
        assert type(config) is EncoderConfig
        assert "adapter" not in json.dumps(Encoder(config).json_files())
    both = EncoderConfig.from_dict(TINY | {"add_adapter": True, "adapter_attn_dim": 8})
    assert isinstance(both, AdaptedEncoderConfig)
    assert (both.add_adapter, both.adapter_attn_dim) == (True, None)
    with pytest.raises(
        ValueError, match="adapter_attn_dim: must be None for wav2vec2 with do_stable_layer_norm=False, g"
    ):
        AdaptedEncoderConfig(adapter_attn_dim=8)
    with pytest.raises(ValueError, match=r"add_adapter: must be False for hubert .*got True"):
        AdaptedEncoderConfig(model_type="hubert", add_adapter=True)
    with pytest.raises(ValueError, match="compressor: must be 'none' in an encoder with add_adapter, got 'average'"):
        AdaptedEncoderConfig(add_adapter=True, compressor="average", compressor_factor=2)


def test_a_model_with_a_head_and_adapters_opens() -> None:
    theirs = adapted_model("wav2vec2 large, adapters", "ForCTC")
    encoder = fastssl.load_encoder(theirs)
    assert_same_weights(dict(encoder.state_dict()), dict(theirs.wav2vec2.state_dict()))


def test_convolutions_are_skipped_in_training_with_the_probability_of_layers() -> None:
    encoder = fastssl.load_encoder(adapted_model("wav2vec2 base, adapter", layerdrop=0.5)).train()
    assert isinstance(encoder, Encoder)
    assert encoder.adapter is not None
    frames = Packed.pack([torch.randn(100, 48)])
    torch.manual_seed(0)
    lengths = {encoder.adapter(frames).layout.total for _ in range(40)}
    assert lengths == {100, 50, 25}
    assert {encoder.eval().adapter(frames).layout.total for _ in range(10)} == {25}  # type: ignore[misc]


def test_the_multiplications_of_adapters_are_counted() -> None:
    plain = EncoderConfig.from_dict(TINY | LARGE)
    frames = 49
    before = count_multiplications(plain, seconds=1.0)
    inside = count_multiplications(EncoderConfig.from_dict(TINY | MMS), seconds=1.0)
    assert inside.total - before.total == frames * 3 * 2 * 48 * 8
    after = count_multiplications(EncoderConfig.from_dict(TINY | LARGE | ADAPTER), seconds=1.0)
    assert after.total - before.total == frames * 48 * 40 + (25 + 13) * 3 * 40 * 80


def test_cuda_graphs_and_pre_training_are_refused(tmp_path: Path) -> None:
    encoder = fastssl.load_encoder(adapted_model("wav2vec2 base, adapter"))
    with pytest.raises(ValueError, match="use_cuda_graphs: this encoder has an adapter after its layers"):
        encoder.use_cuda_graphs()
    encoder.use_cuda_graphs(False)
    fastssl.load_encoder(adapted_model("mms")).use_cuda_graphs()
    encoder.save_pretrained(tmp_path)
    shape: dict[str, Any] = {name: TINY[name] for name in _SHAPE}
    config = Wav2Vec2Config(**shape | {"conv_dim": tuple(TINY["conv_dim"])})
    with pytest.raises(
        ValueError, match="add_adapter=True is not supported in pre-training; start from the model before"
    ):
        initialise(Wav2Vec2ForPreTraining(config), str(tmp_path))


def test_extract_writes_the_layers_before_the_convolutions(tmp_path: Path) -> None:
    encoder = fastssl.load_encoder(adapted_model("wav2vec2 base, adapter"))
    encoder.save_pretrained(tmp_path / "model")
    write_recording(tmp_path / "audio" / "a.wav", 1.0, seed=1)
    extract(tmp_path / "model", tmp_path / "audio", tmp_path / "out")
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), framework="pt") as shard:
        assert shard.get_tensor("a.wav").shape == (49, 48)
    entry = json.loads((tmp_path / "out" / "index.jsonl").read_text())
    assert (entry["frame_period_s"], entry["frames"]) == (0.02, 49)


@pytest.fixture
def mms(tmp_path: Path) -> Path:
    """Save a model with the adapters of a language, and files with those of two others."""
    theirs = adapted_model("mms", "ForCTC")
    folder = tmp_path / "mms"
    theirs.save_pretrained(folder)
    for seed, language in enumerate(("fra", "azj-script_latin")):
        torch.manual_seed(seed)
        adapters = {name: torch.randn_like(tensor) for name, tensor in theirs._get_adapters().items()}
        if seed:
            torch.save(adapters, folder / f"adapter.{language}.bin")
        else:
            save_file(adapters, folder / f"adapter.{language}.safetensors")
    return folder


@pytest.mark.parametrize("language", ["fra", "azj-script_latin"])
def test_the_adapters_of_a_language_are_those_of_transformers(language: str, mms: Path) -> None:
    theirs = transformers.Wav2Vec2ForCTC.from_pretrained(mms).eval()
    before = fastssl.load_encoder(mms)
    theirs.load_adapter(language)
    encoder = fastssl.load_encoder(mms, language=language)
    assert not encoder.training
    assert_same_weights(dict(encoder.state_dict()), dict(theirs.wav2vec2.state_dict()))
    waveform = waveforms_of(3_000)
    with torch.no_grad():
        expected = theirs.wav2vec2(waveform.values.view(1, -1)).last_hidden_state[0]
        assert_close(encoder(waveform).features.values, expected, 2e-4, language)
        assert not torch.allclose(before(waveform).features.values, expected, atol=0.1)


def test_languages_that_cannot_be_had_are_refused(mms: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"language: .*mms has no adapters for 'deu' .*; it has azj-script_latin, fra"):
        fastssl.load_encoder(mms, language="deu")
    with pytest.raises(ValueError, match=r"language: expected letters, digits, - and _, such as 'fra', got '\.\./fra'"):
        fastssl.load_encoder(mms, language="../fra")
    with pytest.raises(ValueError, match=r"language: expected letters, digits, - and _, such as 'fra', got \['fra'\]"):
        fastssl.load_encoder(mms, language=["fra"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="language: a model in memory has no files of languages"):
        fastssl.load_encoder(fastssl.load_encoder(mms), language="fra")
    weights = load_file(mms / "adapter.fra.safetensors")
    del weights["wav2vec2.encoder.layers.1.adapter_layer.norm.weight"]
    save_file(weights, mms / "adapter.fra.safetensors")
    with pytest.raises(
        ValueError, match=r"adapter\.fra\.safetensors: its weights are not those .*layers\.1\.adapter_l"
    ):
        fastssl.load_encoder(mms, language="fra")
    Encoder(EncoderConfig.from_dict(TINY)).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="language: this model has no adapters for languages"):
        fastssl.load_encoder(tmp_path / "plain", language="fra")


def test_the_adapters_of_a_language_come_from_the_hub(
    mms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_cache(monkeypatch, tmp_path / "cache", "some/mms", mms)
    found = fastssl.load_encoder("some/mms", language="fra", download=False)
    assert_same_weights(dict(found.state_dict()), dict(fastssl.load_encoder(mms, language="fra").state_dict()))
    assert dataclasses.asdict(found.config)["adapter_attn_dim"] == 8
