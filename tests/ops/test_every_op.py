"""Test every op: extreme batches, equal bits on every run, strided arguments, and no waiting for a GPU."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from fastssl import ops
from fastssl.kernels.dispatch import BACKENDS
from fastssl.packing import Layout
from tests.device_waits import device_waits
from tests.ops.common import cast, check_against_reference, gradients, implementations, layout_of, randn
from tests.ops.standard import Inputs, Standard, every, interpreted

FIFTY_SHORT = (1500, *(1 + i % 5 for i in range(50)))
EXTREME = {"4096_frames": (4096,), "fifty_short_beside_one_long": FIFTY_SHORT}


def _seeds(count: int) -> Tensor:
    return torch.arange(count) * 7919


def _negatives(frames: int) -> Tensor:
    return torch.randint(-1, frames, (frames, 11), generator=torch.Generator().manual_seed(1))


#: Calls (op, tensors, options) that together pass every tensor argument of every op.
EVERY_TENSOR: list[tuple[str, Inputs, dict[str, Any]]] = [
    *(
        (
            "strided_conv",
            {
                "x": randn(13, channels),
                "weight": randn(8, channels, 3),
                "bias": randn(8),
                "norm_weight": randn(8),
                "norm_bias": randn(8),
            },
            {"stride": 2, "norm": norm},
        )
        for channels, norm in ((6, "group"), (6, "layer"), (1, "group"))
    ),
    ("strided_conv", {"x": randn(13, 6), "weight": randn(8, 6, 3), "bias": randn(8)}, {"stride": 1}),
    ("positional_conv", {"x": randn(13, 8), "weight": randn(8, 4, 6), "bias": randn(8)}, {}),
    ("positional_conv", {"x": randn(13, 8), "weight": randn(8, 1, 3), "bias": randn(8)}, {}),
    (
        "varlen_attention",
        {
            **{name: randn(13, 2, 16) + i for i, name in enumerate("qkv")},
            "distance_bias": randn(2, 9),
            "gate": randn(13, 2),
            "seed": torch.tensor(3),
        },
        {"dropout_p": 0.1},
    ),
    *(
        (
            "dropout_add_layer_norm",
            {
                "x": randn(13, 24),
                "residual": randn(13, 24) + 1,
                "weight": randn(24),
                "bias": randn(24) + 1,
                "seed": torch.tensor(3),
            },
            {"dropout_p": dropout_p, "prenorm": prenorm},
        )
        for dropout_p, prenorm in ((0.1, False), (0.0, True))
    ),
    ("bias_gelu_dropout", {"x": randn(13, 24), "bias": randn(24), "seed": torch.tensor(3)}, {"dropout_p": 0.1}),
    ("gumbel_quantize", {"logits": randn(13, 2, 12), "codevectors": randn(2, 12, 8), "noise": randn(13, 2, 12)}, {}),
    ("gumbel_quantize", {"logits": randn(13, 2, 12), "codevectors": randn(2, 12, 8), "seeds": _seeds(13)}, {}),
    ("contrastive_loss", {"context": randn(13, 24), "targets": randn(13, 24) + 1, "negatives": _negatives(13)}, {}),
    ("integrate_and_fire", {"x": randn(13, 24), "weights": randn(13).abs() * 0.9}, {}),
]


def every_implementation(*, on: str | None = None) -> list[ParameterSet]:
    """Return pytest parameters (standard, backend, device) for all backends except the reference."""
    return [found for found in every() if found.values[1] != "reference" and on in (None, found.values[2])]


def outputs_and_gradients(standard: Standard, inputs: Inputs, layout: Layout, backend: str) -> list[Tensor]:
    out = standard.call(inputs, layout, backend)
    return [out.detach(), *gradients(out, [x for x in inputs.values() if x.requires_grad])]


def test_no_tensor_argument_is_forgotten() -> None:
    """`EVERY_TENSOR` must contain each tensor argument of each op."""
    for op in BACKENDS:
        parameters = inspect.signature(getattr(ops, op)).parameters.values()
        tensors = {parameter.name for parameter in parameters if parameter.annotation in (Tensor, Tensor | None)}
        assert tensors == {name for other, inputs, _ in EVERY_TENSOR if other == op for name in inputs}


def every_second(x: Tensor) -> Tensor:
    """Return a strided view of the same numbers; a kernel that ignores strides would read the zeros in between."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


def transposed(x: Tensor) -> Tensor:
    """Return a view of the same numbers that are stored from the last dimension to the first."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() > 1 else every_second(x)


def expanded(x: Tensor) -> Tensor:
    """Return the first row as a view of as many rows as there were, with a stride of 0."""
    return x[:1].expand_as(x)


def sliced(x: Tensor) -> Tensor:
    """Return a view of the same numbers inside a larger tensor, as a split of one projection is."""
    return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]


VIEWS = {view.__name__: view for view in (every_second, transposed, expanded, sliced)}


def options_for(op: str, options: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the options of a call of `EVERY_TENSOR`, with a layout if the op takes one."""
    takes_layout = "layout" in inspect.signature(getattr(ops, op)).parameters
    return options | ({"layout": layout_of((7, 0, 6), device)} if takes_layout else {})


def results(function: Callable[..., Any], tensors: Inputs, view: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the outputs of an op, and the gradients of what it was given; output gradients are views, too."""
    given = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    found = function(**given)
    outputs = [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]
    tracked = [x for x in outputs if x.requires_grad]
    grads = [view(torch.arange(x.numel(), device=x.device).view(x.shape).to(x.dtype).sin()) for x in tracked]
    wanted = [x for name, x in given.items() if x.requires_grad and name != "noise"]
    return [*outputs, *torch.autograd.grad(tracked, wanted, grads)]


#: Every call of `EVERY_TENSOR` with every backend except the reference.
EVERY_CALL = pytest.mark.parametrize(
    ("op", "inputs", "options", "backend", "device"),
    [
        pytest.param(*case, *found.values, marks=found.marks, id=f"{case[0]}-{index}-{found.id}")
        for index, case in enumerate(EVERY_TENSOR)
        for found in implementations(case[0])
        if found.values[0] != "reference"
    ],
)


@pytest.mark.parametrize("view", VIEWS)
@EVERY_CALL
def test_strides_do_not_matter(
    op: str, inputs: Inputs, options: dict[str, Any], backend: str, device: str, view: str
) -> None:
    """Outputs and gradients have the same bits whatever the strides of the arguments and of the output gradients."""
    if (op, backend, device) == ("varlen_attention", "torch", "cuda"):
        pytest.skip("PyTorch's kernel has no distance bias")
    function = partial(getattr(ops, op), **options_for(op, options, device), backend=backend)
    leaves = cast(inputs, torch.float32, device)
    views = {name: VIEWS[view](x) for name, x in leaves.items() if x.dim() > 0}
    assert not all(x.is_contiguous() for x in views.values())
    plain = leaves | {name: x.detach().contiguous().requires_grad_(x.requires_grad) for name, x in views.items()}
    expected = results(function, plain, lambda x: VIEWS[view](x).contiguous())
    alone = [] if interpreted(backend, device) else [{name} for name in views]  # to name a culprit; takes long there
    for changed in (*alone, set(views)):
        given = plain | {name: views[name] for name in changed}
        found = results(function, given, VIEWS[view])
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y), f"not contiguous: {', '.join(sorted(changed))}"


def plain(x: Tensor) -> Tensor:
    return x


@EVERY_CALL
def test_saved_tensors_may_come_back_with_other_strides(
    op: str, inputs: Inputs, options: dict[str, Any], backend: str, device: str
) -> None:
    """Hooks on saved tensors, which offload them for example, may return the same values with other strides."""
    function = partial(getattr(ops, op), **options_for(op, options, device), backend=backend)
    leaves = cast(inputs, torch.float32, device)
    expected = results(function, leaves, plain)
    with torch.autograd.graph.saved_tensors_hooks(plain, lambda x: every_second(x) if x.dim() > 0 else x):
        found = results(function, leaves, plain)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@EVERY_CALL
def test_a_second_derivative_is_an_error(
    op: str, inputs: Inputs, options: dict[str, Any], backend: str, device: str
) -> None:
    """A penalty on the gradients of a linear loss would otherwise be a constant."""
    if backend == "torch":
        pytest.skip("PyTorch differentiates its own kernels")
    function = partial(getattr(ops, op), **options_for(op, options, device), backend=backend)
    leaves = cast(inputs, torch.float32, device)
    found = function(**leaves)
    out = found if isinstance(found, Tensor) else found[0]
    wanted = [x for name, x in leaves.items() if x.requires_grad and name != "noise"]
    grads = torch.autograd.grad(out.sum(), wanted, create_graph=True)
    penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative.*reference.*restore"):
        penalty.backward()


@pytest.mark.parametrize("lengths", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize(("standard", "backend", "device"), every_implementation())
def test_extreme_batches(standard: Standard, backend: str, device: str, lengths: tuple[int, ...]) -> None:
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter would take minutes")
    check_against_reference(
        lambda inputs, name: standard.call(inputs, layout_of(lengths, next(iter(inputs.values())).device.type), name),
        standard.frames(sum(lengths)),
        backend=backend,
        device=device,
        dtype=torch.float32,
        backward=True,
    )


@pytest.mark.parametrize(("standard", "backend", "device"), every_implementation())
def test_same_bits_every_time(standard: Standard, backend: str, device: str) -> None:
    """Repeated runs give equal bits. GPUs get many blocks and runs, because a race shows only now and then."""
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter runs one program after another, so races cannot happen")
    lengths, times = (FIFTY_SHORT, 50) if device == "cuda" else ((37, 1, 0, 23), 3)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs, layout = cast(standard.frames(sum(lengths)), dtype, device), layout_of(lengths, device)
    first = outputs_and_gradients(standard, inputs, layout, backend)
    for _ in range(times - 1):
        again = outputs_and_gradients(standard, inputs, layout, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("standard", "backend", "device"), every_implementation(on="cuda"))
def test_the_host_does_not_wait(standard: Standard, backend: str, device: str) -> None:
    if standard.op == "integrate_and_fire":
        pytest.skip("the op must wait once, to read its number of output frames")
    lengths = (150, 1, 1200, 64)
    inputs, layout = cast(standard.frames(sum(lengths)), torch.float32, device), layout_of(lengths, device)
    assert not device_waits(lambda: outputs_and_gradients(standard, inputs, layout, backend))
