from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastssl.kernels.philox import keep_mask
from fastssl.ops import bias_gelu_dropout
from tests.ops.common import LENGTHS, check_against_reference, gradients, implementations

SEED = torch.tensor(-4242424242424242)

#: name -> (N, D, with bias, options); a width that 4 does not divide has rows that begin within a Philox block
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
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("bias_gelu_dropout"))
COMPILED = implementations("bias_gelu_dropout", compiled_only=True)
#: Triton computes in fp32.
IN_DOUBLE = pytest.mark.parametrize(
    ("backend", "device"), [case for case in implementations("bias_gelu_dropout") if case.values[0] != "triton"]
)


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rows, width, with_bias, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": 2 * torch.randn(rows, width, generator=generator, dtype=dtype)}
    if with_bias:
        inputs["bias"] = torch.randn(width, generator=generator, dtype=dtype)
    return inputs | ({"seed": SEED} if "dropout_p" in options else {})


def run(case: str, inputs: dict[str, Tensor], backend: str | None = None) -> Tensor:
    return bias_gelu_dropout(
        inputs["x"], inputs.get("bias"), **CASES[case][3], seed=inputs.get("seed"), backend=backend
    )


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


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@IN_DOUBLE
def test_gradcheck(with_bias: bool, dropout_p: float, backend: str, device: str) -> None:
    if device == "cuda":
        pytest.skip("gradcheck runs on the reference and the CPU")
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(5, 6), (6,)] if with_bias else [(5, 6)]
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    seed = SEED if dropout_p else None

    def activate(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return bias_gelu_dropout(x, bias, dropout_p=dropout_p, seed=seed, backend=backend)

    assert torch.autograd.gradcheck(activate, inputs)


@EVERY_CASE
@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_opcheck(case: str, backend: str, device: str) -> None:
    options = CASES[case][3]
    inputs = {name: tensor.to(device) for name, tensor in make_inputs(case).items()}
    mask = (options.get("dropout_p", 0.0), inputs.get("seed"), options.get("offset", 0))
    ops = getattr(torch.ops, f"fastssl_{backend}")
    x, bias = inputs["x"], inputs.get("bias")
    torch.library.opcheck(ops.bias_gelu_dropout_fwd.default, (x, bias, *mask))
    torch.library.opcheck(ops.bias_gelu_dropout_bwd.default, (x, x, bias, *mask))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("case", ["dropout", "no_bias"])
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
    x, grad = (torch.randn(sum(lengths), 83, generator=generator).to(device) for _ in range(2))
    bias = torch.randn(83, generator=generator).to(device)

    def outputs(x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = bias_gelu_dropout(leaf, bias, backend=backend)
        return [out, *torch.autograd.grad(out, leaf, grad)]

    together = outputs(x, grad)
    for index in range(len(lengths)):
        parts = [tensor.split(lengths)[index] for tensor in (x, grad)]
        for in_batch, alone in zip(together, outputs(*parts), strict=True):
            assert torch.equal(in_batch.split(lengths)[index], alone)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("width", [64, 67])
def test_drops_what_the_specification_says(backend: str, device: str, width: int) -> None:
    x, seed = torch.full((9, width), 20.0, device=device), SEED.to(device)  # GELU(20) is 20
    for offset in (0, 3, 2**32 - 2, 2**40):
        out = bias_gelu_dropout(x, None, dropout_p=0.4, seed=seed, offset=offset, backend=backend)
        torch.testing.assert_close(out, 20 * keep_mask(seed, (9, width), dropout_p=0.4, offset=offset) / 0.6)


@EVERY_IMPLEMENTATION
def test_is_gelu_everywhere(backend: str, device: str) -> None:
    """Far out too, where a kernel's exp or erf might overflow."""
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


def test_rejects_bad_input() -> None:
    x, bias = torch.randn(20, 8), torch.randn(8)
    changes: dict[str, dict[str, Any]] = {
        r"x: expected \(N, D\), got \(20,\)": {"x": x[:, 0]},
        "x: must be floating point": {"x": x.long()},
        r"bias: expected \(8,\), got \(7,\)": {"bias": bias[1:]},
        "bias: is on meta": {"bias": bias.to("meta")},
        "dropout_p: must be": {"dropout_p": -0.1},
        "offset: must not be negative": {"dropout_p": 0.1, "offset": -1},
        "seed: expected .* torch.int32": {"dropout_p": 0.1, "seed": torch.tensor(1, dtype=torch.int32)},
        "backend='warp': not available for bias_gelu_dropout on cpu": {"backend": "warp"},
    }
    if "triton" in [case.values[0] for case in COMPILED]:
        changes["backend='triton': .*computes in float32.*available: .*reference"] = {
            "backend": "triton",
            "x": x.double(),
        }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            bias_gelu_dropout(**({"x": x, "bias": bias} | change))
