"""Test the accelerated Conformer of Transformers: in evaluation only, with rotary positions or none."""

import copy
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastssl
from fastssl.interop import conformer
from fastssl.nn import SequenceCompressor
from fastssl.packing import Layout
from tests.interop.tiny_models import CONFORMERS, TINY, assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")
EVERY_CONFORMER = pytest.mark.parametrize("variant", CONFORMERS)
BATCH_NORM = "batch norm in training mode uses the statistics of the whole batch"


def pair(variant: str, **options: Any) -> tuple[Any, Any]:
    original = transformers_model(variant, **options)
    return original, fastssl.accelerate(copy.deepcopy(original))


def silent(function: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


def weighted(x: Tensor) -> Tensor:  # (F, D) -> ()
    return (x * torch.sin(torch.arange(x.numel())).view_as(x)).sum()


@EVERY_CONFORMER
def test_gradients_in_evaluation_are_those_of_each_utterance_alone(variant: str) -> None:
    original, model = pair(variant)
    waveforms, mask = padded_batch([5000, 900, 3300])
    together = model(waveforms, attention_mask=mask).last_hidden_state
    for row, samples in enumerate((5000, 900, 3300)):
        alone = original(waveforms[row : row + 1, :samples]).last_hidden_state[0]
        weighted(alone).backward()
        weighted(together[row, : len(alone)]).backward(retain_graph=True)
    for (name, parameter), expected in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), name
        if expected.grad is not None and not name.endswith("linear_k.bias"):  # whose exact gradient is zero
            assert_close(parameter.grad, expected.grad, 1e-3, name)


@torch.no_grad()
def test_long_utterances_have_the_original_s_angles() -> None:
    original, model = pair("conformer base", rotary_embedding_base=500)
    waveforms, mask = padded_batch([400_000, 9000])
    found = model(waveforms, attention_mask=mask).last_hidden_state
    for row, samples in enumerate((400_000, 9000)):
        expected = original(waveforms[row : row + 1, :samples]).last_hidden_state[0]
        assert_close(found[row, : len(expected)], expected, 2e-4)
    positions = original.encoder.embed_positions
    turn = conformer._rotation(positions, Layout.from_lengths([2000]))
    assert turn is not None
    expected_cos, expected_sin = positions(torch.zeros(1, 2000, 48))[:, :, 0, 0]
    assert_close(turn.cos[:, 0], expected_cos[:, :6], 2e-7)
    assert_close(turn.sin[:, 0], expected_sin[:, :6], 2e-7)


@torch.no_grad()
def test_a_model_in_double_precision_is_computed_in_it() -> None:
    original = transformers_model("conformer base").double()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms = padded_batch([9000])[0].double()
    assert_close(model(waveforms).last_hidden_state, original(waveforms).last_hidden_state, 1e-12)


class Operators(TorchDispatchMode):
    """Counts operators of this package by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fastssl"):
            self.counts[str(func).partition(".")[2].removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@EVERY_CONFORMER
def test_the_operators_are_ours(variant: str) -> None:
    model = pair(variant)[1]
    with Operators() as operators:
        silent(model, *padded_batch([5000, 900]))
    layers = TINY["num_hidden_layers"]
    assert operators.counts["strided_conv_fwd"] == (3 if "adapter" in variant else 1)
    assert operators.counts["varlen_attention_fwd"] == layers
    assert operators.counts["dropout_add_layer_norm_fwd"] == 4 * layers
    assert operators.counts["bias_gelu_dropout_fwd"] == (2 * layers if "gelu" in variant else 0)


def test_a_model_in_training_is_refused() -> None:
    model = transformers_model("conformer base", "ForCTC").train()
    kind = type(model.wav2vec2_conformer)
    message = rf"Wav2Vec2ConformerModel is in training mode, but {BATCH_NORM}.*call `model\.eval\(\)` first"
    with pytest.raises(ValueError, match=message):
        fastssl.accelerate(model)
    assert type(model.wav2vec2_conformer) is kind
    assert type(fastssl.accelerate(model.eval()).wav2vec2_conformer) is not kind


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a training step with all its random draws, and the model's new buffers."""
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 (the generator that Transformers draws from)
    waveforms, mask = padded_batch([9000, 5000])
    loss = model(waveforms, attention_mask=mask, labels=torch.tensor([[1, 2, 3], [4, 5, -100]])).loss
    loss.backward()
    return loss.detach(), dict(model.named_buffers())


def test_a_model_that_is_trained_later_runs_the_original_with_one_warning() -> None:
    options = {"layerdrop": 0.3, "hidden_dropout": 0.1, "attention_dropout": 0.1, "conformer_conv_dropout": 0.1}
    original = transformers_model("conformer base", "ForCTC", **options)
    model = silent(fastssl.accelerate, copy.deepcopy(original))
    waveforms, mask = padded_batch([9000, 5000])
    for one in (model, original):
        one.train()
    with pytest.warns(UserWarning, match=f"{BATCH_NORM}, so the original code runs"):
        found, buffers = step(model)
    expected, expected_buffers = step(original)
    assert torch.equal(found, expected)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected_buffers[name]), name
    assert torch.equal(silent(step, model)[0], silent(step, original)[0])
    with torch.no_grad(), Operators() as operators:
        logits = silent(model.eval(), waveforms, attention_mask=mask).logits
    assert operators.counts["varlen_attention_fwd"] == TINY["num_hidden_layers"]
    assert_close(logits[0], original.eval()(waveforms[:1]).logits[0].detach(), 2e-4)
    with pytest.warns(UserWarning, match=BATCH_NORM):
        step(copy.deepcopy(model).train())


def test_one_batch_norm_in_training_is_seen() -> None:
    original, model = pair("conformer base")
    waveforms, _ = padded_batch([5000, 5000])
    for one in (model, original):
        one.encoder.layers[1].conv_module.batch_norm.train()
    with torch.no_grad(), pytest.warns(UserWarning, match=BATCH_NORM):
        found = model(waveforms).last_hidden_state
    assert torch.equal(found, original(waveforms).last_hidden_state)


def test_training_with_a_compressor_is_an_error() -> None:
    compressor = SequenceCompressor(TINY["hidden_size"], kind="average", factor=2)
    model = fastssl.accelerate(transformers_model("conformer base"), compressor=compressor).train()
    with pytest.raises(ValueError, match=f"{BATCH_NORM}, but the original code cannot apply the compressor"):
        model(torch.randn(1, 5000))


@torch.no_grad()
def test_layers_in_the_place_of_linear_ones_are_called() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["linear_q", "linear_v", "linear_out", "intermediate_dense", "output_dense", "projection"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2)
    torch.manual_seed(1)
    original = peft.get_peft_model(transformers_model("conformer base", "ForCTC"), config).eval()
    model = silent(fastssl.accelerate, copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    assert_close(silent(model, waveforms).logits, original(waveforms).logits, 2e-4)


@torch.no_grad()
@pytest.mark.parametrize("part", ["ffn1.intermediate_act_fn", "conv_module.activation", "conv_module.glu"])
def test_another_activation_is_called(part: str) -> None:
    original, model = pair("conformer base")
    waveforms, _ = padded_batch([5000])
    before = original(waveforms).last_hidden_state
    other = torch.nn.Sequential(torch.nn.GLU(dim=1), torch.nn.Tanh()) if part.endswith("glu") else torch.nn.ReLU()
    for one in (original, model):
        one.encoder.layers[1].set_submodule(part, other)
    expected = original(waveforms).last_hidden_state
    assert_close(silent(model, waveforms).last_hidden_state, expected, 2e-4)
    assert not torch.allclose(expected, before, atol=1e-2)


def test_an_export_is_of_the_original() -> None:
    """Tracing (`torch.jit.trace`) fails its own check with the original, which keeps the angles of its last call."""
    original, model = pair("conformer base")
    with pytest.warns(UserWarning, match="torch.export records the call, so the original code runs"):
        program = torch.export.export(model, padded_batch([5000, 5000]))
    assert not [node for node in program.graph.nodes if "fastssl" in str(node.target)]
    other = padded_batch([5000, 2900])
    with torch.no_grad():
        found, expected = (one(*other)["last_hidden_state"] for one in (program.module(), original))
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"position_embeddings_type": "relative"},
            "position_embeddings_type='relative' .* only 'rotary' and None",
        ),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'gelu', 'silu' and 'swish'"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation='relu' is not supported, only 'gelu'"),
    ],
)
def test_what_is_not_served_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"Wav2Vec2ConformerModel with config\.{message}"):
        fastssl.accelerate(transformers_model("conformer base", **options))
