"""Test encoders with prepacked weights: features, batch mates, weights that change, copies, folders, refusals."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl.kernels.prepacked_conv.op import multiplies_bytes
from fastssl.kernels.prepacked_conv.weights import FORMATS, Format
from fastssl.models import inference
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.encoder import AdaptedEncoderConfig, Encoder, EncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.prepacked import Prepacked, PrepackedLinear
from fastssl.packing import Packed
from tests.interop.tiny_models import TINY, waveforms_of

#: Largest difference of features from those of the same encoder with parameters, relative to the largest feature.
_TOLERANCES = {"fp32": 1e-5, "bf16": 4e-2, "int8": 1e-1}
_SHAPES: dict[str, dict[str, Any]] = {
    "wav2vec2": {},
    "wav2vec2 large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "hubert": {"model_type": "hubert", "feat_proj_layer_norm": False},
    "wavlm": {"model_type": "wavlm", "num_buckets": 16, "max_bucket_distance": 20},
    "data2vec": {"model_type": "data2vec-audio", "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5},
    "averaged": {"compressor": "average"},
    "fired": {"compressor": "integrate-and-fire"},
    "adapters in layers": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "adapter_attn_dim": 6},
    "adapter after layers": {"add_adapter": True, "output_hidden_size": 20},
}
_CONFORMER = ConformerConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    conv_dim=(16, 20),
    conv_depthwise_kernel_size=5,
)
EVERY_SHAPE = pytest.mark.parametrize("shape", [*_SHAPES, "best-rq"])


def formats() -> list[Format]:
    return [name for name in FORMATS if name != "int8" or multiplies_bytes()]


EVERY_FORMAT = pytest.mark.parametrize("format", formats())


def make_encoder(shape: str = "wav2vec2") -> SpeechEncoder:
    torch.manual_seed(0)
    if shape == "best-rq":
        return ConformerEncoder(_CONFORMER).eval()
    values = TINY | _SHAPES[shape]
    adapted = {"adapter_attn_dim", "add_adapter"} & values.keys()
    encoder = Encoder((AdaptedEncoderConfig if adapted else EncoderConfig).from_dict(values)).eval()
    encoder.normalize = True
    for parameter in encoder.parameters():  # no parameter keeps an initial value, such as 0, that hides errors
        nn.init.normal_(
            parameter, mean=float(parameter.detach().mean()), std=0.1 + float(parameter.detach().std(correction=0))
        )
    return encoder


def features(encoder: SpeechEncoder, *lengths: int) -> Tensor:
    with torch.no_grad():
        out: Tensor = encoder(waveforms_of(*(lengths or (9_000, 4_321, 720)))).features.values
    return out


@EVERY_SHAPE
@EVERY_FORMAT
def test_features_are_those_of_the_parameters(shape: str, format: Format) -> None:
    encoder = make_encoder(shape)
    expected = features(encoder)
    packed = copy.deepcopy(encoder).prepack(format)
    assert packed.inference == format
    assert sum(isinstance(module, Prepacked) for module in packed.modules()) >= 5
    found = features(packed)
    assert found.dtype == expected.dtype == torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) <= _TOLERANCES[format]
    assert format == "fp32" or not found.equal(expected)


@EVERY_SHAPE
@EVERY_FORMAT
def test_an_utterance_has_the_same_bits_alone(shape: str, format: Format) -> None:
    encoder = make_encoder(shape).prepack(format)
    waveforms = waveforms_of(9_000, 400, 3_210, 2_000)
    with torch.no_grad():
        together = encoder(waveforms)
        for row, waveform in enumerate(waveforms.unpack()):
            alone = encoder(Packed.pack([waveform.clone()]))
            for states, state in zip(together.hidden_states, alone.hidden_states, strict=True):
                assert states.unpack()[row].equal(state.values)
            assert together.features.unpack()[row].equal(alone.features.values)


@EVERY_SHAPE
@EVERY_FORMAT
def test_the_state_dict_has_the_usual_names_and_can_be_loaded(shape: str, format: Format) -> None:
    encoder = make_encoder(shape)
    packed = copy.deepcopy(encoder).prepack(format)
    state, before = packed.state_dict(), encoder.state_dict()
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in before.items()}
    expected = features(packed)
    plain = copy.deepcopy(encoder)
    plain.load_state_dict(state)  # what the packed encoder computes with, up to the rounding of frames
    assert float((features(plain) - expected).abs().max() / expected.abs().max()) <= _TOLERANCES[format]
    other = make_encoder(shape)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.02)
    other.prepack(format)
    assert not features(other).equal(expected)
    other.load_state_dict(state)
    again = features(other)
    assert float((again - expected).abs().max() / expected.abs().max()) <= 1e-5 if format == "fp32" else 1e-2


@EVERY_FORMAT
def test_copies_and_pickles_compute_the_same(format: Format) -> None:
    encoder = make_encoder().prepack(format)
    expected = features(encoder)
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
        torch.load(file, weights_only=False),
    ):
        assert features(copied).equal(expected)
        assert copied.inference == format


@EVERY_FORMAT
def test_a_folder_opens_as_the_format_says(tmp_path: Path, format: Format) -> None:
    encoder = make_encoder("wav2vec2 large")
    encoder.normalize = None
    encoder.save_pretrained(tmp_path)
    loaded = fastssl.load_encoder(tmp_path, inference=format, normalize=True)
    assert loaded.inference == format
    assert not loaded.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    expected = features(copy.deepcopy(encoder).prepack(format))
    assert features(loaded).equal(expected) or format == "fp32"
    loaded.save_pretrained(tmp_path / "again")
    first, second = ((path / "README.md").read_text() for path in (tmp_path, tmp_path / "again"))
    line = f"rounded to {format} for inference"
    assert (line in second) == (format != "fp32")
    assert line not in first
    parameters = [line for line in first.splitlines() if "parameters" in line]
    assert parameters
    assert parameters == [line for line in second.splitlines() if "parameters" in line]
    again = fastssl.load_encoder(tmp_path / "again", inference=format, normalize=True)
    found = features(again)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5 if format == "fp32" else 2e-2


@EVERY_FORMAT
def test_weights_that_are_loaded_later_take_effect(format: Format) -> None:
    encoder, other = make_encoder(), make_encoder()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    packed = copy.deepcopy(encoder).prepack(format)
    packed.load_state_dict(other.state_dict())
    expected = features(copy.deepcopy(other).prepack(format))
    assert float((features(packed) - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    packed = make_encoder().prepack("fp32")
    state = packed.state_dict()
    name = "encoder.layers.0.attention.q_proj.weight"
    for changed, message in (
        ({key: x for key, x in state.items() if key != name}, f'Missing key.*"{name}"'),
        (state | {name: state[name][:-1]}, f"size mismatch for {name}"),
        (state | {f"{name}.more": state[name]}, f'Unexpected key.*"{name}.more"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            packed.load_state_dict(changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda encoder: features(encoder.train()), "prepacked for inference"),
        (lambda encoder: encoder.bfloat16(), "cannot become torch.bfloat16"),
        (lambda encoder: encoder.double(), "cannot become torch.float64"),
        (lambda encoder: encoder.to("meta"), "cannot become torch.float32 on meta"),
        (lambda encoder: encoder.prepack("bf16"), "prepacked as 'fp32' already"),
        (lambda encoder: fastssl.load_encoder(encoder, inference="bf16"), "prepacked as 'fp32' already"),
        (lambda encoder: fastssl.load_encoder(encoder, inference="int4"), "inference: must be one of fp32, bf16, int8"),  # type: ignore[arg-type]
    ],
)
def test_what_prepacked_weights_cannot_do_is_refused(call: Callable[[SpeechEncoder], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_encoder().prepack("fp32"))


def test_inputs_with_gradients_are_refused() -> None:
    encoder = make_encoder().prepack("fp32")
    waveforms = waveforms_of(4_000)
    waveforms.values.requires_grad_()
    with pytest.raises(ValueError, match="prepacked for inference, which has no gradients"):
        encoder(waveforms)
    encoder.float().to("cpu")  # nothing changes


def test_a_processor_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    monkeypatch.setattr(inference, "multiplies_bytes", lambda: False)
    with pytest.raises(ValueError, match="int8 needs a processor with the instructions AVX512-VNNI"):
        fastssl.load_encoder(tmp_path, inference="int8")


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path)
    with torch.no_grad():
        encoder.encoder.layers[1].feed_forward.output_dense.weight[3, 4] = float("nan")  # type: ignore[index, union-attr]
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.output_dense\.weight has NaN"):
        fastssl.load_encoder(tmp_path, inference="fp32")


def test_an_encoder_that_refused_to_be_cast_is_unchanged() -> None:
    encoder = make_encoder().prepack("fp32")
    expected = features(encoder)
    for move in (encoder.half, encoder.double, lambda: encoder.to("meta")):
        with pytest.raises(ValueError, match="cannot become"):
            move()
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert features(encoder).equal(expected)


@EVERY_FORMAT
def test_a_state_dict_of_another_dtype_is_converted(format: Format) -> None:
    encoder = make_encoder().prepack(format)
    expected = features(encoder)
    encoder.load_state_dict({name: x.double() for name, x in encoder.state_dict().items()})
    assert features(encoder).equal(expected)


@pytest.mark.skipif("int8" not in formats(), reason="needs AVX512-VNNI")
def test_int8_names_the_layer_with_nan_and_changes_nothing() -> None:
    name = "encoder.layers.1.feed_forward.output_dense.weight"
    encoder = make_encoder()
    encoder.state_dict()[name][3, 4] = float("nan")
    with pytest.raises(ValueError, match=f"inference: Encoder: {name} has NaN"):
        encoder.prepack("int8")
    assert encoder.inference is None
    assert not any(isinstance(module, Prepacked) for module in encoder.modules())
    packed = make_encoder().prepack("int8")
    with pytest.raises(RuntimeError, match=f"{name}: contains NaN"):
        packed.load_state_dict(encoder.state_dict())


def test_weights_can_be_shared_with_other_processes() -> None:
    encoder = make_encoder().prepack("fp32").share_memory()
    packed = [module.packed for module in encoder.modules() if isinstance(module, Prepacked)]
    assert all(one.panels.is_shared() and one.bias.is_shared() for one in packed)


def test_hooks_on_linear_layers_run() -> None:
    encoder = make_encoder().prepack("bf16")
    expected = features(encoder)
    layers = {name: module for name, module in encoder.named_modules() if isinstance(module, PrepackedLinear)}
    called = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    found = features(encoder)
    assert set(called) == layers.keys()
    assert float((found - expected).abs().max() / expected.abs().max()) <= _TOLERANCES["bf16"]


def test_the_model_card_counts_prepacked_parameters(tmp_path: Path) -> None:
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "before")
    encoder.prepack("bf16").save_pretrained(tmp_path / "after")
    before, after = (
        next(line for line in (tmp_path / name / "README.md").read_text().splitlines() if "parameters" in line)
        for name in ("before", "after")
    )
    assert before == after


@EVERY_FORMAT
def test_the_exported_encoder_has_the_same_features(format: Format) -> None:
    encoder, waveforms = make_encoder().prepack(format), waveforms_of(4_000)

    class OfSamples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, samples: Tensor) -> Tensor:
            return encoder(Packed(samples, waveforms.layout)).features.values  # type: ignore[no-any-return]

    with torch.no_grad():
        exported = torch.export.export(OfSamples(), (waveforms.values,)).module()
        found, expected = exported(waveforms.values), encoder(waveforms).features.values
    # The first convolution is computed by other code, which rounds otherwise.
    assert float((found - expected).abs().max() / expected.abs().max()) <= _TOLERANCES[format]
