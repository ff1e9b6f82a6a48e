"""Test encoders that have somebody else's `forward` on them: Accelerate's `prepare` and hooks, partials, compilers."""

import copy
import functools
import pickle
import warnings
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.nn import SequenceCompressor
from tests.interop.operators import Operators, is_packed
from tests.interop.tiny_models import ACCELERATED_FAMILIES, padded_batch, transformers_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _own_state_of_accelerate() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first `Accelerator`, and a `Trainer` of another test makes one."""
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed").AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        out = model(padded_batch([5000, 5000])[0])
    state: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
    return state


def prepared(model: Any) -> Any:
    accelerator = pytest.importorskip("accelerate", reason="accelerate is not installed").Accelerator
    return accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def hooked(model: Any) -> Any:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    return hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True, place_submodules=True))


def hooked_twice(model: Any) -> Any:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    return hooks.add_hook_to_module(hooked(model), hooks.ModelHook(), append=True)


def forwarded(forward: Any, *args: Any, **options: Any) -> Any:
    return forward(*args, **options)


def partly_applied(model: Any) -> Any:
    model.forward = functools.partial(forwarded, model.forward)
    return model


def in_a_closure(model: Any) -> Any:
    """Two functions, of which one keeps state in a variable and calls itself."""
    inner, calls = model.forward, 0

    def count(*args: Any, again: bool = True, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return count(*args, again=False, **options) if again else inner(*args, **options)

    model.forward = MethodType(lambda self, *args, **options: count(*args, **options), model)
    return model


def with_autocast(model: Any) -> Any:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def itself(model: Any) -> Any:
    """What `Accelerator.unwrap_model` leaves on a model: its own method."""
    model.forward = MethodType(type(model).forward, model)
    return model


def with_compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


WAYS = [
    prepared,
    hooked,
    hooked_twice,
    partly_applied,
    in_a_closure,
    with_autocast,
    itself,
    with_compiled_forward,
    compiled_in_place,
]
EVERY_WAY = pytest.mark.parametrize("wrap", WAYS)


def silent(function: Any, model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*original code")
        return function(model)


@EVERY_WAY
def test_packed_code_runs_within_what_was_there_before(wrap: Any) -> None:
    original = wrap(transformers_model("wav2vec2 base"))
    before = dict(vars(original))
    wrapped_class = type(original)
    expected = hidden(wrap(fastssl.accelerate(transformers_model("wav2vec2 base"))))
    assert not is_packed(original)
    model = silent(fastssl.accelerate, original)
    assert model is original
    assert is_packed(model)
    assert torch.equal(hidden(model), expected)
    silent(fastssl.accelerate, model)  # again
    assert is_packed(model)
    fastssl.restore(model)
    assert not is_packed(model)
    assert type(model) is wrapped_class
    assert vars(model).keys() == before.keys()
    assert all(value is vars(model)[name] for name, value in before.items())


@EVERY_WAY
def test_what_comes_later_is_kept_and_calls_the_restored_code(wrap: Any) -> None:
    expected = hidden(wrap(transformers_model("wav2vec2 base")))
    model = wrap(fastssl.accelerate(transformers_model("wav2vec2 base")))
    assert is_packed(model)
    assert is_packed(silent(fastssl.accelerate, model))
    fastssl.restore(model)
    assert not is_packed(model)
    assert torch.equal(hidden(model), expected)
    assert is_packed(silent(fastssl.accelerate, model))


@pytest.mark.parametrize("variant", ACCELERATED_FAMILIES)
def test_every_architecture_within_autocast(variant: str) -> None:
    model = fastssl.accelerate(with_autocast(transformers_model(variant)))
    assert is_packed(model)
    assert torch.equal(hidden(model), hidden(with_autocast(fastssl.accelerate(transformers_model(variant)))))


@pytest.mark.parametrize("first", ["accelerate", "prepare"])
def test_an_unwrapped_model_is_as_before(first: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = transformers_model("wav2vec2 base")
    plain = hidden(fastssl.accelerate(copy.deepcopy(model)))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    if first == "accelerate":
        model = accelerator.prepare(fastssl.accelerate(model))
    else:
        model = fastssl.accelerate(accelerator.prepare(model))
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert is_packed(model)
    assert torch.equal(hidden(model), plain)
    assert not is_packed(fastssl.restore(model))


def test_a_removed_hook_leaves_the_model_accelerated() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = fastssl.accelerate(hooked(transformers_model("wav2vec2 base")))
    hooks.remove_hook_from_module(model)
    assert is_packed(model)
    assert not is_packed(fastssl.restore(model))


@pytest.mark.parametrize("wrap", [hooked, hooked_twice, partly_applied, itself, compiled_in_place])
def test_copies_do_not_share_what_was_replaced(wrap: Any) -> None:
    """Of the other ways, the copies of plain models are no copies: their closures call the first model."""
    model = fastssl.accelerate(wrap(transformers_model("wavlm base")))
    again = copy.deepcopy(model)
    assert is_packed(again)
    fastssl.restore(model)
    assert is_packed(again)
    assert not is_packed(fastssl.restore(again))
    assert is_packed(fastssl.accelerate(model))


@pytest.mark.parametrize("first", ["accelerate", "wrap"])
def test_a_pickled_model_with_a_partial_is_accelerated(first: str) -> None:
    model = transformers_model("data2vec")
    for function in (fastssl.accelerate, partly_applied)[:: 1 if first == "accelerate" else -1]:
        function(model)
    again = pickle.loads(pickle.dumps(model))
    assert is_packed(again)
    assert torch.equal(hidden(again), hidden(model))
    assert not is_packed(fastssl.restore(again))


def test_the_original_code_within_a_wrapper_runs_once() -> None:
    """Where fastssl's code hands over to the original, it must not call the wrapper again."""
    model = fastssl.accelerate(with_autocast(transformers_model("wav2vec2 base", attn_implementation="eager")))
    with torch.no_grad(), pytest.warns(UserWarning, match="attention weights"):
        found = model(padded_batch([5000])[0], output_attentions=True)
    assert len(found.attentions) == 3


def test_device_hooks_on_every_module_are_named() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = transformers_model("wav2vec2 base")
    expected = hidden(model)
    hooks.attach_align_device_hook(model, execution_device=torch.device("cpu"))
    fastssl.accelerate(model)
    with pytest.warns(UserWarning, match="has a hook or a replaced `forward`, so the original code runs"):
        assert torch.equal(hidden(model), expected)


def opaque(model: Any) -> Any:
    kept = [model.forward]
    model.forward = lambda *args, **options: kept[0](*args, **options)
    return model


def test_a_forward_that_hides_ours_is_named() -> None:
    model = opaque(transformers_model("wav2vec2 base", "ForCTC").wav2vec2)
    own = model.forward
    with pytest.warns(UserWarning, match=r"has its own `forward` \(opaque.*the original code runs.*before what put it"):
        fastssl.accelerate(model)
    assert not is_packed(model)
    fastssl.restore(model)
    assert model.forward is own
    compressor = SequenceCompressor(48, kind="average", factor=2)
    with pytest.raises(ValueError, match=r"compressor: .*has its own `forward`.*cannot apply the compressor"):
        fastssl.accelerate(model, compressor=compressor)
    assert type(model) is transformers.Wav2Vec2Model
    assert not hasattr(model, "fastssl_compressor")
    del model.forward
    assert is_packed(silent(fastssl.accelerate, model))


def test_a_hidden_wrapper_of_ours_runs_the_restored_code() -> None:
    model = opaque(fastssl.accelerate(transformers_model("wav2vec2 base")))
    assert is_packed(model)
    fastssl.restore(model)
    assert not is_packed(model)
    assert torch.equal(hidden(model), hidden(transformers_model("wav2vec2 base")))


def test_an_unwrapped_model_of_torchaudio_is_packed() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    tiny = pytest.importorskip("tests.interop.tiny_torchaudio")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(fastssl.accelerate(tiny.make("wav2vec2 base").eval()))
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with torch.no_grad(), Operators() as operators:
        model(torch.randn(2, 8000), torch.tensor([8000, 6000]))
    assert operators.calls


@pytest.mark.parametrize("variant", ["wav2vec2 large", "sew base"])
def test_a_hook_on_all_modules_runs_the_original(variant: str) -> None:
    """fastssl does not call all modules, so it would leave out what the hook changes."""
    model = transformers_model(variant).eval()
    accelerated = fastssl.accelerate(copy.deepcopy(model))
    waveforms = torch.randn(1, 4000)

    def twice(module: torch.nn.Module, given: Any, output: Any) -> Any:
        return 2 * output if type(module).__name__.endswith("FeedForward") else None

    handle = torch.nn.modules.module.register_module_forward_hook(twice)
    try:
        with pytest.warns(UserWarning, match="registered for all modules"):
            found = accelerated(waveforms).last_hidden_state
        expected = model(waveforms).last_hidden_state
    finally:
        handle.remove()
    assert torch.equal(found, expected)


def test_pytorch_s_own_hooks_on_all_modules_leave_the_model_packed() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    with FlopCounterMode(display=False):
        assert torch.nn.modules.module._global_forward_pre_hooks
        assert is_packed(model)
