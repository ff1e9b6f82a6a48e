"""Test encoders whose norms are other modules, as PEFT's LN tuning makes them, and both kinds of weight norm."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastssl
from tests.interop.operators import Operators, is_packed
from tests.interop.tiny_models import FAMILIES, assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")


class Tuned(nn.Module):
    """A norm in place of another, as PEFT's LN tuning makes it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.tuned = base, copy.deepcopy(base)
        for parameter in self.tuned.parameters():
            nn.init.uniform_(parameter.requires_grad_(), 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tuned(x)
        return out


def with_tuned_norms(model: Any) -> Any:
    norms = [name for name, one in model.named_modules() if isinstance(one, (nn.LayerNorm, nn.GroupNorm))]
    model.requires_grad_(False)
    for name in norms:
        model.set_submodule(name, Tuned(model.get_submodule(name)))
    return model


def run(model: Any, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the last frames, without a warning of the original code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*original code")
        if lengths is None:
            out = model(waveforms)
        elif hasattr(model, "config"):
            out = model(waveforms, attention_mask=(torch.arange(waveforms.shape[1]) < lengths.unsqueeze(1)).long())
        else:
            out = model(waveforms, lengths)
    frames: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
    return frames


def assert_same_as_alone(model: Any, original: Any) -> None:
    """Assert that a packed model computes what the original does with each utterance, and trains the same."""
    lengths = torch.tensor([5000, 900, 300, 3300])
    waveforms, _ = padded_batch(lengths.tolist())
    for one in (model, original):
        one.zero_grad()
    with Operators() as operators:
        found = run(model, waveforms, lengths)
    assert operators.calls
    loss, right = torch.zeros(()), torch.zeros(())
    for row, samples in enumerate(lengths.tolist()):
        if samples >= 400:
            expected = run(original, waveforms[row : row + 1, :samples])[0]
            assert_close(found[row, : len(expected)], expected, 2e-4)
            weights = torch.sin(torch.arange(expected.numel())).view_as(expected)
            loss, right = loss + (found[row, : len(expected)] * weights).sum(), right + (expected * weights).sum()
    loss.backward()
    right.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected_grads = {name: p.grad for name, p in original.named_parameters() if p.grad is not None}
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() <= 2e-3 * expected_grads[name].abs().max() + 1e-4, name


@pytest.mark.parametrize("variant", [name for name in FAMILIES if name != "data2vec"])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_ln_tuning_of_peft(variant: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LNTuningConfig(target_modules=["layer_norm", "final_layer_norm"])
    original = peft.get_peft_model(transformers_model(variant), config)
    for name, parameter in original.named_parameters():
        if "ln_tuning_layers" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model = fastssl.accelerate(copy.deepcopy(original))
    assert_same_as_alone(model, original)
    assert all("ln_tuning_layers" in name for name, p in model.named_parameters() if p.grad is not None)
    waveforms, _ = padded_batch([5000, 5000])
    with torch.no_grad():
        expected = run(model, waveforms)
        merged = model.merge_and_unload()
        assert_close(run(merged, waveforms), expected, 1e-4)
    assert is_packed(merged)


@pytest.mark.parametrize("variant", [*FAMILIES, "wav2vec2 large", "wav2vec2 base, adapter"])
def test_norms_of_somebody_else_are_called(variant: str) -> None:
    original = with_tuned_norms(transformers_model(variant))
    if variant == "wav2vec2 base, adapter":  # it also sees its own padding, so compare the encoder without it
        original.adapter = None
    assert_same_as_alone(fastssl.accelerate(copy.deepcopy(original)), original)


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wav2vec2 large", "wavlm base"])
def test_norms_of_somebody_else_are_called_in_torchaudio(variant: str) -> None:
    tiny = pytest.importorskip("tests.interop.tiny_torchaudio")
    original = with_tuned_norms(tiny.make(variant))
    assert_same_as_alone(fastssl.accelerate(copy.deepcopy(original)), original)


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 32), nn.GroupNorm(32, 32, affine=False)])
def test_a_group_norm_that_the_op_does_not_compute_is_called(norm: nn.Module) -> None:
    original = transformers_model("wav2vec2 base")
    original.feature_extractor.conv_layers[0].layer_norm = norm
    assert_same_as_alone(fastssl.accelerate(copy.deepcopy(original)), original)


def test_a_norm_with_a_hook_runs_it() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    waveforms, _ = padded_batch([5000, 5000])
    with torch.no_grad():
        expected = run(model, waveforms)
        shapes: list[Any] = []
        norm = model.feature_extractor.conv_layers[0].layer_norm
        norm.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
        assert_close(run(model, waveforms), expected, 1e-5)
    assert shapes == [(1, 32, 999)] * 2


def in_the_old_way(model: Any, convolutions: list[Any]) -> Any:
    """Give convolutions weight norm as old checkpoints and older libraries have it, with the same weights."""
    for conv in convolutions:
        if parametrize.is_parametrized(conv):
            parametrize.remove_parametrizations(conv, "weight")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.nn.utils.weight_norm(conv, dim=2)
    return model


def positional(model: Any) -> Any:
    return getattr(model.encoder, "transformer", model.encoder).pos_conv_embed.conv


def made(library: str) -> Any:
    if library == "torchaudio":
        return pytest.importorskip("tests.interop.tiny_torchaudio").make("wav2vec2 large")
    return transformers_model("wav2vec2 large", apply_spec_augment=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", ["accelerate", "norm"])
@pytest.mark.parametrize("library", ["transformers", "torchaudio"])
def test_both_kinds_of_weight_norm_are_fused(library: str, first: str, training: bool) -> None:
    new, old = fastssl.accelerate(made(library)), made(library)
    if first == "norm":
        in_the_old_way(old, [positional(old)])
    fastssl.accelerate(old)
    if first == "accelerate":
        in_the_old_way(old, [positional(old)])
    waveforms, _ = padded_batch([5000, 900])
    lengths = torch.tensor([5000, 900])
    weights = positional(new).parametrizations.weight
    with torch.no_grad():
        positional(old).weight_g.copy_(weights.original0)
        positional(old).weight_v.copy_(weights.original1)
    for _ in range(2):  # after a step, the weight that a module keeps is that of the step before
        outs = []
        for one in (new, old):
            with Operators() as operators:
                outs.append(run(one.train(training), waveforms, lengths))
            assert operators.calls
            one.zero_grad()
            (outs[-1] * torch.sin(torch.arange(outs[-1].numel())).view_as(outs[-1])).sum().backward()
        assert_close(outs[1], outs[0], 1e-5)
        assert_close(positional(old).weight_g.grad, weights.original0.grad, 1e-4)
        assert_close(positional(old).weight_v.grad, weights.original1.grad, 1e-4)
        with torch.no_grad():
            for one in (new, old):
                for parameter in positional(one).parameters():
                    parameter.mul_(1.1).add_(0.01)
    parametrize.remove_parametrizations(positional(new), "weight")
    torch.nn.utils.remove_weight_norm(positional(old))
    with torch.no_grad():
        expected = run(new, waveforms, lengths)
        assert_close(run(old, waveforms, lengths), expected, 1e-5)
    assert is_packed(new)
    assert is_packed(old)


@pytest.mark.parametrize("variant", ["wav2vec2 base, adapter", "sew base", "conformer base"])
def test_any_convolution_may_have_weight_norm(variant: str) -> None:
    model, expected = (fastssl.accelerate(transformers_model(variant)) for _ in range(2))
    of_both = [[part for part in one.modules() if isinstance(part, torch.nn.Conv1d)] for one in (model, expected)]
    in_the_old_way(model, of_both[0])
    with torch.no_grad():
        for conv, plain in zip(*of_both, strict=True):
            conv.get_parameter("weight_g").mul_(1.5)  # not yet in the weight that a module keeps
            if parametrize.is_parametrized(plain):
                parametrize.remove_parametrizations(plain, "weight")
            weight = plain.weight.detach() * 1.5
            del plain.weight
            plain.weight = torch.nn.Parameter(weight)
        waveforms, _ = padded_batch([5000, 900])
        assert_close(run(model, waveforms), run(expected, waveforms), 1e-5)
    assert is_packed(model)


def test_a_hook_besides_weight_norm_has_the_original_code_run() -> None:
    model = fastssl.accelerate(in_the_old_way(made("transformers"), []))
    in_the_old_way(model, [positional(model)])
    called: list[int] = []
    positional(model).register_forward_pre_hook(lambda *args: called.append(1))
    with pytest.warns(UserWarning, match="a Conv1d has a hook"):
        assert not is_packed(model)
    assert called
