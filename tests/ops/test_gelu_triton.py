"""Test the normal distribution in Triton kernels, over all numbers that have 16 bits."""

import math

import pytest
import torch
from torch import Tensor

from fastssl.kernels.dispatch import BACKENDS

if "triton" not in BACKENDS["bias_gelu_dropout"]["cpu"] + BACKENDS["bias_gelu_dropout"]["cuda"]:
    pytest.skip("Triton does not run here", allow_module_level=True)

import triton
import triton.language as tl

from fastssl.kernels.gelu_triton import gelu_derivative, normal_at
from fastssl.ops import bias_gelu_dropout
from tests.ops.common import implementations


@triton.jit  # type: ignore[untyped-decorator]
def _normal_kernel(x_ptr, below_ptr, gelu_ptr, derivative_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index).to(tl.float32)
    below, bell = normal_at(x, EXACT)
    tl.store(below_ptr + index, below)
    tl.store(gelu_ptr + index, x * below)
    tl.store(derivative_ptr + index, gelu_derivative(x, below, bell))


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Return all finite numbers of a 16-bit dtype."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return x[x.isfinite()]


def exact(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normal distribution below x, GELU and its derivative in fp64, without cancellation."""
    x = x.double()
    below = torch.special.erfc(-x / math.sqrt(2)) / 2
    return below, x * below, below + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_exact", [False, True])
def test_normal_distribution(dtype: torch.dtype, device: str, is_exact: bool) -> None:
    if "triton" not in BACKENDS["bias_gelu_dropout"][device]:
        pytest.skip("Triton does not run on this device")
    x = all_numbers(dtype)
    found = [torch.empty(len(x), device=device) for _ in range(3)]
    block = math.gcd(len(x), 1024)
    _normal_kernel[(len(x) // block,)](x.to(device), *found, EXACT=is_exact, BLOCK=block)
    below, gelu, derivative = (y.cpu().double() for y in found)
    true_below, true_gelu, true_derivative = exact(x)
    # Approximations of rsqrt and exp2 on a GPU may take as much again.
    bound = 2e-7 if is_exact else 5e-7 if device == "cpu" else 1e-6
    assert (below - true_below).abs().max() < bound
    assert (derivative - true_derivative).abs().max() < bound
    assert (gelu - true_gelu).abs().div(x.double().abs().clamp(min=1)).max() < (2e-7 if device == "cpu" else 4e-7)
    if not is_exact:  # 1 + erf(x) is 0 there
        tail = (x < -2) & (true_gelu.abs() > 1e-30)
        assert (gelu / true_gelu - 1)[tail].abs().max() < 2e-5


@pytest.mark.parametrize(("backend", "device"), implementations("bias_gelu_dropout", compiled_only=True))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_has_the_precision_of_its_dtype(dtype: torch.dtype, backend: str, device: str) -> None:
    numbers = all_numbers(dtype)
    x = numbers.to(device).view(-1, 64).requires_grad_()
    out = bias_gelu_dropout(x, None, backend=backend)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(x))
    _, true_out, true_grad = (y.view(-1, 64) for y in exact(numbers))
    precision = torch.finfo(dtype)
    for found, expected in ((out, true_out), (grad, true_grad)):
        # Triton's interpreter truncates to bf16. Near the zero of the derivative, only the absolute error is small.
        allowed = precision.eps * expected.abs() + precision.smallest_normal * precision.eps + 1e-7
        error = (found.detach().cpu().double() - expected).abs()
        assert (error <= allowed).all(), numbers.view(-1, 64)[error > allowed]
