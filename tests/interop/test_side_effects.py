"""Test what originals do besides computing: marks for gradients, changed attributes and buffers, hooks that run."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl
from tests.interop.tiny_models import EVERY_ACCELERATED_VARIANT, assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")


def pair(variant: str, head: str = "Model", **options: Any) -> tuple[Any, Any]:
    """Return an original and an accelerated model."""
    original = transformers_model(variant, head, apply_spec_augment=False, **options)
    return original, fastssl.accelerate(copy.deepcopy(original))


def needs(model: Any, waveforms: Tensor) -> dict[str, bool]:
    out = model(waveforms, output_hidden_states=True)
    states = {f"state {index}": state.requires_grad for index, state in enumerate(out.hidden_states)}
    extracted = {"features": out.extract_features.requires_grad} if hasattr(out, "extract_features") else {}
    return states | extracted | {"last": out.last_hidden_state.requires_grad}


@pytest.mark.parametrize("norm", ["valid", "padded"])
@pytest.mark.parametrize("frozen", ["all", "front end", "by freeze_feature_encoder", "nothing"])
@EVERY_ACCELERATED_VARIANT
def test_the_same_outputs_need_gradients(variant: str, frozen: str, norm: Any) -> None:
    models = pair(variant)
    waveforms, _ = padded_batch([5000, 5000])
    for model in models:
        if frozen == "all":
            model.requires_grad_(False)
        elif frozen == "front end":
            model.feature_extractor.requires_grad_(False)
        elif frozen != "nothing":
            model.requires_grad_(False)
            model.feature_extractor._freeze_parameters()
    fastssl.accelerate(models[1], norm=norm)
    for training in (False, True):
        original, accelerated = (needs(model.train(training), waveforms) for model in models)
        assert accelerated == original
        assert accelerated["last"] == (frozen in ("front end", "nothing") or (training and frozen == "all"))
    with torch.no_grad():
        assert not any(needs(models[1], waveforms).values())
    assert not waveforms.requires_grad


@pytest.mark.parametrize("norm", ["valid", "padded"])
@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large", "data2vec", "hubert base"])
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
def test_adapters_are_trained_under_re_entrant_checkpointing(variant: str, norm: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = transformers_model(variant, "ForCTC", apply_spec_augment=False)
    lora = peft.LoraConfig(target_modules=["intermediate_dense", "output_dense"], init_lora_weights=False, r=2)
    torch.manual_seed(1)
    original = peft.get_peft_model(base, lora)
    original.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = fastssl.accelerate(copy.deepcopy(original), norm=norm)
    if variant.startswith("wavlm"):  # the original's backward pass never ends here, so compare with our own
        fastssl.accelerate(original, norm=norm).gradient_checkpointing_disable()
    waveforms, _ = padded_batch([5000, 5000])
    grads = []
    for one in (model.train(), original.train()):
        one(waveforms, labels=torch.tensor([[1, 2, 3], [4, 5, -100]])).loss.backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 12
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], 1e-3, name)


def changes(model: Any, waveforms: Tensor) -> dict[str, object]:
    """Return attributes and buffers of each module that a training step changes."""

    def state() -> dict[str, object]:
        found: dict[str, object] = {}
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                if not attribute.startswith("_") or attribute in ("_requires_grad", "_buffers"):
                    found[f"{name}:{attribute}"] = repr(value)
        return found

    before = state()
    model.train()(waveforms).last_hidden_state.sum().backward()
    after = state()
    return {name: after.get(name) for name in before.keys() | after.keys() if after.get(name) != before.get(name)}


@EVERY_ACCELERATED_VARIANT
def test_a_step_changes_the_attributes_that_the_original_changes(variant: str) -> None:
    waveforms, _ = padded_batch([5000, 5000])
    expected, found = (changes(model, waveforms) for model in pair(variant, layerdrop=0.5))
    assert found == expected


@pytest.mark.filterwarnings("ignore:.*so the original code runs")
@EVERY_ACCELERATED_VARIANT
def test_hooks_run_on_every_module_that_the_original_calls(variant: str) -> None:
    original, model = pair(variant)
    waveforms, _ = padded_batch([5000])
    called: list[str] = []

    def watch(one: nn.Module, name: str) -> Any:
        return one.get_submodule(name).register_forward_pre_hook(lambda *args: called.append(name))

    names = [name for name, _ in original.named_modules() if name]
    handles = [watch(original, name) for name in names]
    with torch.no_grad():
        original(waveforms)
        for handle in handles:
            handle.remove()
        expected = set(called)
        assert len(expected) > 40
        missing = set()
        for name in expected:
            called.clear()
            handle = watch(model, name)
            model(waveforms)
            handle.remove()
            if name not in called:
                missing.add(name)
    assert not missing


@pytest.mark.parametrize("other", [nn.ReLU(), nn.GELU(approximate="tanh")])
@pytest.mark.parametrize("place", ["feature_extractor.conv_layers.1", "encoder.pos_conv_embed", "feed forward"])
def test_another_activation_is_computed(place: str, other: nn.Module) -> None:
    original, model = pair("wav2vec2 base")
    name = f"{place}.activation" if "." in place else "encoder.layers.1.feed_forward.intermediate_act_fn"
    waveforms, _ = padded_batch([5000])
    with torch.no_grad():
        before = original(waveforms).last_hidden_state
        for one in (original, model):
            one.set_submodule(name, other)
        expected = original(waveforms).last_hidden_state
        with pytest.warns(UserWarning, match=rf"{type(other).__name__} replaces a module of the original"):
            assert torch.equal(model(waveforms).last_hidden_state, expected)
    assert not torch.equal(expected, before)
