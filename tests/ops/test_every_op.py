"""What holds for every op alike: extreme batches, same bits every time, strided arguments, and no waiting for a GPU.

An op that is not in `CASES` fails `test_no_op_is_forgotten`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from fastssl import ops
from fastssl.kernels.dispatch import BACKENDS
from fastssl.packing import Layout
from tests.device_waits import device_waits
from tests.ops.common import check_against_reference, gradients, implementations, layout_of

Inputs = dict[str, Tensor]
#: Inputs for so many frames, and the call on them.
Case = tuple[Callable[[int], Inputs], Callable[[Inputs, Layout, str], Tensor]]
FIFTY_SHORT = (1500, *(1 + i % 5 for i in range(50)))
EXTREME = {"4096_frames": (4096,), "fifty_short_beside_one_long": FIFTY_SHORT}


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _seeds(count: int) -> Tensor:
    return torch.arange(count) * 7919


def _negatives(frames: int) -> Tensor:
    return torch.randint(-1, frames, (frames, 11), generator=torch.Generator().manual_seed(1))


def _strided_conv(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    x, weight, norm_weight, norm_bias = inputs.values()
    out: Tensor = ops.strided_conv(
        x, weight, layout, stride=2, norm="group", norm_weight=norm_weight, norm_bias=norm_bias, backend=backend
    )[0]
    return out


def _varlen_attention(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    q, k, v, bias, gate, seed = inputs.values()
    return ops.varlen_attention(
        q, k, v, layout, distance_bias=bias, gate=gate, dropout_p=0.1, seed=seed, backend=backend
    )


def _dropout_add_layer_norm(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    x, residual, weight, bias, seed = inputs.values()
    out: Tensor = ops.dropout_add_layer_norm(
        x, residual, weight=weight, bias=bias, dropout_p=0.1, seed=seed, backend=backend
    )
    return out


def _gumbel_quantize(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    return ops.gumbel_quantize(
        inputs["logits"], inputs["codevectors"], seeds=inputs["seeds"], temperature=1.5, backend=backend
    ).values


CASES: dict[str, Case] = {
    "strided_conv": (
        lambda n: {"x": _randn(n, 6), "weight": _randn(8, 6, 3), "norm_weight": _randn(8), "norm_bias": _randn(8)},
        _strided_conv,
    ),
    "positional_conv": (
        lambda n: {"x": _randn(n, 8), "weight": _randn(8, 4, 6)},
        lambda inputs, layout, backend: ops.positional_conv(inputs["x"], inputs["weight"], layout, backend=backend),
    ),
    "varlen_attention": (
        lambda n: {
            **{name: _randn(n, 1, 32) + i for i, name in enumerate("qkv")},
            "distance_bias": _randn(1, 9),
            "gate": _randn(n, 1),
            "seed": torch.tensor(3),
        },
        _varlen_attention,
    ),
    "dropout_add_layer_norm": (
        lambda n: {
            "x": _randn(n, 24),
            "residual": _randn(n, 24) + 1,
            "weight": _randn(24),
            "bias": _randn(24) + 1,
            "seed": torch.tensor(3),
        },
        _dropout_add_layer_norm,
    ),
    "bias_gelu_dropout": (
        lambda n: {"x": _randn(n, 24), "bias": _randn(24), "seed": torch.tensor(3)},
        lambda inputs, layout, backend: ops.bias_gelu_dropout(
            inputs["x"], inputs["bias"], dropout_p=0.1, seed=inputs["seed"], backend=backend
        ),
    ),
    "gumbel_quantize": (
        lambda n: {"logits": _randn(n, 2, 12), "codevectors": _randn(2, 12, 8), "seeds": _seeds(n)},
        _gumbel_quantize,
    ),
    "contrastive_loss": (
        lambda n: {"context": _randn(n, 24), "targets": _randn(n, 24) + 1, "negatives": _negatives(n)},
        lambda inputs, layout, backend: ops.contrastive_loss(*inputs.values(), backend=backend)[0],
    ),
    "integrate_and_fire": (
        lambda n: {"x": _randn(n, 24), "weights": _randn(n).abs() * 0.4},
        lambda inputs, layout, backend: ops.integrate_and_fire(inputs["x"], inputs["weights"], layout, backend=backend)[
            0
        ],
    ),
}


#: (op, tensors, options): together they pass every tensor argument of every op.
EVERY_TENSOR: list[tuple[str, Inputs, dict[str, Any]]] = [
    *(
        (
            "strided_conv",
            {
                "x": _randn(13, channels),
                "weight": _randn(8, channels, 3),
                "bias": _randn(8),
                "norm_weight": _randn(8),
                "norm_bias": _randn(8),
            },
            {"stride": 2, "norm": norm},
        )
        for channels, norm in ((6, "group"), (6, "layer"), (1, "group"))
    ),
    ("strided_conv", {"x": _randn(13, 6), "weight": _randn(8, 6, 3), "bias": _randn(8)}, {"stride": 1}),
    ("positional_conv", {"x": _randn(13, 8), "weight": _randn(8, 4, 6), "bias": _randn(8)}, {}),
    ("positional_conv", {"x": _randn(13, 8), "weight": _randn(8, 1, 3), "bias": _randn(8)}, {}),
    (
        "varlen_attention",
        {
            **{name: _randn(13, 2, 16) + i for i, name in enumerate("qkv")},
            "distance_bias": _randn(2, 9),
            "gate": _randn(13, 2),
            "seed": torch.tensor(3),
        },
        {"dropout_p": 0.1},
    ),
    *(
        (
            "dropout_add_layer_norm",
            {
                "x": _randn(13, 24),
                "residual": _randn(13, 24) + 1,
                "weight": _randn(24),
                "bias": _randn(24) + 1,
                "seed": torch.tensor(3),
            },
            {"dropout_p": dropout_p, "prenorm": prenorm},
        )
        for dropout_p, prenorm in ((0.1, False), (0.0, True))
    ),
    ("bias_gelu_dropout", {"x": _randn(13, 24), "bias": _randn(24), "seed": torch.tensor(3)}, {"dropout_p": 0.1}),
    ("gumbel_quantize", {"logits": _randn(13, 2, 12), "codevectors": _randn(2, 12, 8), "noise": _randn(13, 2, 12)}, {}),
    ("gumbel_quantize", {"logits": _randn(13, 2, 12), "codevectors": _randn(2, 12, 8), "seeds": _seeds(13)}, {}),
    ("contrastive_loss", {"context": _randn(13, 24), "targets": _randn(13, 24) + 1, "negatives": _negatives(13)}, {}),
    ("integrate_and_fire", {"x": _randn(13, 24), "weights": _randn(13).abs() * 0.9}, {}),
]


def every_implementation(*, on: str | None = None) -> list[ParameterSet]:
    """(op, backend, device) of every backend but the reference."""
    return [
        pytest.param(op, *found.values, marks=found.marks, id=f"{op}-{found.id}")
        for op in CASES
        for found in implementations(op)
        if found.values[0] != "reference" and on in (None, found.values[1])
    ]


def leaves_of(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    return {
        name: x.to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device)
        for name, x in inputs.items()
    }


def outputs_and_gradients(op: str, inputs: Inputs, layout: Layout, backend: str) -> list[Tensor]:
    out = CASES[op][1](inputs, layout, backend)
    return [out.detach(), *gradients(out, [x for x in inputs.values() if x.requires_grad])]


def test_no_op_is_forgotten() -> None:
    assert CASES.keys() == BACKENDS.keys()


def test_no_tensor_argument_is_forgotten() -> None:
    """`EVERY_TENSOR` names each argument of each op that is a tensor."""
    for op in BACKENDS:
        parameters = inspect.signature(getattr(ops, op)).parameters.values()
        tensors = {parameter.name for parameter in parameters if parameter.annotation in (Tensor, Tensor | None)}
        assert tensors == {name for other, inputs, _ in EVERY_TENSOR if other == op for name in inputs}


def every_second(x: Tensor) -> Tensor:
    """The same numbers with zeros in between, which a kernel that knows no strides would read."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


@pytest.mark.parametrize(
    ("op", "inputs", "options", "backend", "device"),
    [
        pytest.param(*case, *found.values, marks=found.marks, id=f"{case[0]}-{index}-{found.id}")
        for index, case in enumerate(EVERY_TENSOR)
        for found in implementations(case[0])
        if found.values[0] != "reference"
    ],
)
def test_strides_do_not_matter(op: str, inputs: Inputs, options: dict[str, Any], backend: str, device: str) -> None:
    """The same bits, forward and backward, whether arguments and output gradients are contiguous or not."""
    if (op, backend, device) == ("varlen_attention", "torch", "cuda"):
        pytest.skip("PyTorch's kernel has no distance bias")
    function = getattr(ops, op)
    leaves = leaves_of(inputs, device, torch.float32)
    if "layout" in inspect.signature(function).parameters:
        options = options | {"layout": layout_of((7, 0, 6), device)}

    def outputs_and_gradients(view: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = function(**{name: view(x) for name, x in leaves.items()}, **options, backend=backend)
        outputs = [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]
        tracked = [x for x in outputs if x.requires_grad]
        grads = [view(torch.arange(x.numel(), device=device).view(x.shape).to(x.dtype).sin()) for x in tracked]
        wanted = [x for name, x in leaves.items() if x.requires_grad and name != "noise"]
        return [*outputs, *torch.autograd.grad(tracked, wanted, grads)]

    plain = outputs_and_gradients(lambda x: x)
    strided = outputs_and_gradients(lambda x: every_second(x) if x.dim() > 0 else x)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("lengths", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize(("op", "backend", "device"), every_implementation())
def test_extreme_batches(op: str, backend: str, device: str, lengths: tuple[int, ...]) -> None:
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter would take minutes")
    make, call = CASES[op]
    for backward in (False, True):
        check_against_reference(
            lambda inputs, name: call(inputs, layout_of(lengths, next(iter(inputs.values())).device.type), name),
            make(sum(lengths)),
            backend=backend,
            device=device,
            dtype=torch.float32,
            backward=backward,
        )


@pytest.mark.parametrize(("op", "backend", "device"), every_implementation())
def test_same_bits_every_time(op: str, backend: str, device: str) -> None:
    """On a GPU with many blocks and many times, because a race shows now and then."""
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter runs one program after another")
    lengths, times = (FIFTY_SHORT, 50) if device == "cuda" else ((37, 1, 0, 23), 3)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make, _ = CASES[op]
    inputs, layout = leaves_of(make(sum(lengths)), device, dtype), layout_of(lengths, device)
    first = outputs_and_gradients(op, inputs, layout, backend)
    for _ in range(times - 1):
        again = outputs_and_gradients(op, inputs, layout, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("op", "backend", "device"), every_implementation(on="cuda"))
def test_the_host_does_not_wait(op: str, backend: str, device: str) -> None:
    if op == "integrate_and_fire":
        pytest.skip("the number of frames that come out must be read, once")
    lengths = (150, 1, 1200, 64)
    make, _ = CASES[op]
    inputs, layout = leaves_of(make(sum(lengths)), device, torch.float32), layout_of(lengths, device)
    assert not device_waits(lambda: outputs_and_gradients(op, inputs, layout, backend))
