"""Checks of calls: arguments, outputs and their flags, batches, dtypes, and what a model says of itself."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastssl
from tests.interop.conformance.cases import (
    EQUAL,
    MIXED,
    Case,
    assert_alike,
    assert_equal,
    call,
    outcome,
    parameters_of,
    tensors,
)

FLAGS: list[dict[str, Any]] = [
    {},
    {"output_hidden_states": True},
    {"output_hidden_states": False},
    {"output_attentions": True},
    {"output_attentions": True, "output_hidden_states": True},
]


@torch.no_grad()
def outputs_of_all_flags(case: Case, tmp_path: Path) -> None:
    """Outputs have the original's class, keys, shapes, dtypes and values, as a dict and as a tuple."""
    model, original = case.pair(attn_implementation="eager")
    for labels in (False, True):
        given = case.inputs(labels=labels)
        for flags in FLAGS:
            for return_dict in (None, True, False):
                options = flags if return_dict is None else flags | {"return_dict": return_dict}
                found, expected = (call(one, given, **options) for one in (model, original))
                assert isinstance(found, tuple) == (return_dict is False)
                assert_alike(found, expected, relative=1e-3)


@torch.no_grad()
def a_tuple_has_the_values_of_the_dict(case: Case, tmp_path: Path) -> None:
    model, _ = case.pair()
    given = case.inputs(MIXED, labels=True)
    for options in ({}, {"output_hidden_states": True}):
        named, listed = (call(model, given, return_dict=one, **options) for one in (True, False))
        assert_equal(dict(enumerate(named.to_tuple())), dict(enumerate(listed)))


@torch.no_grad()
def flags_of_the_config(case: Case, tmp_path: Path) -> None:
    model, original = case.pair(attn_implementation="eager")
    for name, value in {"output_hidden_states": True, "output_attentions": True, "return_dict": False}.items():
        for one in (model, original):
            setattr(one.config, name, value)
        found, expected = (outcome(call, one, case.inputs()) for one in (model, original))
        if isinstance(expected, Exception):  # some heads want a dict from the encoder
            assert type(found) is type(expected)
        else:
            assert_alike(found, expected, relative=1e-3)


@torch.no_grad()
def hidden_states_in_order(case: Case, tmp_path: Path) -> None:
    """There is one state per layer and one before, each made from the one before it."""
    model, original = case.pair()
    found, expected = (call(one, case.inputs(), output_hidden_states=True).hidden_states for one in (model, original))
    assert len(found) == len(expected) == model.config.num_hidden_layers + 1
    for ours, theirs in zip(found, expected, strict=True):
        distances = [float((ours - other).abs().max()) for other in expected]
        assert min(distances) == float((ours - theirs).abs().max())


@torch.no_grad()
def a_row_is_as_if_alone(case: Case, tmp_path: Path) -> None:
    """Each row of a batch has the outputs of its utterance alone, bit for bit, whatever the order of the rows."""
    model, _ = case.pair()
    together = tensors(call(model, case.inputs(MIXED), output_hidden_states=True))
    waveforms, mask = (case.inputs(MIXED)[name] for name in ("input_values", "attention_mask"))
    swapped = tensors(model(input_values=waveforms.flip(0), attention_mask=mask.flip(0), output_hidden_states=True))
    for row, length in enumerate(MIXED):
        for options in ({}, {"attention_mask": torch.ones(1, length, dtype=torch.long)}):
            alone = model(input_values=waveforms[row : row + 1, :length], output_hidden_states=True, **options)
            for name, expected in tensors(alone).items():
                if expected.dim() == 0:  # a statistic of the batch
                    continue
                for found in (together[name][row], swapped[name][len(MIXED) - 1 - row]):
                    found = found[: expected.shape[1]] if expected.dim() > 2 else found
                    if expected.dim() == 2 or name in ("logits", "projected_quantized_states"):
                        # Of a head: it adds in another order in another batch. For x-vectors, Transformers counts the
                        # frames of dilated layers as if there were no dilation, so that some are of the padding.
                        relative = 1e-2 if case.head == "ForXVector" else 1e-3
                        assert (found - expected[0]).abs().max() <= relative * expected.abs().max(), name
                    else:
                        assert torch.equal(found, expected[0]), name


@torch.no_grad()
def the_same_call_gives_the_same_bits(case: Case, tmp_path: Path) -> None:
    model, _ = case.pair()
    given = case.inputs(MIXED, labels=True)
    first, second = (call(model, given, output_hidden_states=True) for _ in range(2))
    assert_equal(first, second)
    assert all(not one.isnan().any() for one in tensors(first).values())


def signatures(case: Case, tmp_path: Path) -> None:
    """The model and its encoder take the same arguments, in the same order, and name the main one."""
    model, original = case.pair()
    for ours, theirs in ((model, original), (model.base_model, original.base_model)):
        assert parameters_of(ours.forward) == parameters_of(theirs.forward)
        assert parameters_of(type(ours).forward) == parameters_of(type(theirs).forward)
        assert ours.main_input_name == theirs.main_input_name == "input_values"
        assert ours.base_model_prefix == theirs.base_model_prefix
        assert isinstance(ours, type(theirs))


def arguments_that_the_original_does_not_have(case: Case, tmp_path: Path) -> None:
    """`inputs_embeds`, `head_mask` and embeddings of tokens exist neither here nor there."""
    model, original = case.pair()
    waveforms = case.inputs()["input_values"]
    for one in (model, original):
        assert not {"inputs_embeds", "head_mask", "input_ids"} & set(parameters_of(one.forward))
        with pytest.raises(TypeError):
            one(inputs_embeds=waveforms)
        with pytest.raises((TypeError, ValueError)):
            one(waveforms, attention_mask=None, **{"input_values": waveforms})
    for name in ("get_input_embeddings", "get_output_embeddings"):
        found, expected = (outcome(getattr(one, name)) for one in (model, original))
        assert repr(found) == repr(expected)
    assert not hasattr(model.base_model.encoder.layers[0], "chunk_size_feed_forward")


@torch.no_grad()
def chunked_feed_forward_changes_nothing(case: Case, tmp_path: Path) -> None:
    """A setting of other models in the config, which these originals ignore."""
    model, _ = case.pair()
    before = call(model, case.inputs(MIXED))
    model.config.chunk_size_feed_forward = 1
    assert_equal(call(model, case.inputs(MIXED)), before)


@torch.no_grad()
def arguments_by_position(case: Case, tmp_path: Path) -> None:
    model, original = case.pair()
    given = case.inputs(mask=True)
    waveforms, mask = given["input_values"], given["attention_mask"]
    named = call(model, given)
    for one in (model, original):
        torch.manual_seed(0)
        assert_alike(one(waveforms, mask), named, relative=1e-3)


@torch.no_grad()
def casts(case: Case, tmp_path: Path) -> None:
    """`half`, `bfloat16`, `float` and `to` give the original's dtypes; values are within twice its rounding."""
    exact = case.original().double()
    given = case.inputs(EQUAL)
    waveforms = given["input_values"].half().bfloat16()  # numbers of either dtype
    ways: list[Callable[[Any], Any]] = [
        lambda one: one.half(),
        lambda one: one.bfloat16(),
        lambda one: one.to(torch.bfloat16),
        lambda one: one.half().float(),
        lambda one: one.to("cpu").double(),
    ]
    for cast in ways:
        model, original = (cast(one) for one in case.pair())
        dtype = next(model.parameters()).dtype
        given["input_values"] = waveforms.to(dtype)
        found, expected = (tensors(call(one, given, output_hidden_states=True)) for one in (model, original))
        right = tensors(call(exact, {"input_values": waveforms.double()}, output_hidden_states=True))
        assert list(found) == list(expected)
        for name, theirs in expected.items():
            assert found[name].dtype == theirs.dtype, name
            assert found[name].shape == theirs.shape, name
            if theirs.dim() == 0 or "quantized" in name:  # the nearest code may be another one
                continue
            if case.family == "UniSpeech" and case.head == "ForPreTraining" and name == "logits":
                continue  # frames that are replaced at random
            error, allowed = ((one.double() - right[name]).abs().max() for one in (found[name], theirs))
            norm = float(right[name].abs().max())
            assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps * norm, (name, dtype)


@torch.no_grad()
def another_attention_implementation(case: Case, tmp_path: Path) -> None:
    """`set_attn_implementation` chooses what the original runs; the accelerated encoder has one."""
    model, original = case.pair()
    before = call(model, case.inputs())
    for name in ("eager", "sdpa"):
        for one in (model, original):
            if case.family == "WavLM" and name == "sdpa":
                continue
            one.set_attn_implementation(name)
        assert_equal(call(model, case.inputs()), before)
        assert_alike(call(model, case.inputs()), call(original, case.inputs()), relative=1e-3)


def accelerating_changes_no_weight_and_draws_nothing(case: Case, tmp_path: Path) -> None:
    model = case.original()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = [id(one) for one in [*model.parameters(), *model.buffers(), *model.modules()]]
    needed, config = [one.requires_grad for one in model.parameters()], model.config.to_dict()
    state = torch.get_rng_state()
    for change in (fastssl.accelerate, fastssl.restore, fastssl.accelerate):
        change(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert [id(one) for one in [*model.parameters(), *model.buffers(), *model.modules()]] == ids
        assert [one.requires_grad for one in model.parameters()] == needed
        assert list(model.state_dict()) == list(weights)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert model.config.to_dict() == config
        assert not model.training


def what_a_model_says_of_itself(case: Case, tmp_path: Path) -> None:
    model, original = case.pair()
    assert str(model) == str(original)
    assert model.num_parameters() == original.num_parameters()
    assert (model.device, model.dtype) == (original.device, original.dtype)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]
    assert model.get_memory_footprint() == original.get_memory_footprint()
    for name in ("supports_gradient_checkpointing", "_no_split_modules", "_supports_sdpa", "_tied_weights_keys"):
        assert getattr(model, name, None) == getattr(original, name, None), name
    with torch.device("meta"):
        on_meta = [type(one.base_model)(one.config) for one in (model, original)]
    places = [{name: tensor.device for name, tensor in one.state_dict().items()} for one in on_meta]
    assert places[0] == places[1]


@torch.no_grad()
def other_strides(case: Case, tmp_path: Path) -> None:
    """Waveforms may be any view: transposed, expanded, every other sample, a part of a longer batch."""
    model, original = case.pair()
    longer = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(5))
    views = [longer.t().contiguous().t()[:, :9000], longer[:1, :9000].expand(3, -1), longer[:, ::2], longer[:, 99:8000]]
    for waveforms in views:
        found = call(model, {"input_values": waveforms})
        assert_equal(found, call(model, {"input_values": waveforms.contiguous()}))
        assert_alike(found, call(original, {"input_values": waveforms}), relative=1e-3)


@torch.no_grad()
def settings_of_torch(case: Case, tmp_path: Path) -> None:
    """The default dtype, the default device and deterministic algorithms change nothing, with a loss and without."""
    model, _ = case.pair()
    given = case.inputs(MIXED, labels=True)
    expected = call(model, given)
    torch.set_default_dtype(torch.float64)
    try:
        found = call(model.base_model, {"input_values": given["input_values"]})
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(found, call(model.base_model, {"input_values": given["input_values"]}))
    with torch.device("meta"):
        assert_equal(call(model.base_model, {"input_values": given["input_values"]}), found)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(call(model, given), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def several_threads(case: Case, tmp_path: Path) -> None:
    """Threads that share a model get what each would get alone."""
    model, _ = case.pair()
    given = [case.inputs(lengths)["input_values"] for lengths in ((9000,), (5000, 5000), (7000,), (3000,) * 3)]
    expected = [model.base_model(one, output_hidden_states=True) for one in given]

    def run(waveforms: torch.Tensor) -> Any:
        with torch.no_grad():
            return model.base_model(waveforms, output_hidden_states=True)

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(run, given * 3), expected * 3, strict=True):
            assert_equal(found, right)


CHECKS = [
    other_strides,
    settings_of_torch,
    several_threads,
    outputs_of_all_flags,
    a_tuple_has_the_values_of_the_dict,
    flags_of_the_config,
    hidden_states_in_order,
    a_row_is_as_if_alone,
    the_same_call_gives_the_same_bits,
    signatures,
    arguments_that_the_original_does_not_have,
    chunked_feed_forward_changes_nothing,
    arguments_by_position,
    casts,
    another_attention_implementation,
    accelerating_changes_no_weight_and_draws_nothing,
    what_a_model_says_of_itself,
]
