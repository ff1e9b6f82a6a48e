"""Test `varlen_attention` with larger inputs than the shared tests: blocks, widths, long batches, races, waiting."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl.kernels.randomness import using_randomness
from fastssl.kernels.varlen_attention import reference
from fastssl.ops import varlen_attention
from fastssl.packing import Layout
from tests.device_waits import device_waits
from tests.ops.common import check_against_reference, gradients, implementations, layout_of

KERNELS = implementations("varlen_attention", compiled_only=True)
ON_GPU = [kernel for kernel in KERNELS if kernel.values[1] == "cuda"] or [
    pytest.param("triton", "cuda", marks=pytest.mark.gpu)
]
FIFTY_SHORT = (5, *(1 + 7 * index % 29 for index in range(30)), 4000, *(1 + 5 * index % 31 for index in range(20)))


def make_inputs(lengths: tuple[int, ...], heads: int, width: int, reach: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(sum(lengths), heads, width, generator=generator) for name in ("q", "k", "v")}
    inputs["distance_bias"] = torch.randn(heads, 2 * reach + 1, generator=generator)
    inputs["gate"] = 1 + torch.randn(sum(lengths), heads, generator=generator)
    inputs["seed"] = torch.tensor(-1234567890123)
    return inputs


def run(inputs: dict[str, Tensor], layout: Layout, backend: str, dropout_p: float = 0.1) -> Tensor:
    return varlen_attention(**inputs, layout=layout, dropout_p=dropout_p, backend=backend)  # type: ignore[arg-type]


def check(
    lengths: tuple[int, ...], heads: int, width: int, reach: int, backend: str, device: str, dtype: torch.dtype
) -> None:
    check_against_reference(
        lambda inputs, name: run(inputs, layout_of(lengths, inputs["q"].device.type), name),
        make_inputs(lengths, heads, width, reach),
        backend=backend,
        device=device,
        dtype=dtype,
        backward=True,
    )


@pytest.mark.parametrize("width", [32, 80, 128])
@pytest.mark.parametrize(("backend", "device"), KERNELS)
def test_widths(backend: str, device: str, width: int) -> None:
    check((70, 5), 1, width, 30, backend, device, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_widths_of_long_sequences(backend: str, device: str, width: int, dtype: torch.dtype) -> None:
    check((333, 1, 64, 700), 2, width, 400, backend, device, dtype)


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(*kernel.values, marks=pytest.mark.slow, id=kernel.id)
        for kernel in KERNELS
        if kernel.values[1] == "cpu"
    ]
    + ON_GPU,
)
@pytest.mark.parametrize("lengths", [(4096,), FIFTY_SHORT], ids=["4096_frames", "fifty_short_beside_one_long"])
def test_long(lengths: tuple[int, ...], backend: str, device: str) -> None:
    check(lengths, 1, 64, 800, backend, device, torch.bfloat16)


@pytest.mark.parametrize("dropout_p", [0.1, 0.7])
@pytest.mark.parametrize("seed", [3, -(2**63), 2**40 + 12345])
@pytest.mark.parametrize("randomness", [1, 2])
@pytest.mark.parametrize(("backend", "device"), KERNELS)
def test_drops_what_the_reference_drops(
    backend: str, device: str, randomness: int, seed: int, dropout_p: float
) -> None:
    """With equal logits and unit vectors as values, the output shows the forward's mask, and grad_v the backward's."""
    lengths, heads = (40, 0, 70), 2
    zeros = torch.zeros(sum(lengths), heads, max(lengths), device=device)
    values = torch.cat([torch.eye(length, max(lengths)) for length in lengths]).unsqueeze(1).expand_as(zeros)
    values = values.to(device, copy=True).requires_grad_()
    packed, the_seed = layout_of(lengths, device), torch.tensor(seed, device=device)
    with using_randomness(randomness):  # the backward must keep the version of the forward
        out = varlen_attention(zeros, zeros, values, packed, dropout_p=dropout_p, seed=the_seed, backend=backend)
    rows = torch.arange(sum(lengths), device=device)
    masks = [
        reference.dropout_mask(the_seed, own, heads=heads, keys=len(own), dropout_p=dropout_p, randomness=randomness)
        for own in rows.split(lengths)
    ]
    for weights, mask in zip(out.split(lengths), masks, strict=True):
        assert torch.equal(weights[:, :, : mask.shape[2]].transpose(0, 1) > 0, mask)
    grad_out = torch.cat([torch.eye(length, max(lengths)) for length in lengths]).unsqueeze(1).expand_as(zeros)
    (grad,) = torch.autograd.grad(out, values, grad_out.to(device))
    for weights, mask in zip(grad.split(lengths), masks, strict=True):
        assert torch.equal(weights[:, :, : mask.shape[2]].permute(1, 2, 0) > 0, mask)


@pytest.mark.parametrize(("backend", "device"), KERNELS)
def test_a_bias_of_minus_infinity_forbids(backend: str, device: str) -> None:
    lengths, reach = (150, 3), 40
    inputs = {name: x.to(device) for name, x in make_inputs(lengths, 1, 16, reach).items() if name != "gate"}
    inputs["distance_bias"][:, [0, -1]] = float("-inf")  # local attention: no frame sees beyond 39 frames
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "distance_bias")]
    outputs = [run(inputs, layout_of(lengths, device), name) for name in (backend, "reference")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    found, expected = (gradients(out, leaves) for out in outputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize(("backend", "device"), KERNELS)
def test_a_scale_that_is_not_positive(backend: str, device: str, scale: float) -> None:
    lengths = (130, 3, 1)
    inputs = {name: x.to(device) for name, x in make_inputs(lengths, 1, 16, 1).items() if name in ("q", "k", "v")}
    q, k, v = leaves = [x.requires_grad_() for x in inputs.values()]
    layout = layout_of(lengths, device)
    outputs = [varlen_attention(q, k, v, layout, scale=scale, backend=name) for name in (backend, "reference")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    found, expected = (gradients(out, leaves) for out in outputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_same_bits_every_time(backend: str, device: str) -> None:
    draw = random.Random(0)
    for _ in range(10):
        lengths = tuple(draw.choice((1, 3, 64, 65, 200, 780, 1500)) for _ in range(draw.randint(1, 40)))
        inputs: dict[str, Any] = {
            name: x.to(device, torch.bfloat16).requires_grad_() if x.is_floating_point() else x.to(device)
            for name, x in make_inputs(lengths, 4, 64, 300).items()
        }
        leaves = [x for x in inputs.values() if x.requires_grad]
        first: list[Tensor] = []
        for _ in range(10):
            out = run(inputs, layout_of(lengths, device), backend)
            found = [out, *gradients(out, leaves)]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_bits_do_not_depend_on_the_batch(backend: str, device: str) -> None:
    lengths = (150, 1, 1200, 64, 33)
    q, k, v = (torch.randn(sum(lengths), 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    together = varlen_attention(q, k, v, layout_of(lengths, device), backend=backend).split(lengths)
    for part, *alone in zip(together, *(x.split(lengths) for x in (q, k, v)), strict=True):
        q, k, v = alone
        assert torch.equal(part, varlen_attention(q, k, v, layout_of((len(part),), device), backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), ON_GPU)
def test_the_host_does_not_wait(backend: str, device: str) -> None:
    lengths = (150, 1, 1200, 64)
    inputs: dict[str, Any] = {
        name: x.to(device).requires_grad_() if x.is_floating_point() else x.to(device)
        for name, x in make_inputs(lengths, 4, 64, 300).items()
    }
    leaves, layout = [x for x in inputs.values() if x.requires_grad], layout_of(lengths, device)
    assert not device_waits(lambda: torch.autograd.grad(run(inputs, layout, backend).sum(), leaves))
