"""Test `accelerate(model, inference=...)` on every architecture: outputs, refusals, and `restore`."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl.kernels.prepacked_conv.op import multiplies_bytes
from fastssl.kernels.prepacked_conv.weights import FORMATS, Format
from fastssl.nn.prepacked import Prepacked
from tests.interop.test_load_encoder import torchaudio_model
from tests.interop.tiny_models import ACCELERATED, transformers_model

_TOLERANCES = {"fp32": 1e-5, "bf16": 4e-2, "int8": 1e-1}
EVERY_FORMAT = pytest.mark.parametrize("format", [name for name in FORMATS if name != "int8" or multiplies_bytes()])


def padded_batch() -> tuple[Tensor, Tensor]:
    lengths = (6_000, 4_321, 900)
    audio = torch.randn(3, 6_000, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6_000) < torch.tensor(lengths)[:, None]
    return audio * mask, mask.long()


def states(model: Any, **options: Any) -> Tensor:
    audio, mask = padded_batch()
    with torch.no_grad():
        out: Tensor = model(audio, attention_mask=mask, **options).last_hidden_state
    return out


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", ACCELERATED)
@EVERY_FORMAT
def test_outputs_are_those_of_the_parameters(variant: str, format: Format) -> None:
    model = transformers_model(variant)
    expected = states(fastssl.accelerate(copy.deepcopy(model)))
    packed = fastssl.accelerate(model, inference=format)
    assert sum(isinstance(module, Prepacked) for module in packed.modules()) >= 8
    found = states(packed)
    assert relative(found, expected) <= _TOLERANCES[format]
    if not variant.startswith("sew"):  # its strided convolution keeps a parametrisation, which cannot be pickled
        assert states(pickle.loads(pickle.dumps(packed))).equal(found)
    assert states(copy.deepcopy(packed)).equal(found)
    assert fastssl.accelerate(packed, inference=format) is packed


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm base", "data2vec"])
@EVERY_FORMAT
def test_restore_brings_the_layers_back(variant: str, format: Format) -> None:
    model = transformers_model(variant)
    model.feature_extractor.requires_grad_(False)
    before = {name: (x.shape, x.requires_grad) for name, x in model.named_parameters()}
    expected = states(model)
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    fastssl.accelerate(model, inference=format)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    restored = fastssl.restore(model)
    assert restored is model
    assert {name: type(module).__name__ for name, module in model.named_modules()} == modules
    assert {name: (x.shape, x.requires_grad) for name, x in model.named_parameters()} == before
    assert relative(states(model), expected) <= _TOLERANCES[format]
    model.train()(padded_batch()[0]).last_hidden_state.sum().backward()


def test_heads_keep_their_parameters_and_results() -> None:
    model = transformers_model("wav2vec2 base", head="ForCTC")
    audio, mask = padded_batch()
    with torch.no_grad():
        expected = fastssl.accelerate(copy.deepcopy(model))(audio, attention_mask=mask).logits
        packed = fastssl.accelerate(model, inference="fp32")
        assert relative(packed(audio, attention_mask=mask).logits, expected) <= 1e-5
    assert type(packed.lm_head) is nn.Linear
    assert packed(audio, attention_mask=mask).logits.requires_grad  # the head can be trained on frozen features


def test_what_is_impossible_is_refused() -> None:
    model = transformers_model("wav2vec2 base")
    with pytest.raises(ValueError, match="inference: must be one of fp32, bf16, int8"):
        fastssl.accelerate(model, inference="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected a Wav2Vec2Model in torch\.float32 on the CPU, got torch\.bfloat16"):
        fastssl.accelerate(copy.deepcopy(model).bfloat16(), inference="fp32")
    assert not any(isinstance(module, Prepacked) for module in model.modules())
    packed = fastssl.accelerate(model, inference="fp32")
    with pytest.raises(ValueError, match="prepacked as 'fp32' already"):
        fastssl.accelerate(packed, inference="bf16")
    with pytest.raises(ValueError, match="prepacked for inference"):
        states(packed.train())
    with pytest.raises(ValueError, match=r"cannot become torch\.float16"):
        packed.half()


def test_a_model_that_refused_to_be_cast_is_unchanged() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base", head="ForCTC"), inference="fp32")
    with pytest.raises(ValueError, match=r"cannot become torch\.float16"):
        model.half()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_needs_the_original_code_is_refused() -> None:
    model = transformers_model("wav2vec2 base")
    with pytest.raises(ValueError, match="inference: prepacked weights need norm='valid'"):
        fastssl.accelerate(model, norm="padded", inference="fp32")
    hidden, kind = copy.deepcopy(model), type(model)
    hidden.forward = lambda *args, **options: kind.forward(hidden, *args, **options)
    with pytest.raises(ValueError, match="inference: a Wav2Vec2Model has its own `forward`"):
        fastssl.accelerate(hidden, inference="fp32")
    for one in (model, hidden):
        assert not any(isinstance(module, Prepacked) for module in one.modules())
    fastssl.accelerate(model, inference="fp32")
    expected = states(model)
    with pytest.raises(ValueError, match="inference: prepacked weights need norm='valid'"):
        fastssl.accelerate(model, norm="padded")
    for call in (lambda: states(model, output_attentions=True), lambda: fastssl.validate(model)):
        with pytest.raises(ValueError, match="inference: the model's original code"):
            call()
    assert states(model).equal(expected)


@pytest.mark.parametrize("merged", [False, True])
def test_lora_beneath_stays_as_it_is(merged: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "intermediate_dense"], init_lora_weights=False)
    model = peft.get_peft_model(transformers_model("wav2vec2 base", head="ForCTC"), config).eval()
    audio, mask = padded_batch()
    with torch.no_grad():
        expected = fastssl.accelerate(model)(audio, attention_mask=mask).logits
        fastssl.accelerate(model, inference="fp32")
        if merged:
            model = model.merge_and_unload()
        assert relative(model(audio, attention_mask=mask).logits, expected) <= 1e-5


def test_parameters_that_were_tied_need_gradients_again() -> None:
    model = transformers_model("wav2vec2 base")
    layers = model.encoder.layers
    layers[1].attention.k_proj.weight = layers[0].attention.k_proj.weight
    fastssl.restore(fastssl.accelerate(model, inference="fp32"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_prepacked_model_of_torchaudio_can_be_copied() -> None:
    model = torchaudio_model("wav2vec2 base")
    audio = torch.randn(1, 6_000)
    with torch.no_grad():
        expected = fastssl.accelerate(model, inference="fp32")(audio)[0]
        found = fastssl.load_encoder(model, normalize=False)(fastssl.Packed.pack([audio[0]])).features.values
    assert relative(found, expected[0]) <= 1e-5
