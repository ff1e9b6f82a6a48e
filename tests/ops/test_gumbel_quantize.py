from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.kernels.gumbel_quantize import reference
from fastssl.kernels.gumbel_quantize.op import GumbelQuantized
from fastssl.nn.random import gumbel, noise_seeds
from fastssl.ops import gumbel_quantize
from tests.ops.common import LENGTHS, assert_as_good_as, cast, check_against_reference, compiler_for, implementations

#: name -> (M, G, V, E, where the noise comes from)
CASES = {
    "seeds": (sum(LENGTHS["odd"]), 2, 20, 8, "seeds"),
    "noise": (37, 2, 20, 8, "noise"),
    "likeliest": (19, 2, 37, 5, None),
    "base": (21, 2, 320, 128, "seeds"),
    "three_groups": (17, 3, 33, 7, "seeds"),
    "one_code": (5, 2, 1, 4, "seeds"),
    "width_one": (23, 1, 64, 1, "noise"),
    "single_frame": (1, 2, 20, 8, "seeds"),
    "empty_batch": (0, 2, 20, 8, "seeds"),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("gumbel_quantize"))
COMPILED = implementations("gumbel_quantize", compiled_only=True)
TEMPERATURE = 1.7


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    frames, groups, codes, width, source = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "logits": 2 * torch.randn(frames, groups, codes, generator=generator, dtype=dtype),
        "codevectors": torch.rand(groups, codes, width, generator=generator, dtype=dtype),
    }
    if source == "seeds":
        inputs["seeds"] = torch.randint(-(2**63), 2**63 - 1, (frames,), generator=generator)
    if source == "noise":
        inputs["noise"] = -torch.rand(inputs["logits"].shape, generator=generator, dtype=dtype).log().neg().log()
    return inputs


def call(inputs: dict[str, Tensor], backend: str | None = None) -> GumbelQuantized:
    logits, codevectors = inputs["logits"], inputs["codevectors"]
    noise, seeds = inputs.get("noise"), inputs.get("seeds")
    return gumbel_quantize(logits, codevectors, noise=noise, seeds=seeds, temperature=TEMPERATURE, backend=backend)


def differentiable(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs["logits"].requires_grad_(), inputs["codevectors"].requires_grad_()]


def skip_float64_in_triton(backend: str, dtype: torch.dtype = torch.float64) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton multiplies no float64 matrices")


@EVERY_CASE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward(case: str, backend: str, device: str, dtype: torch.dtype) -> None:
    skip_float64_in_triton(backend, dtype)
    inputs = cast(make_inputs(case), dtype, device)
    exact = call(cast(inputs, torch.float64), "reference")
    plain, ours = call(inputs, "reference"), call(inputs, backend)
    assert torch.equal(ours.codes.cpu(), exact.codes)
    assert torch.equal(ours.counts.cpu(), exact.counts)
    vectors = inputs["codevectors"]
    chosen = torch.stack([vectors[g, ours.codes[:, g]] for g in range(len(vectors))], 1).flatten(1)
    assert torch.equal(ours.values, chosen)  # to the last bit, so that equal codes give equal vectors
    assert ours.probability_sums.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_good_as(ours.probability_sums.cpu(), plain.probability_sums.cpu(), exact.probability_sums, "sums")


@EVERY_CASE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", ["values", "probability_sums"])
def test_backward(case: str, backend: str, device: str, dtype: torch.dtype, output: str) -> None:
    inputs = make_inputs(case)
    constant = {name: inputs.pop(name) for name in ("noise", "seeds") if name in inputs}

    def run(tensors: dict[str, Tensor], name: str) -> Tensor:
        outputs = call(tensors | {key: x.to(tensors["logits"].device) for key, x in constant.items()}, name)
        # Both gradients together, so that each is seen to be added to the other.
        return outputs.values if output == "values" else outputs.probability_sums + 0 * outputs.values.sum()

    check_against_reference(run, inputs, backend=backend, device=device, dtype=dtype, backward=True)


@pytest.mark.parametrize("case", ["three_groups", "likeliest"])
@EVERY_IMPLEMENTATION
def test_gradcheck(case: str, backend: str, device: str) -> None:
    """Numeric gradients, of the softmax that stands in for the choice where the choice itself has none."""
    skip_float64_in_triton(backend)
    if device == "cuda":
        pytest.skip("gradcheck runs on the reference and the CPU")
    inputs = make_inputs(case, torch.float64)
    inputs = {name: x[:4] if name != "codevectors" else x for name, x in inputs.items()}
    logits, codevectors = differentiable(inputs)
    noise = torch.zeros(()).double()
    if "seeds" in inputs:
        seeds, (_, groups, codes) = inputs.pop("seeds"), logits.shape
        noise = inputs["noise"] = reference.gumbel_noise(seeds, groups, codes, torch.float64)

    def probability_sums(logits: Tensor) -> Tensor:
        return call(inputs | {"logits": logits}, backend).probability_sums

    def values(codevectors: Tensor) -> Tensor:
        return call(inputs | {"codevectors": codevectors}, backend).values

    def soft_values(logits: Tensor) -> Tensor:
        soft = F.softmax((logits + noise) / TEMPERATURE, -1)
        return torch.einsum("mgv,gve->mge", soft, codevectors.detach()).flatten(1)

    assert torch.autograd.gradcheck(probability_sums, (logits,))
    assert torch.autograd.gradcheck(values, (codevectors,))
    assert torch.autograd.gradcheck(soft_values, (logits,))
    grad = torch.randn_like(values(codevectors))
    (found,) = torch.autograd.grad(values(codevectors), logits, grad)
    (expected,) = torch.autograd.grad(soft_values(logits), logits, grad)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["seeds", "noise", "empty_batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_opcheck(case: str, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in make_inputs(case).items()}
    ops = getattr(torch.ops, f"fastssl_{backend}")
    noise = inputs["noise"].float() if "noise" in inputs else None
    shared = (inputs["logits"], inputs["codevectors"], noise, inputs.get("seeds"))
    torch.library.opcheck(ops.gumbel_quantize_fwd.default, shared)
    values, codes, sums, _ = ops.gumbel_quantize_fwd(*shared)
    torch.library.opcheck(ops.gumbel_quantize_bwd.default, (values, sums, *shared, codes, TEMPERATURE))


@EVERY_IMPLEMENTATION
def test_compile(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs("seeds").items()}
    leaves = differentiable(inputs)
    compiled = torch.compile(
        lambda tensors: call(tensors, backend), fullgraph=True, dynamic=True, backend=compiler_for(backend)
    )(inputs)
    eager = call(inputs, backend)
    for found, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(outputs.values.square().sum() + outputs.probability_sums.square().sum(), leaves)
        for outputs in (compiled, eager)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@EVERY_IMPLEMENTATION
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    codes=st.sampled_from([3, 32, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_batch_mates_do_not_matter(
    backend: str, device: str, lengths: list[int], codes: int, dtype: torch.dtype
) -> None:
    lengths = lengths[:2] if backend == "triton" and device == "cpu" else lengths  # its interpreter is slow
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    logits = torch.randn(total, 2, codes, generator=generator).to(device, dtype).requires_grad_()
    codevectors = torch.rand(2, codes, 6, generator=generator).to(device, dtype)
    seeds = torch.randint(2**62, (total,), generator=generator).to(device)
    together = gumbel_quantize(logits, codevectors, seeds=seeds, backend=backend)
    (grad,) = torch.autograd.grad(together.values.square().sum() + together.probability_sums.sum(), logits)
    parts = zip(*(x.split(lengths) for x in (logits, seeds, together.values, together.codes, grad)), strict=True)
    for logits_part, seeds_part, values, chosen, grad_part in parts:
        own = logits_part.detach().clone().requires_grad_()
        alone = gumbel_quantize(own, codevectors, seeds=seeds_part, backend=backend)
        (own_grad,) = torch.autograd.grad(alone.values.square().sum() + alone.probability_sums.sum(), own)
        assert torch.equal(alone.codes, chosen)
        assert torch.equal(alone.values, values)
        if backend == "native" and device == "cpu":  # the others leave the gradient's product to a library
            assert torch.equal(own_grad, grad_part)
        else:
            torch.testing.assert_close(own_grad, grad_part, rtol=1e-3, atol=1e-5)


@EVERY_IMPLEMENTATION
def test_noise_is_a_function_of_key_position_and_code(backend: str, device: str) -> None:
    """Noise read off the gradient: for two vectors, 1 and 0, it is a logistic function of the logits' difference."""
    frames, groups, codes = 50, 2, 16
    keys, positions = torch.arange(frames) % 7 - 3, torch.arange(frames) * 31
    seeds = noise_seeds(keys, positions * groups * codes, stream=3)
    counters = positions.unsqueeze(1) * groups * codes + torch.arange(groups * codes)
    expected = gumbel(keys.unsqueeze(1), counters, stream=3).unflatten(1, (groups, codes))
    assert torch.equal(reference.gumbel_noise(seeds, groups, codes), expected)
    # One vector is 1 and all others 0: the gradient of logit v is p_v (1 - p_v) for it and -p_v p_1 for the others.
    logits = torch.zeros(frames, groups, codes, device=device).requires_grad_()
    codevectors = torch.zeros(groups, codes, 1, device=device)
    codevectors[:, 0] = 1
    values = gumbel_quantize(logits, codevectors, seeds=seeds.to(device), backend=backend).values
    (grad,) = torch.autograd.grad(values.sum(), logits)
    found = (-grad[..., 1:]).log() - (-grad[..., 1:2]).log()
    torch.testing.assert_close(found.cpu(), expected[..., 1:] - expected[..., 1:2], rtol=1e-5, atol=2e-5)


@EVERY_IMPLEMENTATION
def test_float64_is_float64_throughout(backend: str, device: str) -> None:
    skip_float64_in_triton(backend)
    inputs = {name: x.to(device) for name, x in make_inputs("three_groups", torch.float64).items()}
    assert "seeds" in inputs
    grads = []
    for implementation in (backend, "reference"):
        logits, codevectors = differentiable(inputs)
        output = call(inputs | {"logits": logits, "codevectors": codevectors}, implementation)
        loss = output.values.square().sum() + output.probability_sums.square().sum()
        grads.append(torch.autograd.grad(loss, (logits, codevectors)))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@EVERY_IMPLEMENTATION
def test_rare_noise_is_as_exact_as_the_rest(backend: str, device: str) -> None:
    """Near u = 1 the inner logarithm is tiny: one that is only absolutely exact would spoil the largest noise."""
    seeds = torch.arange(3000, device=device) if backend != "triton" else torch.arange(300, device=device)
    noise = reference.gumbel_noise(seeds.cpu(), 1, 32).to(device)
    assert noise.max() > 8
    logits = torch.zeros(noise.shape, device=device)
    codevectors = torch.zeros(1, 32, 1, device=device)
    drawn = gumbel_quantize(logits, codevectors, seeds=seeds, backend=backend)
    given = gumbel_quantize(logits, codevectors, noise=noise, backend="reference")
    top = noise[:, 0].topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(drawn.codes[clear], given.codes[clear])


@EVERY_IMPLEMENTATION
def test_ties_go_to_the_first(backend: str, device: str) -> None:
    logits = torch.zeros(40, 1, 40, device=device)
    logits[torch.arange(40), 0, torch.arange(40)] = 1
    logits[torch.arange(40), 0, (torch.arange(40) * 7 + 3) % 40] = 1
    codes = gumbel_quantize(logits, torch.rand(1, 40, 2, device=device), backend=backend).codes
    assert codes[:, 0].tolist() == [min(i, (i * 7 + 3) % 40) for i in range(40)]


@EVERY_IMPLEMENTATION
def test_half_precision_logits_with_fp32_codevectors(backend: str, device: str) -> None:
    inputs = {name: x.to(device) for name, x in make_inputs("seeds").items()}
    inputs["logits"] = inputs["logits"].bfloat16()
    leaves = differentiable(inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = call(inputs, backend)
    assert found.values.dtype == torch.float32
    grads = torch.autograd.grad(found.values.square().sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
    expected = torch.autograd.grad(call(inputs, "reference").values.square().sum(), leaves)
    for grad, expected_grad in zip(grads, expected, strict=True):
        scale = expected_grad.abs().max().item()
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0.01 * scale)


def test_rejects_bad_input() -> None:
    logits, codevectors = torch.randn(7, 2, 5), torch.rand(2, 5, 3)
    changes: dict[str, dict[str, Any]] = {
        r"logits: expected \(M, G, V\) floating, got \(7, 10\)": {"logits": logits.flatten(1)},
        r"logits: .* got \(7, 2, 0\)": {"logits": logits[..., :0]},
        r"logits: .* torch.int64": {"logits": logits.long()},
        r"codevectors: expected \(2, 5, E\) .* got \(2, 4, 3\)": {"codevectors": codevectors[:, 1:]},
        r"codevectors: .* torch.int64": {"codevectors": codevectors.long()},
        r"codevectors: on meta": {"codevectors": codevectors.to("meta")},
        r"noise: expected \(7, 2, 5\)": {"noise": logits.flatten(1)},
        r"seeds: expected \(7,\) torch.int64, got .* torch.int32": {"seeds": torch.zeros(7, dtype=torch.int32)},
        r"seeds: expected \(7,\)": {"seeds": torch.zeros(6, dtype=torch.int64)},
        "noise and seeds: at most one": {"noise": logits, "seeds": torch.zeros(7, dtype=torch.int64)},
        "temperature: must be above 0": {"temperature": 0.0},
        "backend='warp': not available for gumbel_quantize on cpu": {"backend": "warp"},
    }
    for message, change in changes.items():
        call: dict[str, Any] = {"logits": logits, "codevectors": codevectors, **change}
        with pytest.raises(ValueError, match=message):
            gumbel_quantize(call.pop("logits"), call.pop("codevectors"), **call)
