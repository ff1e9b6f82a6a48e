"""Test modules that the original encoders only read: adapters and hooks on them do nothing, and a warning says so."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl.interop.read_only import read_only
from tests.interop.tiny_models import EVERY_ACCELERATED_VARIANT, assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")


def never_called(model: nn.Module, waveforms: Tensor) -> set[str]:
    """Run an encoder forward and backward; return the modules whose parameters it uses without calling them."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *args, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    model.train()
    out = model(waveforms)
    (out[0] if isinstance(out, tuple) else out.last_hidden_state).sum().backward()
    for handle in handles:
        handle.remove()
    used = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    return used - called


def listed(model: nn.Module, layers: Any) -> set[str]:
    names = {module: name for name, module in model.named_modules()}
    return {names[module] for module in read_only(layers)}


@EVERY_ACCELERATED_VARIANT
def test_the_table_is_what_transformers_does_not_call(variant: str) -> None:
    model = transformers_model(variant, apply_spec_augment=False)
    found = never_called(model, padded_batch([5000])[0])
    assert found == listed(model, model.encoder.layers)
    assert len(found) == (12 if variant.startswith("wavlm") else 0)


def wavlm(**options: Any) -> Any:
    return transformers_model("wavlm base", "ForCTC", apply_spec_augment=False, **options)


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["q_proj", "v_proj", "out_proj", "output_dense"]
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2))


def silent(function: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a training step, and the gradients that were computed."""
    model.train()
    model.zero_grad()
    waveforms, mask = padded_batch([5000, 5000])
    loss = model(waveforms, attention_mask=mask, labels=torch.tensor([[1, 2, 3], [4, 5, -100]])).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_lora_on_modules_that_are_only_read_does_what_it_does_in_the_original() -> None:
    original = with_lora(wavlm())
    model = copy.deepcopy(original)
    with pytest.warns(UserWarning, match=r"encoder\.layers\.0\.attention\.v_proj and 8 more have adapters.*no effect"):
        fastssl.accelerate(model)
    (found, found_grads), (expected, expected_grads) = silent(step, model), step(original)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert found_grads.keys() == expected_grads.keys()
    assert found_grads
    assert not any("attention" in name for name in found_grads)
    for name, grad in found_grads.items():
        assert_close(grad, expected_grads[name], 1e-3, name)


def test_merged_adapters_are_in_the_weights() -> None:
    original = with_lora(wavlm())
    original.merge_adapter()
    model = copy.deepcopy(original)
    with pytest.warns(UserWarning, match="have adapters"):
        fastssl.accelerate(model)
    torch.testing.assert_close(step(model)[0], step(original)[0], rtol=1e-4, atol=0)
    assert not torch.allclose(step(original)[0], step(wavlm())[0], rtol=1e-3)


def test_lora_can_be_called_by_name() -> None:
    """Called adapters are trained, are lost where the original runs, which warnings say, and stay when merged."""
    model = with_lora(wavlm(attn_implementation="eager"))
    with pytest.warns(UserWarning, match=r"v_proj and 8 more.*no effect after `fastssl.restore`.*merge_and_unload"):
        fastssl.accelerate(model, call_projections=True)
    loss, grads = silent(step, model)
    assert sum("attention" in name for name in grads) == 18
    assert all(grad.any() for grad in grads.values())
    waveforms, mask = padded_batch([5000, 5000])
    with pytest.warns(UserWarning, match=r"attention weights \(the original WavLMModel ignores the adapters"):
        model.eval()(waveforms, attention_mask=mask, output_attentions=True)
    again = copy.deepcopy(model)
    torch.testing.assert_close(step(again)[0], loss)
    merged = again.merge_and_unload()
    merged_loss = step(silent(fastssl.restore, merged))[0]
    torch.testing.assert_close(merged_loss, loss, rtol=1e-4, atol=0)
    with pytest.warns(UserWarning, match=r"ignores the adapters.*merge them"):
        fastssl.restore(model)
    assert abs(step(model)[0] - loss) > 1e-3 * loss
    assert not [key for key in vars(model.base_model.model.wavlm) if "fastssl" in key]


def test_accelerating_again_sets_the_option_again() -> None:
    model = with_lora(wavlm())
    losses = []
    for again in (True, False, True):
        with pytest.warns(UserWarning, match="adapters"):
            fastssl.accelerate(model, call_projections=again)
        losses.append(step(model)[0])
    assert losses[0] == losses[2] != losses[1]


def test_what_is_wrapped_after_accelerate_is_seen_once_at_the_next_call() -> None:
    model = with_lora(silent(fastssl.accelerate, wavlm()))
    with pytest.warns(UserWarning, match="have adapters"):
        step(model)
    silent(step, model)
    key = model.base_model.model.wavlm.encoder.layers[1].attention.k_proj
    key.register_forward_hook(lambda *args: pytest.fail("called"))
    with pytest.warns(UserWarning, match=r"layers\.1\.attention\.k_proj have adapters"):
        step(model)
    silent(step, model)


def test_parametrized_weights_are_read_as_they_are_computed() -> None:
    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 3 * weight

    original = wavlm()
    nn.utils.parametrize.register_parametrization(original.wavlm.encoder.layers[0].attention.v_proj, "weight", Scaled())
    model = silent(fastssl.accelerate, copy.deepcopy(original))
    torch.testing.assert_close(silent(step, model)[0], step(original)[0], rtol=1e-4, atol=0)


def test_other_encoders_call_their_projections_with_or_without_the_option() -> None:
    model = with_lora(transformers_model("wav2vec2 base", "ForCTC", apply_spec_augment=False))
    losses = [step(silent(fastssl.accelerate, model, call_projections=calls))[0] for calls in (False, True)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], step(silent(fastssl.restore, model))[0], rtol=1e-4, atol=0)
