"""Test `strided_conv` with larger inputs than the shared tests: chunks, tiles, long batches, races, waiting."""

import random
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from fastssl.ops import StridedConvLayer, strided_conv_stack
from tests.device_waits import device_waits
from tests.ops.common import cast, check_against_reference, gradients, implementations, layout_of

Norm = Literal["none", "group", "layer"]
TRITON = [kernel for kernel in implementations("strided_conv") if kernel.values[0] == "triton"]
ON_GPU = [kernel for kernel in TRITON if kernel.values[1] == "cuda"] or [
    pytest.param("triton", "cuda", marks=pytest.mark.gpu)
]


class Stack(NamedTuple):
    channels: tuple[int, ...]  # the input's, then the output's of each layer
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    norms: tuple[Norm, ...]
    bias: bool

    def inputs(self, lengths: tuple[int, ...]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        tensors = {"x": normal(sum(lengths), self.channels[0])}
        for i, (c_in, c_out) in enumerate(zip(self.channels, self.channels[1:], strict=False)):
            tensors[f"weight_{i}"] = normal(c_out, c_in, self.kernels[i]) / (c_in * self.kernels[i]) ** 0.5
            if self.bias:
                tensors[f"bias_{i}"] = normal(c_out)
            if self.norms[i] != "none":
                tensors |= {f"norm_weight_{i}": 1 + normal(c_out) / 4, f"norm_bias_{i}": normal(c_out)}
        return tensors

    def layers(self, tensors: dict[str, Tensor]) -> list[StridedConvLayer]:
        return [
            StridedConvLayer(
                tensors[f"weight_{i}"],
                self.strides[i],
                tensors.get(f"bias_{i}"),
                self.norms[i],
                tensors.get(f"norm_weight_{i}"),
                tensors.get(f"norm_bias_{i}"),
            )
            for i in range(len(self.kernels))
        ]

    def run(self, tensors: dict[str, Tensor], lengths: tuple[int, ...], backend: str) -> Tensor:
        layout = layout_of(lengths, tensors["x"].device.type)
        return strided_conv_stack(tensors["x"], self.layers(tensors), layout, backend=backend)[0]

    def check(
        self, lengths: tuple[int, ...], backend: str, device: str, dtype: torch.dtype, *, needs_grad_x: bool
    ) -> None:
        inputs = self.inputs(lengths)
        x = inputs["x"].to(dtype)

        def run(tensors: dict[str, Tensor], name: str) -> Tensor:
            like = tensors["weight_0"]
            return self.run({"x": x.to(like.device, like.dtype)} | tensors, lengths, name)

        given = inputs if needs_grad_x else {name: tensor for name, tensor in inputs.items() if name != "x"}
        check_against_reference(run, given, backend=backend, device=device, dtype=dtype, backward=True)


@pytest.mark.parametrize(
    ("first", "dtype"), [("none", torch.bfloat16), ("group", torch.float32), ("layer", torch.bfloat16)]
)
@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_sequences_of_several_chunks(
    backend: str, device: str, first: Norm, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastssl.kernels.strided_conv import triton_rows, triton_statistics

    for module in (triton_rows, triton_statistics):
        monkeypatch.setattr(module, "WINDOW_CHUNK", 64)
        monkeypatch.setattr(module, "FRAME_CHUNK", 64)
    stack = Stack((1, 20, 6), (10, 3), (5, 1), (first, "group"), bias=True)
    stack.check((700, 3, 0, 411), backend, device, dtype, needs_grad_x=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_several_tiles_of_everything(backend: str, device: str, dtype: torch.dtype) -> None:
    stack = Stack((100, 140), (3,), (2,), ("none",), bias=False)
    stack.check((300, 5), backend, device, dtype, needs_grad_x=True)


@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_more_sequences_than_a_search_takes_at_once(backend: str, device: str) -> None:
    stack = Stack((4, 4), (2,), (1,), ("none",), bias=False)
    stack.check(tuple(index % 4 for index in range(130)), backend, device, torch.bfloat16, needs_grad_x=True)


@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_group_norm_of_a_waveform_far_from_zero(backend: str, device: str) -> None:
    stack, lengths = Stack((1, 8), (10,), (5,), ("group",), bias=False), (300, 90)
    inputs = {name: tensor.to(device) for name, tensor in stack.inputs(lengths).items()}
    inputs["weight_0"] -= inputs["weight_0"].mean(2, keepdim=True)  # a zero-mean filter ignores the offset
    near, far = (stack.run(inputs | {"x": inputs["x"] + offset}, lengths, backend) for offset in (0.0, 64.0))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-3)


BASE = Stack((1, 512, 512, 512, 512), (10, 3, 3, 2), (5, 2, 2, 2), ("group", "none", "none", "none"), bias=False)
LARGE = Stack((1, 512, 512, 512, 512), (10, 3, 3, 2), (5, 2, 2, 2), ("layer",) * 4, bias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("needs_grad_x", [False, True])
@pytest.mark.parametrize("stack", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_wide(backend: str, device: str, stack: Stack, needs_grad_x: bool, dtype: torch.dtype) -> None:
    stack.check((16000, 399, 5, 24321), backend, device, dtype, needs_grad_x=needs_grad_x)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_same_bits_every_time(backend: str, device: str, stack: Stack) -> None:
    draw = random.Random(0)
    for _ in range(5):
        lengths = tuple(draw.choice((1, 400, 3000, 16000, 50001)) for _ in range(draw.randint(1, 30)))
        inputs = cast(stack.inputs(lengths), torch.bfloat16, device)
        names = [name for name in inputs if name != "x"]
        inputs["x"].requires_grad_(False)
        first: list[Tensor] = []
        for _ in range(10):
            out = stack.run(inputs, lengths, backend)
            found = [out, *gradients(out, [inputs[name] for name in names])] if len(out) else [out]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("stack", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_bits_do_not_depend_on_the_batch(backend: str, device: str, stack: Stack) -> None:
    lengths = (16000, 399, 5, 24321)
    inputs = {name: tensor.to(device, torch.bfloat16) for name, tensor in stack.inputs(lengths).items()}
    alone = [
        stack.run(inputs | {"x": x.clone()}, (length,), backend)
        for x, length in zip(inputs["x"].split(lengths), lengths, strict=True)
    ]
    assert torch.equal(stack.run(inputs, lengths, backend), torch.cat(alone))


@pytest.mark.gpu
@pytest.mark.parametrize("stack", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_the_host_does_not_wait(backend: str, device: str, stack: Stack) -> None:
    lengths = (16000, 399, 5, 24321)
    inputs = cast(stack.inputs(lengths), torch.bfloat16, device)
    layers, layout, leaves = stack.layers(inputs), layout_of(lengths, device), list(inputs.values())

    def step() -> None:
        torch.autograd.grad(strided_conv_stack(inputs["x"], layers, layout, backend=backend)[0].sum(), leaves)

    assert not device_waits(step)
