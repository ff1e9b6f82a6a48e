from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastssl.kernels.philox import keep_mask
from fastssl.ops import dropout_add_layer_norm
from tests.ops.common import LENGTHS, check_against_reference, gradients, implementations

SEED = torch.tensor(-4242424242424242)

#: name -> (N, D, options); a width that 4 does not divide has rows that begin within a Philox block
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
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("dropout_add_layer_norm"))
COMPILED = implementations("dropout_add_layer_norm", compiled_only=True)
#: Triton computes in fp32.
IN_DOUBLE = pytest.mark.parametrize(
    ("backend", "device"),
    [case for case in implementations("dropout_add_layer_norm") if case.values[0] != "triton"],
)


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rows, width, options = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = {"x": normal(rows, width), "residual": 3 + normal(rows, width)}
    inputs |= {"weight": 1 + 0.3 * normal(width), "bias": normal(width)}
    return inputs | ({"seed": SEED} if "dropout_p" in options else {})


def run(case: str, inputs: dict[str, Tensor], backend: str | None = None) -> Tensor:
    """The output, with `prenorm` the sum below it."""
    out = dropout_add_layer_norm(**inputs, **CASES[case][2], backend=backend)  # type: ignore[call-overload]
    return torch.cat(out) if isinstance(out, tuple) else out


@EVERY_CASE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(case: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_against_reference(
        lambda inputs, name: run(case, inputs, name),
        make_inputs(case),
        backend=backend,
        device=device,
        dtype=dtype,
        backward=False,
    )


@EVERY_CASE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward(case: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_against_reference(
        lambda inputs, name: run(case, inputs, name),
        make_inputs(case),
        backend=backend,
        device=device,
        dtype=dtype,
        backward=True,
    )


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@IN_DOUBLE
def test_gradcheck(prenorm: bool, dropout_p: float, backend: str, device: str) -> None:
    if device == "cuda":
        pytest.skip("gradcheck runs on the reference and the CPU")
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (5, 6), (6,), (6,))
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return dropout_add_layer_norm(  # type: ignore[call-overload]
            x,
            residual,
            weight=weight,
            bias=bias,
            dropout_p=dropout_p,
            seed=SEED if dropout_p else None,
            prenorm=prenorm,
            backend=backend,
        )

    assert torch.autograd.gradcheck(norm, inputs)


@EVERY_CASE
@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_opcheck(case: str, backend: str, device: str) -> None:
    options = CASES[case][2]
    inputs = {name: tensor.to(device) for name, tensor in make_inputs(case).items()}
    x, residual, weight, bias = (inputs[name] for name in ("x", "residual", "weight", "bias"))
    prenorm, dropout_p = options.get("prenorm", False), options.get("dropout_p", 0.0)
    mask = (dropout_p, inputs.get("seed"), options.get("offset", 0))
    ops = getattr(torch.ops, f"fastssl_{backend}")
    arguments = (x, residual, weight, bias, 1e-5, *mask, prenorm)
    torch.library.opcheck(ops.dropout_add_layer_norm_fwd.default, arguments)
    _, total, mean, rstd = ops.dropout_add_layer_norm_fwd(*arguments)
    saved = (x, total, None) if prenorm else (None, x, residual)
    torch.library.opcheck(ops.dropout_add_layer_norm_bwd.default, (x, *saved, weight, mean, rstd, *mask))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("case", ["dropout", "prenorm_dropout"])
def test_compile(case: str, backend: str, device: str) -> None:
    inputs = {name: x.to(device) for name, x in make_inputs(case).items()}
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    compiled = torch.compile(lambda x: run(case, x, backend), fullgraph=True, dynamic=True, backend="aot_eager")
    out, eager = compiled(inputs), run(case, inputs, backend)
    torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-5)
    leaves = [x for x in inputs.values() if x.requires_grad]
    torch.testing.assert_close(gradients(out, leaves), gradients(eager, leaves), rtol=1e-4, atol=1e-4)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("lengths", [LENGTHS["one_long"], (33, 0, 70)])
def test_batch_mates_do_not_matter(backend: str, device: str, lengths: tuple[int, ...]) -> None:
    """Without dropout, whose mask belongs to places in the packed tensor."""
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = (torch.randn(sum(lengths), 83, generator=generator).to(device) for _ in range(3))
    weight, bias = (torch.randn(83, generator=generator).to(device) for _ in range(2))

    def outputs(x: Tensor, residual: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = x.detach().requires_grad_(), residual.detach().requires_grad_()
        out, total = dropout_add_layer_norm(*leaves, weight=weight, bias=bias, prenorm=True, backend=backend)
        return [out, total, *torch.autograd.grad((out, total), leaves, (grad, grad))]

    together = outputs(x, residual, grad)
    for index in range(len(lengths)):
        parts = [tensor.split(lengths)[index] for tensor in (x, residual, grad)]
        for in_batch, alone in zip(together, outputs(*parts), strict=True):
            assert torch.equal(in_batch.split(lengths)[index], alone)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("width", [64, 67])
def test_drops_what_the_specification_says(backend: str, device: str, width: int) -> None:
    x, zeros = torch.ones(9, width, device=device), torch.zeros(9, width, device=device)
    seed = SEED.to(device)
    for offset in (0, 3, 2**32 - 2, 2**40):
        _, total = dropout_add_layer_norm(
            x,
            zeros,
            weight=zeros[0],
            bias=zeros[0],
            dropout_p=0.4,
            seed=seed,
            offset=offset,
            prenorm=True,
            backend=backend,
        )
        expected = keep_mask(seed, (9, width), dropout_p=0.4, offset=offset) / 0.6
        torch.testing.assert_close(total, expected)


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


def test_rejects_bad_input() -> None:
    x, parameter = torch.randn(20, 8), torch.randn(8)
    good: dict[str, Any] = {"x": x, "residual": x, "weight": parameter, "bias": parameter}
    changes: dict[str, dict[str, Any]] = {
        r"x: expected \(N, D\), got \(20,\)": {"x": x[:, 0]},
        "x: must be floating point": {"x": x.long()},
        r"residual: expected \(20, 8\) .*got \(19, 8\)": {"residual": x[1:]},
        "residual: expected .* got .* torch.float64": {"residual": x.double()},
        "residual: is on meta": {"residual": x.to("meta")},
        r"weight: expected \(8,\)": {"weight": parameter[1:]},
        r"bias: expected \(8,\)": {"bias": x},
        "dropout_p: must be": {"dropout_p": 1.0},
        "offset: must not be negative": {"dropout_p": 0.1, "offset": -1},
        r"seed: expected \(\) torch.int64": {"dropout_p": 0.1, "seed": torch.tensor([1])},
        "backend='warp': not available for dropout_add_layer_norm on cpu": {"backend": "warp"},
    }
    if "triton" in [case.values[0] for case in COMPILED]:
        changes["backend='triton': .*computes in float32.*available: .*reference"] = {
            "backend": "triton",
            "x": x.double(),
            "residual": x.double(),
        }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            dropout_add_layer_norm(**(good | change))
