"""Test encoders whose layers tools have wrapped: FSDP2's `fully_shard`, activation checkpointing, `torch.compile`."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from tests.interop.operators import Operators, count, is_packed
from tests.interop.tiny_models import TRAINED_FAMILIES, padded_batch, transformers_model

pytest.importorskip("transformers")
distributed = torch.distributed


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    store = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shard(model: Any, *places: str, **options: Any) -> None:
    """Apply `fully_shard` to the modules at some places; "layers" is each transformer layer, "" is the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for place in places:
        for module in layers_of(model) if place == "layers" else [model.get_submodule(place)]:
            fully_shard(module, mesh=mesh, **options)


def layers_of(model: Any) -> Any:
    return model.encoder.transformer.layers if hasattr(model.encoder, "transformer") else model.encoder.layers


def checkpointed(layer: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer)


def compiled(layer: Any) -> Any:
    return torch.compile(layer, backend="eager")


def wrapped(model: Any, *wrappers: Any) -> Any:
    for index, layer in enumerate(layers_of(model)):
        for wrap in wrappers:
            layer = wrap(layer)
        layers_of(model)[index] = layer
    return model


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Run a training step without a warning of the original code; return output, gradients and number of operators."""
    waveforms, mask = padded_batch([5000, 900])
    with warnings.catch_warnings(), Operators() as operators:
        warnings.filterwarnings("error", message=".*(original code|view tensor)")
        torch.manual_seed(0)
        if hasattr(model, "config"):
            out = model.train()(waveforms, attention_mask=mask).last_hidden_state
        else:
            out = model.train()(waveforms, mask.sum(1))[0]
        calls = operators.calls
        (out * torch.sin(torch.arange(out[0].numel())).view_as(out[0])).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for outer in ("_orig_mod.", "_checkpoint_wrapped_module."):
        grads = {name.replace(outer, ""): grad for name, grad in grads.items()}
    return out.detach(), grads, calls


def plain_model(variant: str = "wav2vec2 base", **options: Any) -> Any:
    return transformers_model(variant, apply_spec_augment=False, **options)


def assert_same_step(model: Any, expected: Any) -> None:
    out, grads, calls = trained(model)
    right_out, right_grads, right_calls = trained(expected)
    assert torch.equal(out, right_out)
    assert calls >= right_calls > 0
    assert grads.keys() == right_grads.keys()
    for name, grad in grads.items():
        whole: Any = grad
        assert torch.equal(whole.full_tensor() if hasattr(whole, "full_tensor") else whole, right_grads[name]), name


@pytest.mark.parametrize("first", ["accelerate", "shard"])
@pytest.mark.parametrize("variant", TRAINED_FAMILIES)
def test_sharded_layers_run_packed(variant: str, first: str) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    model, expected = plain_model(variant), fastssl.accelerate(plain_model(variant))
    if first == "accelerate":
        fastssl.accelerate(model)
    shard(model, "layers", "")
    if first == "shard":
        fastssl.accelerate(model)
    assert_same_step(model, expected)
    assert FSDPModule in type(model).__mro__
    assert all(isinstance(p, DTensor) for layer in model.encoder.layers for p in layer.parameters())
    assert all(isinstance(p.grad, DTensor) for p in model.encoder.layers[0].feed_forward.parameters())
    kind = type(model)
    assert FSDPModule in type(fastssl.restore(model)).__mro__
    assert not is_packed(model)
    fastssl.accelerate(model)
    assert is_packed(model)
    assert (type(model) is kind) == (first == "shard")


@pytest.mark.parametrize("places", [("layers",), ("encoder",), ("feature_extractor", "layers", "encoder", "")])
@pytest.mark.parametrize("variant", ["wav2vec2 large", "wavlm large"])
def test_other_parts_can_be_sharded(variant: str, places: tuple[str, ...]) -> None:
    model = fastssl.accelerate(plain_model(variant))
    expected = copy.deepcopy(model)
    shard(model, *places)
    assert_same_step(model, expected)


def test_shards_can_be_in_lower_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = fastssl.accelerate(plain_model("wavlm large"))
    expected = copy.deepcopy(model).bfloat16()
    shard(model, "layers", "", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    waveforms, mask = padded_batch([5000, 900])
    found = model(waveforms, attention_mask=mask).last_hidden_state
    assert torch.equal(found, expected(waveforms.bfloat16(), attention_mask=mask).last_hidden_state)
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.encoder.layers[0].feed_forward.parameters())


def test_no_layer_is_dropped_where_all_processes_must_gather_it() -> None:
    model = fastssl.accelerate(plain_model(layerdrop=1.0))
    shard(model, "layers", "")
    assert_same_step(model, fastssl.accelerate(plain_model()))


def test_sharded_layers_that_are_checkpointed() -> None:
    model, expected = (fastssl.accelerate(plain_model("wavlm large")) for _ in range(2))
    for one in (model, expected):
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shard(model, "layers", "")
    assert_same_step(model, expected)


@pytest.mark.parametrize("wrappers", [(compiled,), (checkpointed,), (checkpointed, compiled), (compiled, checkpointed)])
@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm base"])
def test_wrapped_layers_run_packed(variant: str, wrappers: tuple[Any, ...]) -> None:
    expected = fastssl.accelerate(plain_model(variant))
    assert_same_step(fastssl.accelerate(wrapped(plain_model(variant), *wrappers)), expected)
    expected.zero_grad()
    assert_same_step(wrapped(fastssl.accelerate(plain_model(variant)), *wrappers), expected)


def test_checkpointed_layers_are_computed_again() -> None:
    model = wrapped(fastssl.accelerate(plain_model()), checkpointed)
    with Operators() as operators:
        out = model.train()(padded_batch([5000])[0]).last_hidden_state
        first = operators.calls
        out.sum().backward()
        checkpointed_calls = operators.calls - first
    plain = fastssl.accelerate(plain_model())
    with Operators() as operators:
        out = plain.train()(padded_batch([5000])[0]).last_hidden_state
        assert operators.calls == first
        out.sum().backward()
    assert operators.calls - first < checkpointed_calls


def test_layers_that_are_checkpointed_and_sharded() -> None:
    model = wrapped(fastssl.accelerate(plain_model("wavlm base")), checkpointed)
    shard(model, "layers", "")
    assert_same_step(model, fastssl.accelerate(plain_model("wavlm base")))


@pytest.mark.parametrize("place", ["encoder", "feature_extractor"])
def test_other_parts_can_be_compiled(place: str) -> None:
    model = fastssl.accelerate(plain_model("wav2vec2 large"))
    expected = copy.deepcopy(model)
    setattr(model, place, compiled(getattr(model, place)))
    assert_same_step(model, expected)


def test_layers_compiled_in_place_run_packed() -> None:
    model = fastssl.accelerate(plain_model())
    for layer in model.encoder.layers:
        layer.compile(backend="eager")
    assert_same_step(model, fastssl.accelerate(plain_model()))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("wrap", [compiled, checkpointed, "shard"])
def test_a_hook_on_a_wrapped_layer_has_the_original_code_run(wrap: Any, inside: bool) -> None:
    model = fastssl.accelerate(plain_model())
    layer = model.encoder.layers[1]
    if wrap == "shard":
        shard(model, "layers", "")
    else:
        wrapped(model, wrap)
    shapes: list[Any] = []
    watched = layer if inside else model.encoder.layers[1]
    watched.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    with pytest.warns(UserWarning, match=r"EncoderLayer has a hook.*, so the original code runs"):
        assert count(model) == 0
    assert shapes == [(2, 15, 48)]


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large"])
@pytest.mark.parametrize("way", ["shard", "shard first", compiled, checkpointed])
def test_torchaudio(variant: str, way: Any) -> None:
    tiny = pytest.importorskip("tests.interop.tiny_torchaudio")
    expected = fastssl.accelerate(tiny.make(variant))
    model = tiny.make(variant)
    if way == "shard first":
        shard(model, "layers", "")
    fastssl.accelerate(model)
    if way == "shard":
        shard(model, "feature_extractor", "layers", "")
    elif callable(way):
        wrapped(model, way)
    assert_same_step(model, expected)
    assert not any("fastssl" in base.__module__ for base in type(fastssl.restore(model)).__mro__)
