"""Test the linear layer: it equals PyTorch's, its rows are independent of each other, and it can include a GELU."""

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastssl.nn import functional, linear
from fastssl.nn.attention import SelfAttention
from fastssl.nn.linear import PackedLinear, casts_together
from fastssl.nn.transformer import FeedForward


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_equals_torch_and_rows_do_not_see_each_other(rows: int) -> None:
    layer, plain = PackedLinear(24, 16), nn.Linear(24, 16)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(rows, 24)
    torch.testing.assert_close(layer(x), plain(x))
    assert torch.equal(layer(torch.cat([x, torch.randn(64, 24)]))[:rows], layer(x))


@pytest.mark.parametrize("grad", [False, True])
def test_with_gelu(grad: bool) -> None:
    layer, x = PackedLinear(24, 16), torch.randn(40, 24)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer.with_gelu(x), F.gelu(layer(x)))


@pytest.mark.parametrize("hook", ["forward", "pre"])
def test_hooks_see_the_layer_within_the_feed_forward(hook: str) -> None:
    feed_forward = FeedForward(24, 48, activation_dropout=0.0).eval()
    x = torch.randn(40, 24)
    seen: list[torch.Tensor] = []
    if hook == "forward":
        feed_forward.intermediate_dense.register_forward_hook(lambda module, args, out: seen.append(out))
        expected = feed_forward.intermediate_dense(x)
    else:
        feed_forward.intermediate_dense.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        expected = x
    seen.clear()
    with torch.no_grad():
        feed_forward(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_a_layer_in_its_place_is_called() -> None:
    class Double(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    feed_forward = FeedForward(24, 48, activation_dropout=0.0).eval()
    feed_forward.intermediate_dense = Double(24, 48)  # type: ignore[assignment]
    x = torch.randn(40, 24)
    with torch.no_grad():
        expected = feed_forward.output_dense(F.gelu(feed_forward.intermediate_dense(x)))
        torch.testing.assert_close(feed_forward(x), expected)


class Counted(TorchDispatchMode):
    """Counts the calls of some operators."""

    def __init__(self, *names: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.count = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func._schema.name.removeprefix("aten::") in self.names
        return func(*args, **kwargs or {})


def test_parameters_that_are_cast_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; here the CPU pretends."""
    monkeypatch.setattr(linear, "_is_cast", torch.is_autocast_enabled)
    torch.manual_seed(0)
    layers = nn.Sequential(PackedLinear(24, 40), nn.GELU(), PackedLinear(40, 16, bias=False), PackedLinear(16, 8))
    x = torch.randn(30, 24, requires_grad=True)
    parameters = list(layers.parameters())

    def run(*, together: bool) -> tuple[Tensor, list[Tensor], int]:
        context = casts_together(layers) if together else nullcontext()
        with torch.autocast("cpu", torch.bfloat16), context, Counted("_to_copy") as casts:
            out = layers(x)
        return out, list(torch.autograd.grad(out.float().square().sum(), [x, *parameters])), casts.count

    expected, expected_grads, single = run(together=False)
    found, grads, few = run(together=True)
    assert torch.equal(found, expected)
    assert few == 1 < single  # that of x
    for grad, one, other in zip(grads, [x, *parameters], expected_grads, strict=True):
        assert grad.dtype == one.dtype
        assert (grad - other).abs().max() <= 2**-7 * other.abs().max()
    # The gradient of a bias is summed in fp32 and not rounded to bf16.
    assert not torch.equal(grads[-1], grads[-1].bfloat16().float())


def _projected(attention: nn.Module, x: Tensor, *, together: bool) -> tuple[list[Tensor], list[Tensor | None], int]:
    """Return q, k and v, the gradients of x and of the parameters, and the number of matrix products."""
    context = casts_together(attention) if together else nullcontext()
    with torch.autocast("cpu", torch.bfloat16), context, Counted("mm", "addmm") as products:
        projected = functional.queries_keys_values(attention, x)
        loss = sum(((i + 1) * part.float().square().sum() for i, part in enumerate(projected)), torch.tensor(0.0))
        loss.backward()
    grads = [one.grad for one in (x, *attention.parameters())]
    x.grad = None
    attention.zero_grad()
    return projected, grads, products.count


@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("frozen", [False, True])
def test_queries_keys_and_values_are_one_product(monkeypatch: pytest.MonkeyPatch, width: int, frozen: bool) -> None:
    monkeypatch.setattr(linear, "_is_cast", torch.is_autocast_enabled)
    torch.manual_seed(0)
    attention = SelfAttention(width, 4, dropout=0.0)
    attention.k_proj.requires_grad_(not frozen)
    x = torch.randn(30, width, requires_grad=True)
    expected, expected_grads, single = _projected(attention, x, together=False)
    found, grads, few = _projected(attention, x, together=True)
    assert few == 3  # forward, gradient of x, gradient of the weights
    assert single == (8 if frozen else 9)
    for part, other in zip(found, expected, strict=True):
        assert part.is_contiguous()
        assert part.dtype == torch.bfloat16
        torch.testing.assert_close(part, other)
    for grad, one in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (one is None)
        if grad is not None and one is not None:
            assert grad.dtype == torch.float32
            assert (grad - one).abs().max() <= 2**-7 * one.abs().max()


@pytest.mark.parametrize("change", ["hook", "adapter", "shared", "no bias", "other width", "bf16"])
def test_other_projections_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(linear, "_is_cast", torch.is_autocast_enabled)
    torch.manual_seed(0)
    attention = SelfAttention(24, 4, dropout=0.0)
    if change == "hook":
        attention.k_proj.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "adapter":
        attention.k_proj = nn.Sequential(PackedLinear(24, 8), PackedLinear(8, 24))  # type: ignore[assignment]
    elif change == "shared":
        attention.k_proj = attention.q_proj
    elif change == "no bias":
        attention.k_proj = PackedLinear(24, 24, bias=False)
    elif change == "other width":
        attention.v_proj = PackedLinear(24, 48)
    else:
        attention.to(torch.bfloat16)
    x = torch.randn(30, 24, requires_grad=True)
    expected, expected_grads, products = _projected(attention, x, together=False)
    found, grads, same = _projected(attention, x, together=True)
    assert same == products >= 9
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other)
    for grad, one in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (one is None)
        if grad is not None and one is not None:
            assert (grad - one).abs().max() <= 2**-6 * one.abs().max()


def test_without_autocast_and_on_the_cpu_nothing_is_cast_together() -> None:
    layer = PackedLinear(24, 40)
    with torch.autocast("cpu", torch.bfloat16), casts_together(layer):
        assert not linear.casts_are_shared()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_computes_again_what_it_computed(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    """The second time is in the backward pass, when the copies are gone."""
    monkeypatch.setattr(linear, "_is_cast", torch.is_autocast_enabled)
    torch.manual_seed(0)
    attention = SelfAttention(24, 4, dropout=0.0)
    x = torch.randn(30, 24, requires_grad=True)

    def grads_of(*, again: bool) -> list[Tensor]:
        def project(frames: Tensor) -> Tensor:
            return torch.stack(functional.queries_keys_values(attention, frames))

        with torch.autocast("cpu", torch.bfloat16), casts_together(attention):
            out = checkpoint(project, x, use_reentrant=reentrant) if again else project(x)
        assert isinstance(out, Tensor)
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        leaves = [x, *(one for part in parts for one in part.parameters())]
        out.float().square().sum().backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return [grad for grad in found if grad is not None]

    expected, found = grads_of(again=False), grads_of(again=True)
    assert len(found) == len(expected) == 7
    for grad, other in zip(found, expected, strict=True):
        assert (grad - other).abs().max() <= 2**-6 * other.abs().max()


@pytest.mark.parametrize("compiled", ["all", "a layer"])
def test_compiled_layers_are_cast_by_the_compiler(monkeypatch: pytest.MonkeyPatch, compiled: str) -> None:
    monkeypatch.setattr(linear, "_is_cast", torch.is_autocast_enabled)
    torch.manual_seed(0)
    layers = nn.Sequential(PackedLinear(24, 40), PackedLinear(40, 16))
    x = torch.randn(30, 24)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with casts_together(layers):
            out: Tensor = module(x)
        return out

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = run(layers, x)
        if compiled == "all":
            assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(layers, x), expected)
            return
        graphs: list[Any] = []

        def count(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        second: Any = torch.compile(layers[1], fullgraph=True, backend=count)
        for _ in range(3):
            assert torch.equal(run(nn.Sequential(layers[0], second), x), expected)
        assert len(graphs) == 1  # the copies are other tensors each time, which must not matter


class _Shard(nn.Parameter):
    """Stands for a parameter of a sharded or quantised model."""


@pytest.mark.parametrize("kind", ["shard", "elsewhere"])
def test_parameters_that_are_not_ordinary_are_not_copied(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(linear, "_is_cast", torch.is_autocast_enabled)
    first, second = PackedLinear(24, 40), PackedLinear(40, 16)
    weight = second.weight.detach()
    second.weight = nn.Parameter(weight.to("meta")) if kind == "elsewhere" else _Shard(weight)
    with torch.autocast("cpu", torch.bfloat16), casts_together(nn.Sequential(first, second)):
        assert (id(first.weight),) in linear._copies.by_ids
        assert (id(second.weight),) not in linear._copies.by_ids
        assert all(copy.device.type == "cpu" for copy in linear._copies.by_ids.values())


def test_another_thread_makes_its_own_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may use another stream, on which those of this thread do not exist yet, or no longer."""
    monkeypatch.setattr(linear, "_is_cast", torch.is_autocast_enabled)
    layer, made = PackedLinear(24, 40), []

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16), casts_together(layer):
            made.append(linear._copies.by_ids[id(layer.weight),])

    with torch.autocast("cpu", torch.bfloat16), casts_together(layer):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert len(made) == 1
        assert made[0] is not linear._copies.by_ids[id(layer.weight),]
    assert not linear.casts_are_shared()
