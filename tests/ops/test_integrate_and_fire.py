import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastssl.kernels.integrate_and_fire import reference
from fastssl.kernels.integrate_and_fire.op import fire
from fastssl.ops import integrate_and_fire
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS, compiler_for, implementations, layout_of, randn
from tests.ops.standard import Inputs, Mates, Standard
from tests.scans import Scans

#: Name -> (lengths, C, mean weight, threshold).
CASES = {
    "learned": (LENGTHS["odd"], 24, 0.25, 1.0),
    "one_long": (LENGTHS["one_long"], 19, 0.4, 1.0),
    "several_fires_per_frame": (LENGTHS["odd"], 16, 2.7, 1.0),
    "small_threshold": (LENGTHS["with_empty"], 33, 0.3, 0.37),
    "large_threshold": (LENGTHS["odd"], 7, 0.6, 5.0),
    "one_channel": (LENGTHS["with_empty"], 1, 0.5, 1.0),
    "small": ((6, 0, 11), 3, 0.4, 1.0),
    "small_several_fires": ((7, 4), 3, 2.7, 0.9),
    "never_fires": (LENGTHS["single_frame"], 8, 0.3, 1.0),
    "empty_batch": (LENGTHS["empty_batch"], 8, 0.5, 1.0),
}
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("integrate_and_fire"))


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    lengths, channels, mean, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), channels, generator=generator, dtype=dtype)
    return {"x": x, "weights": 2 * mean * torch.rand(sum(lengths), generator=generator, dtype=dtype)}


def run(case: str, inputs: Inputs, backend: str | None = None) -> Tensor:
    lengths, _, _, threshold = CASES[case]
    layout = layout_of(lengths, inputs["x"].device.type)
    out, layout_out = integrate_and_fire(inputs["x"], inputs["weights"], layout, threshold=threshold, backend=backend)
    assert layout_out.total == len(out)
    assert len(layout_out.lengths) == len(lengths)
    return out


def plain_loop(x: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Process one utterance frame by frame, with the left weight, right weight and extra fires of the authors' code."""
    total = weights.double().cumsum(0)
    fired = math.floor(float(total[-1]) / beta)
    out = x.new_zeros(fired + 1, x.shape[1])
    left_slot = 0
    for t in range(len(x)):
        right_slot = math.floor(float(total[t]) / beta)
        extra = max(right_slot - left_slot - 1, 0)
        right = float(total[t]) - beta * right_slot if right_slot > left_slot else 0.0
        left = float(weights[t]) - right - beta * extra
        out[right_slot] += right * x[t]
        out[left_slot] += left * x[t]
        for slot in range(left_slot + 1, right_slot):
            out[slot] += beta * x[t]
        left_slot = right_slot
    return out[:-1]


def trace(case: str, inputs: Inputs, backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the traceable part of the op: all that follows once the output length, which depends on data, is known."""
    lengths, _, _, threshold = CASES[case]
    x, weights = inputs.values()
    layout = layout_of(lengths, x.device.type)
    out, layout_out = integrate_and_fire(x, weights, layout, threshold=threshold, backend=backend)
    positions = reference.fire_positions(weights, layout, threshold)

    def kernels(x: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        if backend == "reference":
            return reference.integrate_and_fire(x, positions, layout, layout_out, threshold=threshold)
        return fire(x, weights, positions.detach(), layout, layout_out, threshold=threshold)

    assert torch.equal(kernels(x, weights, positions), out)
    return kernels, (x, weights, positions)


def frames(count: int) -> Inputs:
    return {"x": randn(count, 24), "weights": randn(count).abs() * 0.4}


def make_batch(lengths: Sequence[int], threshold: float, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), 20, generator=generator)
    weights = torch.rand(sum(lengths), generator=generator)
    return {"x": x, "weights": weights, "threshold": torch.tensor(threshold, dtype=torch.float64)}


def fire_batch(inputs: Inputs, layout: Layout, backend: str) -> list[Packed]:
    x, weights, threshold = *(inputs[name].requires_grad_() for name in ("x", "weights")), inputs["threshold"].item()
    out, layout_out = integrate_and_fire(x, weights, layout, threshold=threshold, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (x, weights))
    return [Packed(out, layout_out), *(Packed(grad, layout) for grad in grads)]


X, WEIGHTS, FIFTH = torch.randn(20, 4), torch.rand(20), torch.tensor([5])
STANDARD = Standard(
    op="integrate_and_fire",
    cases=CASES,
    make_inputs=make_inputs,
    run=run,
    forward_dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    mates={
        "drawn": Mates(
            make=make_batch,
            call=fire_batch,
            lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
            drawn=(st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 99)),
            shared=("threshold",),
            examples=40,
        )
    },
    good={"x": X, "weights": WEIGHTS, "layout": layout_of((12, 8))},
    bad={
        r"x: expected \(20, C\)": {"x": torch.randn(19, 4)},
        "x: must be floating point": {"x": torch.ones(20, 4, dtype=torch.int64)},
        r"weights: expected \(20,\), got \(20, 1\)": {"weights": WEIGHTS[:, None]},
        "weights: must be floating point": {"weights": torch.ones(20, dtype=torch.int64)},
        "weights and layout: must both be on cpu": {"weights": WEIGHTS.to("meta")},
        "weights: must be finite and not negative": {"weights": WEIGHTS.index_fill(0, FIFTH, -1e-3)},
        "weights: must be finite": {"weights": WEIGHTS.index_fill(0, torch.tensor([19]), math.nan)},
        "must be finite and not negative": {"weights": WEIGHTS.index_fill(0, FIFTH, math.inf)},
        "weights: would fire 1e.15": {"weights": WEIGHTS.index_fill(0, FIFTH, 1e15)},
        "threshold: must be positive": {"threshold": 0.0},
        "backend='warp': not available for integrate_and_fire on cpu .*; available: .*reference": {"backend": "warp"},
    },
    frames=frames,
    call=lambda inputs, layout, backend: integrate_and_fire(inputs["x"], inputs["weights"], layout, backend=backend)[0],
    gradcheck_cases=("small", "small_several_fires", "never_fires"),
    # The step is small because the output length jumps if an utterance's sum crosses a multiple of the threshold.
    gradcheck_step=1e-7,
    compile_cases=("small_threshold",),
    compiler=compiler_for,
    trace=trace,
)


@pytest.mark.parametrize("case", ["learned", "several_fires_per_frame", "small_threshold", "large_threshold"])
@EVERY_IMPLEMENTATION
def test_forward_is_the_published_recurrence(case: str, backend: str, device: str) -> None:
    inputs = make_inputs(case, torch.float64)
    lengths, _, _, threshold = CASES[case]
    parts = zip(inputs["x"].split(lengths), inputs["weights"].split(lengths), strict=True)
    expected = torch.cat([plain_loop(x, weights, threshold) for x, weights in parts if len(x)])
    out = run(case, {name: tensor.to(device) for name, tensor in inputs.items()}, backend)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)


@EVERY_IMPLEMENTATION
def test_each_output_holds_the_threshold_in_weight(backend: str, device: str) -> None:
    lengths = (50, 3, 0, 21)
    layout = layout_of(lengths, device)
    weights = torch.rand(74, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    out, layout_out = integrate_and_fire(weights.new_ones(74, 1), weights, layout, threshold=0.8, backend=backend)
    sums = [float(part.sum()) for part in weights.split(lengths)]
    assert layout_out.lengths == tuple(math.floor(total / 0.8) for total in sums)
    torch.testing.assert_close(out, torch.full_like(out, 0.8))


@EVERY_IMPLEMENTATION
def test_weights_of_one_change_nothing(backend: str, device: str) -> None:
    layout = layout_of((5, 2), device)
    x = torch.randn(7, 3, device=device)
    out, layout_out = integrate_and_fire(x, torch.ones(7, device=device), layout, backend=backend)
    assert layout_out.lengths == (5, 2)
    assert torch.equal(out, x)


@EVERY_IMPLEMENTATION
def test_ties_and_zero_weights(backend: str, device: str) -> None:
    """Check frames that end exactly on a slot's border or have no weight; they get gradients from the later slot."""
    x = torch.arange(1.0, 7, device=device)[:, None].requires_grad_()
    weights = torch.tensor([0.5, 0.5, 0.0, 2.0, 0.0, 0.75], device=device, requires_grad=True)
    out, layout_out = integrate_and_fire(x, weights, layout_of((6,), device), backend=backend)
    assert layout_out.lengths == (3,)
    assert out[:, 0].tolist() == [1.5, 4.0, 4.0]
    grad_x, grad_weights = torch.autograd.grad(
        (out[:, 0] * torch.tensor([1.0, 10, 100], device=device)).sum(), (x, weights)
    )
    assert grad_x[:, 0].tolist() == [0.5, 0.5, 0.0, 110.0, 0.0, 0.0]
    # dL/dS = (x1 - x2, 10 (x2 - x3), 10 (x3 - x4), 0, ...), because S_2 and S_3 lie exactly where slot 1 starts.
    assert grad_weights.tolist() == [-21.0, -20.0, -10.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("lengths", [(9,), (1,), (4, 9)])
def test_the_reference_adds_in_order_on_a_gpu_too(lengths: tuple[int, ...]) -> None:
    layout = layout_of(lengths)
    x, weights = randn(layout.total, 3), randn(layout.total).abs().requires_grad_()
    with Scans() as seen:
        out, _ = integrate_and_fire(x, weights, layout, threshold=0.1, backend="reference")
        out.sum().backward()
    assert seen.scans > 0
    assert seen.unordered == []


def test_several_weights_are_scanned_at_once() -> None:
    layout = layout_of((7, 0, 4))
    weights = randn(11, 2).abs()
    both = reference.running_sums(weights, layout)
    assert torch.equal(both[:, 0], reference.running_sums(weights[:, 0], layout))
    assert torch.equal(both[:, 1], reference.running_sums(weights[:, 1], layout))
    expected = [part.double().cumsum(0) for part in weights.split(layout.lengths)]
    torch.testing.assert_close(both, torch.cat(expected))


@EVERY_IMPLEMENTATION
def test_autocast_stays_outside(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs("learned").items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        out = run("learned", inputs, backend)
    assert torch.equal(out, run("learned", inputs, backend))


@EVERY_IMPLEMENTATION
def test_half_precision_features_with_fp32_weights(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs("learned").items()}
    x, weights = inputs["x"].bfloat16().requires_grad_(), inputs["weights"].requires_grad_()
    out = run("learned", {"x": x, "weights": weights}, backend)
    grad_x, grad_weights = torch.autograd.grad(out.sum(), (x, weights))
    assert (out.dtype, grad_x.dtype, grad_weights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
