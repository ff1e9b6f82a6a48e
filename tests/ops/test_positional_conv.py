from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.ops import positional_conv
from fastssl.packing import Layout
from tests.ops.common import LENGTHS, check_against_reference, compiler_for, implementations, layout_of

#: name -> (lengths, groups, channels of a group, K, bias)
CASES = {
    "wav2vec2": (LENGTHS["odd"], 4, 6, 16, True),
    "odd_kernel": (LENGTHS["odd"], 2, 8, 7, True),
    "kernel_longer_than_sequences": (LENGTHS["one_long"], 2, 4, 32, True),
    "depthwise": (LENGTHS["odd"], 6, 1, 5, False),
    "depthwise_of_conformer": (LENGTHS["with_empty"], 24, 1, 31, True),
    "depthwise_even": (LENGTHS["one_long"], 5, 1, 4, True),
    "one_group": (LENGTHS["with_empty"], 1, 5, 4, True),
    "kernel_1": (LENGTHS["odd"], 2, 3, 1, False),
    "single_frame": (LENGTHS["single_frame"], 2, 4, 8, True),
    "small": ((5, 0, 3), 2, 2, 4, True),
    "empty_batch": (LENGTHS["empty_batch"], 2, 4, 8, True),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("positional_conv"))


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    lengths, groups, group_channels, kernel, bias = CASES[case]
    generator = torch.Generator().manual_seed(0)
    channels = groups * group_channels
    inputs = {
        "x": torch.randn(sum(lengths), channels, generator=generator, dtype=dtype),
        "weight": torch.randn(channels, group_channels, kernel, generator=generator, dtype=dtype),
    }
    if bias:
        inputs["bias"] = torch.randn(channels, generator=generator, dtype=dtype)
    return inputs


def run(case: str, inputs: dict[str, Tensor], backend: str | None = None) -> Tensor:
    layout = layout_of(CASES[case][0], inputs["x"].device.type)
    return positional_conv(inputs["x"], inputs["weight"], layout, bias=inputs.get("bias"), backend=backend)


def skip_unserved(case: str, backend: str, device: str, dtype: torch.dtype) -> None:
    if backend == "torch" and (
        dtype == torch.float64 or case == "empty_batch" or (dtype, device) == (torch.float16, "cpu")
    ):
        with pytest.raises(ValueError, match="backend='torch': not available"):
            run(case, {name: tensor.to(device) for name, tensor in make_inputs(case, dtype).items()}, backend)
        pytest.skip("PyTorch's convolution does not serve this case")


@EVERY_CASE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_forward_and_backward(case: str, backend: str, device: str, dtype: torch.dtype, backward: bool) -> None:
    skip_unserved(case, backend, device, dtype)
    check_against_reference(
        lambda inputs, name: run(case, inputs, name),
        make_inputs(case),
        backend=backend,
        device=device,
        dtype=dtype,
        backward=backward,
    )


def test_reference_is_the_convolution_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 12), (12, 3, 10), (12,)))
    out = positional_conv(x, weight, layout_of((25, 15)), bias=bias, backend="reference")
    for frames, found in zip(x.split((25, 15)), out.split((25, 15)), strict=True):
        expected = F.conv1d(frames.t()[None], weight, bias, padding=5, groups=4)[0, :, :-1].t()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", ["small", "empty_batch"])
def test_gradcheck(case: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(case, torch.float64).items()}
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *tensors: run(case, dict(zip(names, tensors, strict=True)), "reference"), tuple(inputs.values())
    )


def test_long_sequences_have_an_exact_weight_gradient() -> None:
    """The correlation over many blocks of the transform, in the size of the base model's groups."""
    generator = torch.Generator().manual_seed(0)
    layout = layout_of((700, 3, 450))
    inputs = {
        "x": torch.randn(layout.total, 32, generator=generator),
        "weight": torch.randn(32, 16, 128, generator=generator) / 45,
    }
    check_against_reference(
        lambda tensors, name: positional_conv(tensors["x"], tensors["weight"], layout, backend=name),
        inputs,
        backend="torch",
        device="cpu",
        dtype=torch.float32,
        backward=True,
    )


@EVERY_IMPLEMENTATION
def test_compile(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in make_inputs("wav2vec2").items()}
    compiled = torch.compile(
        lambda tensors: run("wav2vec2", tensors, backend), fullgraph=True, dynamic=True, backend=compiler_for(backend)
    )
    out, eager = compiled(inputs), run("wav2vec2", inputs, backend)
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-4)
    (grads, expected) = (torch.autograd.grad(y.square().sum(), list(inputs.values())) for y in (out, eager))
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-2)


@EVERY_IMPLEMENTATION
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6))
def test_batch_mates_do_not_matter(backend: str, device: str, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), 24, generator=generator).to(device)
    weight = torch.randn(24, 6, 16, generator=generator).to(device)
    if not sum(lengths):
        return
    out = positional_conv(x, weight, layout_of(lengths, device), backend=backend)
    for length, together, frames in zip(lengths, out.split(lengths), x.split(lengths), strict=True):
        if length:
            alone = positional_conv(frames.clone(), weight, layout_of([length], device), backend=backend)
            if device == "cpu":
                assert torch.equal(together, alone)
            else:
                torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_autocast_reaches_the_arguments_and_not_the_op() -> None:
    inputs = make_inputs("wav2vec2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run("wav2vec2", inputs)
    assert torch.equal(out, run("wav2vec2", {name: tensor.bfloat16() for name, tensor in inputs.items()}))


def test_rejects_bad_input() -> None:
    x, weight, layout = torch.randn(20, 8), torch.randn(8, 4, 3), Layout.from_lengths([12, 8])
    bad: dict[str, dict[str, Any]] = {
        r"x: expected \(20, D\)": {"x": torch.randn(19, 8)},
        r"weight: expected \(8, 8 / groups, K\)": {"weight": torch.randn(8, 3, 3)},
        "weight and bias: must be torch.float32": {"weight": weight.double()},
        r"bias: expected \(8,\)": {"bias": torch.randn(5)},
        "backend='warp': not available for positional_conv on cpu": {"backend": "warp"},
    }
    for message, arguments in bad.items():
        call: dict[str, Any] = {"x": x, "weight": weight} | arguments
        with pytest.raises(ValueError, match=message):
            positional_conv(call.pop("x"), call.pop("weight"), layout, **call)
