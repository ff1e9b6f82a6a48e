from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastssl.kernels.dispatch import BACKENDS
from fastssl.kernels.philox import keep_mask
from fastssl.kernels.randomness import kept_fraction, using_randomness
from fastssl.ops import bias_gelu_dropout
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS, gradients, implementations, normal, randn
from tests.ops.standard import Inputs, Mates, Standard

SEED = torch.tensor(-4242424242424242)

#: Name -> (N, D, with bias, options). If D is not a multiple of 8, rows start in the middle of a Philox block.
CASES: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    "plain": (sum(LENGTHS["odd"]), 96, True, {}),
    "dropout": (37, 300, True, {"dropout_p": 0.3}),
    "odd_width": (19, 67, True, {"dropout_p": 0.3, "offset": 5}),
    "no_bias": (37, 64, False, {}),
    "no_bias_dropout": (37, 70, False, {"dropout_p": 0.3, "offset": 2**32 - 30}),
    "one_channel": (3, 1, True, {"dropout_p": 0.3}),
    "single_frame": (1, 192, True, {"dropout_p": 0.1}),
    "empty_batch": (0, 16, True, {"dropout_p": 0.3}),
}
SMALL: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    f"small, {bias=}, {dropout_p=}": (5, 6, bias, {"dropout_p": dropout_p} if dropout_p else {})
    for bias in (False, True)
    for dropout_p in (0.0, 0.4)
}
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("bias_gelu_dropout"))


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    rows, width, with_bias, options = (CASES | SMALL)[case]
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": 2 * torch.randn(rows, width, generator=generator, dtype=dtype)}
    if with_bias:
        inputs["bias"] = torch.randn(width, generator=generator, dtype=dtype)
    return inputs | ({"seed": SEED} if "dropout_p" in options else {})


def run(case: str, inputs: Inputs, backend: str | None = None) -> Tensor:
    return bias_gelu_dropout(
        inputs["x"], inputs.get("bias"), **(CASES | SMALL)[case][3], seed=inputs.get("seed"), backend=backend
    )


def call(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    return bias_gelu_dropout(inputs["x"], inputs["bias"], dropout_p=0.1, seed=inputs["seed"], backend=backend)


def frames(count: int) -> Inputs:
    return {"x": randn(count, 24), "bias": randn(24), "seed": torch.tensor(3)}


def make_batch(lengths: tuple[int, ...]) -> Inputs:
    return normal(x=(sum(lengths), 83), grad=(sum(lengths), 83), bias=(83,))


def without_dropout(inputs: Inputs, layout: Layout, backend: str) -> list[Packed]:
    """Run without dropout, whose mask depends on the place in the packed tensor and so on batch mates."""
    out = bias_gelu_dropout(inputs["x"].requires_grad_(), inputs["bias"], backend=backend)
    (grad,) = torch.autograd.grad(out, inputs["x"], inputs["grad"])
    return [Packed(out, layout), Packed(grad, layout)]


X, BIAS = torch.randn(20, 8), torch.randn(8)
BAD: dict[str, dict[str, Any]] = {
    r"x: expected \(N, D\), got \(20,\)": {"x": X[:, 0]},
    "x: must be floating point": {"x": X.long()},
    r"bias: expected \(8,\), got \(7,\)": {"bias": BIAS[1:]},
    "bias: is on meta": {"bias": BIAS.to("meta")},
    "dropout_p: must be": {"dropout_p": -0.1},
    "randomness: must be from 1 to 2, got 3": {"randomness": 3},
    "offset: must not be negative": {"dropout_p": 0.1, "offset": -1},
    "seed: expected .* torch.int32": {"dropout_p": 0.1, "seed": torch.tensor(1, dtype=torch.int32)},
    "backend='warp': not available for bias_gelu_dropout on cpu": {"backend": "warp"},
}
if "triton" in BACKENDS["bias_gelu_dropout"]["cpu"]:
    BAD["backend='triton': .*compute in float32.*available: .*reference"] = {"backend": "triton", "x": X.double()}

STANDARD = Standard(
    op="bias_gelu_dropout",
    cases=CASES,
    make_inputs=make_inputs,
    run=run,
    mates={
        name: Mates(
            make=make_batch,
            call=without_dropout,
            lengths=st.just(lengths),
            shared=("bias",),
            same_bits=lambda backend, device: True,
        )
        for name, lengths in {"one_long": LENGTHS["one_long"], "33_0_70": (33, 0, 70)}.items()
    },
    good={"x": X, "bias": BIAS},
    bad=BAD,
    frames=frames,
    call=call,
    gradcheck_cases=SMALL,
    compile_cases=("dropout", "no_bias"),
)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("randomness", [1, 2])
@pytest.mark.parametrize("width", [64, 60, 67])
def test_drops_what_the_specification_says(backend: str, device: str, width: int, randomness: int) -> None:
    x, seed = torch.full((9, width), 20.0, device=device), SEED.to(device)  # GELU(20) is 20
    for offset in (0, 3, 2**32 - 2, 2**40):
        options: dict[str, Any] = {"dropout_p": 0.4, "offset": offset, "randomness": randomness}
        leaf = x.clone().requires_grad_()
        out = bias_gelu_dropout(leaf, None, seed=seed, backend=backend, **options)
        expected = keep_mask(seed, (9, width), **options) / kept_fraction(0.4, randomness)
        torch.testing.assert_close(out, 20 * expected)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        torch.testing.assert_close(grad, expected)


@EVERY_IMPLEMENTATION
def test_the_backward_keeps_the_version_of_the_forward(backend: str, device: str) -> None:
    x, seed = torch.full((3, 64), 20.0, device=device).requires_grad_(), SEED.to(device)
    for randomness in (1, 2):
        with using_randomness(randomness):
            out = bias_gelu_dropout(x, None, dropout_p=0.4, seed=seed, backend=backend)
        with using_randomness(3 - randomness):
            (grad,) = torch.autograd.grad(out.sum(), x)
        expected = keep_mask(seed, (3, 64), dropout_p=0.4, randomness=randomness)
        assert torch.equal(out > 0, expected)
        assert torch.equal(grad > 0, expected)


def test_the_compiler_follows_the_version_in_force() -> None:
    x = torch.full((3, 64), 20.0).requires_grad_()
    compiled = torch.compile(lambda x: bias_gelu_dropout(x, None, dropout_p=0.4, seed=SEED), fullgraph=True)
    for randomness in (1, 2, 1):
        with using_randomness(randomness):
            out = compiled(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
        expected = keep_mask(SEED, (3, 64), dropout_p=0.4, randomness=randomness)
        assert torch.equal(out > 0, expected)
        assert torch.equal(grad > 0, expected)


@EVERY_IMPLEMENTATION
def test_is_gelu_everywhere(backend: str, device: str) -> None:
    """Includes huge inputs, where a kernel's exp or erf might overflow."""
    values = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -50.0, -0.0, 0.0, 50.0, 1e30])))
    x = values.to(device)[None].requires_grad_()
    out = bias_gelu_dropout(x, None, backend=backend)
    exact = values.double()[None].requires_grad_()
    expected = F.gelu(exact)
    (grad,), (expected_grad,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.cpu().double(), expected_grad, rtol=1e-6, atol=1e-6)


@EVERY_IMPLEMENTATION
def test_bias_keeps_its_dtype(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs("plain").items()}
    x, bias = inputs["x"].bfloat16().requires_grad_(), inputs["bias"].requires_grad_()
    out = bias_gelu_dropout(x, bias, backend=backend)
    assert out.dtype == torch.bfloat16
    assert [grad.dtype for grad in torch.autograd.grad(out.sum(), (x, bias))] == [torch.bfloat16, torch.float32]


def test_threads_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((301, 80), (80,))]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = bias_gelu_dropout(*leaves, dropout_p=0.2, seed=SEED)
            results.append([out, *gradients(out, leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_repeats_the_mask() -> None:
    x, bias = (tensor.requires_grad_() for tensor in make_inputs("plain").values())

    def activate(x: Tensor) -> Tensor:
        return bias_gelu_dropout(x, bias, dropout_p=0.3)

    for randomness in (1, 2):
        with using_randomness(randomness):
            torch.manual_seed(3)
            direct = gradients(activate(x), (x, bias))
            torch.manual_seed(3)
            recomputed = gradients(checkpoint(activate, x, use_reentrant=False), (x, bias))
        assert all(torch.equal(a, b) for a, b in zip(direct, recomputed, strict=True))


def test_autocast_stays_outside() -> None:
    inputs = make_inputs("dropout")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run("dropout", inputs)
    assert torch.equal(out, run("dropout", inputs))
