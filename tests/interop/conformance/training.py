"""Checks of training: gradients, freezing, gradient checkpointing, and gradients of what is returned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from tests.interop.conformance.cases import (
    EQUAL,
    MIXED,
    Case,
    assert_same_gradients,
    call,
    gradients,
    outcome,
    score,
)

FREEZING = ("freeze_feature_encoder", "freeze_base_model")


def a_training_step(case: Case, tmp_path: Path) -> None:
    """The parameters that get a gradient are the original's, and the gradients too; so it is under weighted sums."""
    for options in ({}, {"use_weighted_layer_sum": True}) if case.has_labels and case.head != "ForCTC" else ({},):
        model, original = (one.train() for one in case.pair(**options))
        given = case.inputs(labels=True)
        assert_same_gradients(gradients(model, given), gradients(original, given))
        assert_same_gradients(gradients(model.eval(), given), gradients(original.eval(), given))


def a_training_step_on_a_padded_batch(case: Case, tmp_path: Path) -> None:
    """Every parameter that the original trains is trained; the loss is finite and falls after a step."""
    model, original = (one.train() for one in case.pair())
    given = case.inputs(MIXED, labels=True)
    found = gradients(model, given)
    assert found.keys() == gradients(original, given).keys()
    assert all(one.isfinite().all() for one in found.values())
    before = score(call(model, given)).detach()
    norm = sum(float(one.square().sum()) for one in found.values())
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name in found:
                one.sub_(found[name] * (0.01 * abs(float(before)) / norm))
    assert score(call(model, given)) < before


def training_twice_gives_the_same_bits(case: Case, tmp_path: Path) -> None:
    """With dropout, layer drop and SpecAugment, equal states of the generators give equal gradients."""
    random_parts: dict[str, Any] = {"hidden_dropout": 0.2, "layerdrop": 0.3, "attention_dropout": 0.2}
    random_parts |= {"apply_spec_augment": True, "mask_time_prob": 0.3}
    model, _ = case.pair(**random_parts)
    model.train()
    given = case.inputs(MIXED, labels=True)
    first, second, third = (gradients(model, given, seed=seed) for seed in (0, 0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], one) for name, one in second.items())
    assert first.keys() != third.keys() or any(not torch.equal(first[name], one) for name, one in third.items())


def freezing(case: Case, tmp_path: Path) -> None:
    """`freeze_feature_encoder` and `freeze_base_model` leave the same parameters to train."""
    for name in FREEZING:
        model, original = (one.train() for one in case.pair())
        assert hasattr(model, name) == hasattr(original, name)
        if not hasattr(model, name):
            continue
        found = []
        for one in (model, original):
            getattr(one, name)()
            found.append(gradients(one, case.inputs(labels=True)))
        assert_same_gradients(*found)
        frozen = model.base_model.feature_extractor if name == "freeze_feature_encoder" else model.base_model
        assert all(one.grad is None for one in frozen.parameters())


def gradient_checkpointing(case: Case, tmp_path: Path) -> None:
    """Both kinds give the gradients of a step without, bit for bit, also under sums of hidden states."""
    options: dict[str, Any] = {"use_weighted_layer_sum": True} if case.has_labels and case.head != "ForCTC" else {}
    model, _ = case.pair(**options)
    model.train()
    given = case.inputs(MIXED, labels=True)
    for shown in ({}, {"output_hidden_states": True}):
        expected = gradients(model, given, **shown)
        for is_reentrant in (False, True):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": is_reentrant})
            assert model.is_gradient_checkpointing
            found = gradients(model, given, **shown)
            model.gradient_checkpointing_disable()
            assert not model.is_gradient_checkpointing
            assert found.keys() == expected.keys()
            for name, one in expected.items():
                assert torch.equal(found[name], one), (name, is_reentrant)


def gradient_checkpointing_trains_what_the_original_trains(case: Case, tmp_path: Path) -> None:
    """Also with a frozen front end, and with all of the encoder frozen but one layer, in both kinds."""
    for is_reentrant in (False, True):
        if is_reentrant and case.family == "WavLM":
            continue  # the original's backward pass fails: its position bias is shared between layers
        for frozen in ("nothing", "front end", "all but a layer"):
            found = []
            for one in case.pair():
                one.train()
                if frozen != "nothing" and hasattr(one, "freeze_feature_encoder"):
                    one.freeze_feature_encoder()
                if frozen == "all but a layer":
                    one.requires_grad_(False)
                    one.base_model.encoder.layers[1].requires_grad_(True)
                one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": is_reentrant})
                found.append(outcome(gradients, one, case.inputs(labels=True)))
            if isinstance(found[1], RuntimeError):  # no input of a re-entrant checkpoint needs a gradient
                assert type(found[0]) is type(found[1])
            else:
                assert_same_gradients(*found)


def gradients_of_hidden_states(case: Case, tmp_path: Path) -> None:
    """The outputs depend on the hidden states that are returned: their gradients are the original's."""
    found = []
    for one in case.pair():
        one.train()
        output = call(one, case.inputs(labels=True), output_hidden_states=True)
        for state in output.hidden_states:
            state.retain_grad()
        score(output).backward(retain_graph=True)
        grads = [state.grad for state in output.hidden_states]
        found.append({str(index): grad for index, grad in enumerate(grads) if grad is not None})
        first = output.hidden_states[0]
        (again,) = torch.autograd.grad(score(output), [first], allow_unused=True)
        assert (again is None) == (first.grad is None)
    assert_same_gradients(*found)


def gradients_of_hidden_states_in_a_padded_batch(case: Case, tmp_path: Path) -> None:
    """They are zero in the padding, and those of the utterance alone before it."""
    model, original = case.pair()
    waveforms, mask = (case.inputs(MIXED)[name] for name in ("input_values", "attention_mask"))
    output = model(waveforms, attention_mask=mask, output_hidden_states=True)
    grads = torch.autograd.grad(_sum(output.last_hidden_state, mask), output.hidden_states[:-1])
    for row, length in enumerate(MIXED):
        alone = original(waveforms[row : row + 1, :length], output_hidden_states=True)
        expected = torch.autograd.grad(
            _sum(alone.last_hidden_state, mask[row : row + 1, :length]), alone.hidden_states[:-1]
        )
        frames = expected[0].shape[1]
        for ours, theirs in zip(grads, expected, strict=True):
            assert (ours[row, :frames] - theirs[0]).abs().max() <= 1e-3 * theirs.abs().max()
            assert not ours[row, frames:].any()


def _sum(last: Tensor, mask: Tensor) -> Tensor:  # (B, F, D), (B, T) -> ()
    frames = (mask.sum(1) - 400) // 320 + 1
    valid = torch.arange(last.shape[1]) < frames.unsqueeze(1)
    weights = torch.sin(torch.arange(last.shape[1:].numel())).view(last.shape[1:])
    return (last * weights * valid.unsqueeze(2)).sum()


def gradients_of_attentions(case: Case, tmp_path: Path) -> None:
    """The original code runs for attention weights, and their gradients are the original's."""
    found = []
    for one in case.pair(attn_implementation="eager"):
        one.train()
        output = call(one, case.inputs(labels=True), output_attentions=True, output_hidden_states=True)
        kept = [*output.attentions, *output.hidden_states]
        for state in kept:
            state.retain_grad()
        score(output).backward()
        grads = {str(index): state.grad for index, state in enumerate(kept)}
        found.append({name: grad for name, grad in grads.items() if grad is not None})
    assert_same_gradients(*found)


def adapters_of_peft(case: Case, tmp_path: Path) -> None:
    """`add_adapter` of Transformers and `get_peft_model` train what they train in the original."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["intermediate_dense", "output_dense"]
    lora = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2)
    for wrap in (peft.get_peft_model, _with_adapter):
        found = []
        for one in case.pair():
            torch.manual_seed(4)
            found.append(gradients(wrap(one, lora).train(), case.inputs(labels=True)))
        assert all("lora_" in name for name in found[0])
        assert_same_gradients(*found)


def _with_adapter(model: Any, config: Any) -> Any:
    model.add_adapter(config)
    return model


def an_input_that_needs_a_gradient(case: Case, tmp_path: Path) -> None:
    """Saliency: the gradient of the waveforms is the original's."""
    found = []
    for one in case.pair():
        given = case.inputs(EQUAL, labels=True)
        given["input_values"].requires_grad_()
        score(call(one, given)).backward()
        found.append({"waveforms": given["input_values"].grad})
    assert_same_gradients(*found)


def restored_in_between(case: Case, tmp_path: Path) -> None:
    """Between two steps, a model may change sides; an optimiser keeps its parameters."""
    given = case.inputs(labels=True)
    results = []
    for changes in ((fastssl.accelerate, fastssl.restore), (fastssl.restore, fastssl.restore)):
        model = case.original().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for change in changes:
            change(model)
            optimizer.zero_grad()
            score(call(model, given)).backward()
            optimizer.step()
        results.append({name: one.detach() for name, one in model.named_parameters()})
    for name, one in results[1].items():
        torch.testing.assert_close(results[0][name], one, rtol=1e-3, atol=1e-5)


CHECKS = [
    a_training_step,
    a_training_step_on_a_padded_batch,
    training_twice_gives_the_same_bits,
    freezing,
    gradient_checkpointing,
    gradient_checkpointing_trains_what_the_original_trains,
    gradients_of_hidden_states,
    gradients_of_hidden_states_in_a_padded_batch,
    gradients_of_attentions,
    adapters_of_peft,
    an_input_that_needs_a_gradient,
    restored_in_between,
]
