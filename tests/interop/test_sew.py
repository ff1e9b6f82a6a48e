"""Test accelerated SEW: how frames are squeezed, alone and in a padded batch, and which operators compute it."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastssl
from fastssl.nn import SequenceCompressor
from fastssl.packing import Packed
from tests.interop.tiny_models import SQUEEZED, TINY, assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")
EVERY_SEW = pytest.mark.parametrize("variant", SQUEEZED)
#: Numbers of samples, and the frames that the convolutions make of them.
FRAMES = {9300: 28, 5000: 15, 4700: 14, 720: 2, 400: 1, 300: 0}


def pair(variant: str, **options: Any) -> tuple[Any, Any]:
    original = transformers_model(variant, **options)
    return original, fastssl.accelerate(copy.deepcopy(original))


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2, 3, 5])
@EVERY_SEW
def test_an_utterance_has_whole_squeezed_frames_and_zeros_after_them(variant: str, factor: int) -> None:
    original, model = pair(variant, squeeze_factor=factor)
    waveforms, mask = padded_batch(list(FRAMES))
    found = model(waveforms, attention_mask=mask, output_hidden_states=True)
    for row, (samples, frames) in enumerate(FRAMES.items()):
        last, whole = found.last_hidden_state[row], frames // factor * factor
        assert not last[whole:frames].any()
        assert bool(last[:whole].any(1).all())
        for state in found.hidden_states:
            assert state.shape[1] == 28 // factor
            assert not state[row, frames // factor :].any()
        if frames >= factor:
            expected = original(waveforms[row : row + 1, :samples], output_hidden_states=True)
            assert_close(last[:frames], expected.last_hidden_state[0], 2e-4)
            assert_close(found.hidden_states[-1][row, : frames // factor], expected.hidden_states[-1][0], 2e-4)
        else:
            with pytest.raises(RuntimeError):  # so there is nothing to equal
                original(waveforms[row : row + 1, :samples])


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2, 3])
@EVERY_SEW
def test_norm_over_padding_is_the_original_in_a_padded_batch(variant: str, factor: int) -> None:
    """The original squeezes an utterance's last frames together with zeros, if a longer one leaves room for them."""
    original, model = pair(variant, squeeze_factor=factor)
    waveforms, mask = padded_batch([9300, 5000, 4700, 720, 400])
    alone = model(waveforms, attention_mask=mask).last_hidden_state
    fastssl.accelerate(model, norm="padded")
    found, expected = (m(waveforms, attention_mask=mask, output_hidden_states=True) for m in (model, original))
    for row, frames in enumerate((28, 15, 14, 2, 1)):
        last = expected.last_hidden_state[row, :frames]
        assert_close(found.last_hidden_state[row, :frames], last, 2e-4)
        squeezed = min(-(-frames // factor), 28 // factor)
        for state, expected_state in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert state.shape == expected_state.shape
            assert_close(state[row, :squeezed], expected_state[row, :squeezed], 2e-4)
            assert not state[row, squeezed:].any()
        if frames % factor and frames < 28:
            assert not torch.allclose(alone[row, :frames], last, atol=1e-2)


def test_gradients_over_padding_are_the_original_s() -> None:
    original = transformers_model("sew, layer norm, odd kernel, without projection", apply_spec_augment=False).train()
    model = fastssl.accelerate(copy.deepcopy(original), norm="padded")
    waveforms, mask = padded_batch([5000, 4700, 3300])
    valid = torch.arange(15) < torch.tensor([15, 14, 9]).unsqueeze(1)
    for m in (model, original):
        frames = m(waveforms, attention_mask=mask).last_hidden_state[valid]
        (frames * torch.sin(torch.arange(frames.numel())).view_as(frames)).sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), original.parameters(), strict=True):
        if expected.grad is not None and not name.endswith("k_proj.bias"):  # whose exact gradient is zero
            assert_close(parameter.grad, expected.grad, 1e-3, name)


class Operators(TorchDispatchMode):
    """Counts operators of this package, and matrix products and convolutions of PyTorch, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fastssl"):
            self.counts[str(func).partition(".")[2].removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def operators(model: Any, waveforms: Tensor, mask: Tensor) -> Counter[str]:
    found = Operators()
    with found:
        model(waveforms, attention_mask=mask).last_hidden_state.sum().backward()
    return found.counts


@pytest.mark.parametrize("training", [False, True])
def test_the_operators_are_those_of_wav2vec2(training: bool) -> None:
    found, expected = (
        operators(fastssl.accelerate(transformers_model(variant).train(training)), *padded_batch([5000, 900]))
        for variant in ("sew base", "wav2vec2 base")
    )
    assert found == expected
    assert found["strided_conv_fwd"] == found["strided_conv_bwd"] == 1
    assert found["varlen_attention_fwd"] == found["varlen_attention_bwd"] == TINY["num_hidden_layers"]
    assert found["dropout_add_layer_norm_fwd"] == 2 * TINY["num_hidden_layers"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["average", "integrate-and-fire"])
def test_a_compressor_shortens_the_squeezed_frames(kind: Any) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"factor": 3} if kind == "average" else {}
    compressor = SequenceCompressor(TINY["hidden_size"], kind=kind, **options).eval()
    original = transformers_model("sew base")
    model = fastssl.accelerate(copy.deepcopy(original), compressor=compressor)
    waveforms, mask = padded_batch([9300, 5000])
    found = model(waveforms, attention_mask=mask, output_hidden_states=True)
    stack = original.encoder
    for row, samples in enumerate((9300, 5000)):
        frames = original.feature_extractor(waveforms[row : row + 1, :samples]).transpose(1, 2)
        frames = original.feature_projection(original.layer_norm(frames)).transpose(1, 2)
        squeezed = (stack.pool(frames) + stack.pos_conv_embed(frames))[0].t()
        compressed = compressor(Packed.pack([squeezed]))
        assert len(compressed.frames.values) < len(squeezed)
        x = stack.layer_norm(compressed.frames.values)[None]
        for layer in stack.layers:
            x = layer(x)
        state = compressed.upsample(x[0])
        assert_close(found.hidden_states[-1][row, : len(squeezed)], state, 2e-4)
        last = stack.upsample(state[None])[0]
        assert_close(found.last_hidden_state[row, : len(last)], last, 2e-4)


def test_adapters_on_every_kind_of_linear_layer() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["q_proj", "v_proj", "out_proj", "output_dense", "feature_projection", "projection"]
    torch.manual_seed(1)
    base = transformers_model("sew base", "ForCTC", apply_spec_augment=False)
    original = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2))
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch([5000, 4900])
    labels, grads = torch.tensor([[1, 2, 3], [4, 5, -100]]), []
    for m in (model.train(), original.train()):
        m(waveforms[:, :4700], attention_mask=mask[:, :4700], labels=labels).loss.backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 2 * (4 * TINY["num_hidden_layers"] + 2)
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], 1e-3, name)


@pytest.mark.parametrize("option", ["hidden_act", "feat_extract_activation"])
def test_other_activations_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"SEWModel with config\.{option}='relu' is not supported, only 'gelu'"):
        fastssl.accelerate(transformers_model("sew base", **{option: "relu"}))
