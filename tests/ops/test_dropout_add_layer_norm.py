from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastssl.kernels.dispatch import BACKENDS
from fastssl.kernels.philox import keep_mask
from fastssl.kernels.randomness import kept_fraction
from fastssl.ops import dropout_add_layer_norm
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS, gradients, implementations, normal, randn
from tests.ops.standard import Inputs, Mates, Standard

SEED = torch.tensor(-4242424242424242)

#: Name -> (N, D, options). If D is not a multiple of 8, rows start in the middle of a Philox block.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (sum(LENGTHS["odd"]), 96, {}),
    "dropout": (37, 96, {"dropout_p": 0.3}),
    "odd_width": (19, 67, {"dropout_p": 0.3, "offset": 5}),
    "prenorm": (37, 64, {"prenorm": True}),
    "prenorm_dropout": (37, 70, {"prenorm": True, "dropout_p": 0.3, "offset": 2**32 - 30}),
    "one_channel": (3, 1, {"dropout_p": 0.3}),
    "single_frame": (1, 192, {"dropout_p": 0.1, "eps": 1e-3}),
    "empty_batch": (0, 16, {"dropout_p": 0.3, "prenorm": True}),
}
SMALL: dict[str, tuple[int, int, dict[str, Any]]] = {
    f"small, {prenorm=}, {dropout_p=}": (5, 6, {"prenorm": prenorm} | ({"dropout_p": dropout_p} if dropout_p else {}))
    for prenorm in (False, True)
    for dropout_p in (0.0, 0.4)
}
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("dropout_add_layer_norm"))


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    rows, width, options = (CASES | SMALL)[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = {"x": normal(rows, width), "residual": 3 + normal(rows, width)}
    inputs |= {"weight": 1 + 0.3 * normal(width), "bias": normal(width)}
    return inputs | ({"seed": SEED} if "dropout_p" in options else {})


def run(case: str, inputs: Inputs, backend: str | None = None) -> Tensor:
    """Run a case; with `prenorm`, the sum before the norm is appended to the output."""
    out = dropout_add_layer_norm(**inputs, **(CASES | SMALL)[case][2], backend=backend)  # type: ignore[call-overload]
    return torch.cat(out) if isinstance(out, tuple) else out


def call(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    return dropout_add_layer_norm(**inputs, dropout_p=0.1, backend=backend)  # type: ignore[call-overload,no-any-return]


def frames(count: int) -> Inputs:
    x, parameter = randn(count, 24), randn(24)
    return {"x": x, "residual": x + 1, "weight": parameter, "bias": parameter + 1, "seed": torch.tensor(3)}


def make_batch(lengths: tuple[int, ...]) -> Inputs:
    packed = (sum(lengths), 83)
    return normal(x=packed, residual=packed, grad=packed, weight=(83,), bias=(83,))


def without_dropout(inputs: Inputs, layout: Layout, backend: str) -> list[Packed]:
    """Run without dropout, whose mask depends on the place in the packed tensor and so on batch mates."""
    x, residual, grad, weight, bias = inputs.values()
    leaves = x.requires_grad_(), residual.requires_grad_()
    outs = dropout_add_layer_norm(*leaves, weight=weight, bias=bias, prenorm=True, backend=backend)
    grads = torch.autograd.grad(outs, leaves, (grad, grad))
    return [Packed(tensor, layout) for tensor in (*outs, *grads)]


X, PARAMETER = torch.randn(20, 8), torch.randn(8)
BAD: dict[str, dict[str, Any]] = {
    r"x: expected \(N, D\), got \(20,\)": {"x": X[:, 0]},
    "x: must be floating point": {"x": X.long()},
    r"residual: expected \(20, 8\) .*got \(19, 8\)": {"residual": X[1:]},
    "residual: expected .* got .* torch.float64": {"residual": X.double()},
    "residual: expected .* got .* torch.bfloat16": {"residual": X.bfloat16()},
    "residual: expected .* got .* torch.float16": {"x": X.bfloat16(), "residual": X.half()},
    "residual: is on meta": {"residual": X.to("meta")},
    r"weight: expected \(8,\)": {"weight": PARAMETER[1:]},
    r"bias: expected \(8,\)": {"bias": X},
    "dropout_p: must be": {"dropout_p": 1.0},
    "randomness: must be from 1 to 2, got 3": {"randomness": 3},
    "offset: must not be negative": {"dropout_p": 0.1, "offset": -1},
    r"seed: expected \(\) torch.int64": {"dropout_p": 0.1, "seed": torch.tensor([1])},
    "backend='warp': not available for dropout_add_layer_norm on cpu": {"backend": "warp"},
}
if "triton" in BACKENDS["dropout_add_layer_norm"]["cpu"]:
    double = {"x": X.double(), "residual": X.double()}
    BAD["backend='triton': .*compute in float32.*available: .*reference"] = {"backend": "triton"} | double

STANDARD = Standard(
    op="dropout_add_layer_norm",
    cases=CASES,
    make_inputs=make_inputs,
    run=run,
    mates={
        name: Mates(
            make=make_batch,
            call=without_dropout,
            lengths=st.just(lengths),
            shared=("weight", "bias"),
            same_bits=lambda backend, device: True,
        )
        for name, lengths in {"one_long": LENGTHS["one_long"], "33_0_70": (33, 0, 70)}.items()
    },
    good={"x": X, "residual": X, "weight": PARAMETER, "bias": PARAMETER},
    bad=BAD,
    frames=frames,
    call=call,
    gradcheck_cases=SMALL,
    compile_cases=("dropout", "prenorm_dropout"),
)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("randomness", [1, 2])
@pytest.mark.parametrize("width", [64, 60, 67])
def test_drops_what_the_specification_says(backend: str, device: str, width: int, randomness: int) -> None:
    x, zeros = torch.ones(9, width, device=device).requires_grad_(), torch.zeros(9, width, device=device)
    seed = SEED.to(device)
    for offset in (0, 3, 2**32 - 2, 2**40):
        options: dict[str, Any] = {"dropout_p": 0.4, "offset": offset, "randomness": randomness}
        _, total = dropout_add_layer_norm(
            x,
            zeros,
            weight=zeros[0],
            bias=zeros[0],
            seed=seed,
            prenorm=True,
            backend=backend,
            **options,
        )
        expected = keep_mask(seed, (9, width), **options) / kept_fraction(0.4, randomness)
        torch.testing.assert_close(total, expected)
        (grad,) = torch.autograd.grad(total.sum(), x)
        torch.testing.assert_close(grad, expected)


def test_is_layer_norm_of_the_sum() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs("plain").items()}
    x, residual, weight, bias = inputs.values()
    expected = F.layer_norm(residual + x, (96,), weight, bias)
    out = run("plain", inputs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    leaves = list(inputs.values())
    torch.testing.assert_close(gradients(out, leaves), gradients(expected, leaves), rtol=1e-4, atol=1e-4)


@EVERY_IMPLEMENTATION
def test_parameters_keep_their_dtype(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs("plain").items()}
    inputs |= {"x": inputs["x"].bfloat16(), "residual": inputs["residual"].bfloat16()}
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = run("plain", inputs, backend)
    assert out.dtype == torch.bfloat16
    dtypes = [grad.dtype for grad in torch.autograd.grad(out.sum(), list(inputs.values()))]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("case", ["plain", "dropout", "prenorm", "prenorm_dropout"])
def test_a_residual_in_fp32_is_not_rounded(backend: str, device: str, case: str) -> None:
    """The output and the sum are in fp32, the gradient of the branch in its own dtype."""
    inputs = {name: tensor.to(device) for name, tensor in make_inputs(case).items()}
    inputs["x"] = inputs["x"].bfloat16()
    if backend == "native":
        with pytest.raises(ValueError, match="x and residual in the same dtype"):
            run(case, inputs, backend)
        return
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    names = ["x", "residual", "weight", "bias"]
    found, expected = (
        [out, *gradients(out, [tensors[name] for name in names])]
        for tensors, chosen in ((inputs, backend), (exact, "reference"))
        for out in [run(case, {n: x.requires_grad_(x.is_floating_point()) for n, x in tensors.items()}, chosen)]
    )
    narrow, wide = torch.bfloat16, torch.float32
    assert [x.dtype for x in found] == [wide, narrow, wide, wide, wide]
    for x, y in zip(found, expected, strict=True):
        tolerance = 1e-2 if x.dtype == narrow else 1e-4
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_threads_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((301, 80), (301, 80), (80,), (80,))
    ]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            x, residual, weight, bias = leaves
            out = dropout_add_layer_norm(x, residual, weight=weight, bias=bias, dropout_p=0.2, seed=SEED)
            results.append([out, *gradients(out, leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_repeats_the_mask() -> None:
    inputs = make_inputs("plain")
    x, residual = inputs["x"].requires_grad_(), inputs["residual"].requires_grad_()

    def norm(x: Tensor) -> Tensor:
        return dropout_add_layer_norm(x, residual, weight=inputs["weight"], bias=inputs["bias"], dropout_p=0.3)

    torch.manual_seed(3)
    direct = gradients(norm(x), (x, residual))
    torch.manual_seed(3)
    recomputed = gradients(checkpoint(norm, x, use_reentrant=False), (x, residual))
    assert all(torch.equal(a, b) for a, b in zip(direct, recomputed, strict=True))


def test_autocast_reaches_the_arguments_and_not_the_op() -> None:
    inputs = make_inputs("dropout")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run("dropout", inputs)
    assert out.dtype == torch.bfloat16
    rounded = {name: inputs[name].bfloat16() for name in ("x", "residual")}
    assert torch.equal(out, run("dropout", inputs | rounded))
