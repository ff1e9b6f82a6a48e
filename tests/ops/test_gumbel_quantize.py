from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fastssl.kernels.gumbel_quantize import reference
from fastssl.kernels.gumbel_quantize.op import GumbelQuantized
from fastssl.nn.random import gumbel, noise_seeds
from fastssl.ops import gumbel_quantize
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS, compiler_for, implementations, randn
from tests.ops.standard import Inputs, Mates, Standard

#: Name -> (M, G, V, E, argument that gives the noise or None).
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
#: Small cases for gradcheck, which perturbs every number of the inputs.
SMALL = {"small, three_groups": (3, 3, 9, 2, "seeds"), "small, likeliest": (3, 2, 11, 3, None)}
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("gumbel_quantize"))
TEMPERATURE = 1.7


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    frames, groups, codes, width, source = (CASES | SMALL)[case]
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


def call(inputs: Inputs, backend: str | None = None) -> GumbelQuantized:
    logits, codevectors = inputs["logits"], inputs["codevectors"]
    noise, seeds = inputs.get("noise"), inputs.get("seeds")
    return gumbel_quantize(logits, codevectors, noise=noise, seeds=seeds, temperature=TEMPERATURE, backend=backend)


def differentiable(inputs: Inputs) -> list[Tensor]:
    return [inputs["logits"].requires_grad_(), inputs["codevectors"].requires_grad_()]


def skip_float64_in_triton(backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton cannot multiply float64 matrices")


def values(case: str, inputs: Inputs, backend: str | None) -> Tensor:
    """Return the op's values, after checking that they are the chosen code vectors bit for bit."""
    found, vectors = call(inputs, backend), inputs["codevectors"]
    chosen = torch.stack([vectors[g, found.codes[:, g]] for g in range(len(vectors))], 1).flatten(1)
    assert torch.equal(found.values, chosen)
    return found.values


def probability_sums(case: str, inputs: Inputs, backend: str | None) -> Tensor:
    found = call(inputs, backend)
    assert found.probability_sums.dtype == torch.promote_types(inputs["logits"].dtype, torch.float32)
    # Include the values, so that the test notices if either output's gradient overwrites the other's.
    return found.probability_sums + 0 * found.values.sum()


def codes_and_counts(case: str, inputs: Inputs, backend: str | None) -> Tensor:
    values(case, inputs, backend)
    found = call(inputs, backend)
    return torch.cat([found.codes.flatten(), found.counts.flatten()])


def smooth(case: str, inputs: Inputs, backend: str | None) -> Tensor:
    """Return both outputs; for the values, which jump with the logits, hold the logits fixed."""
    logits = make_inputs(case, torch.float64)["logits"]
    return torch.cat(
        [call(inputs, backend).probability_sums.flatten(), values(case, inputs | {"logits": logits}, backend).flatten()]
    )


def trace(case: str, inputs: Inputs, backend: str) -> tuple[Callable[..., Tensor], tuple[Inputs]]:
    def everything(tensors: Inputs) -> Tensor:
        return torch.cat([output.flatten() for output in call(tensors, backend)])

    return everything, (inputs,)


def frames(count: int) -> Inputs:
    return {"logits": randn(count, 2, 12), "codevectors": randn(2, 12, 8), "seeds": torch.arange(count) * 7919}


def make_batch(lengths: Sequence[int], codes: int, dtype: torch.dtype) -> Inputs:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    return {
        "logits": torch.randn(total, 2, codes, generator=generator).to(dtype),
        "codevectors": torch.rand(2, codes, 6, generator=generator).to(dtype),
        "seeds": torch.randint(2**62, (total,), generator=generator),
    }


def codes_of_batch(inputs: Inputs, layout: Layout, backend: str) -> list[Packed]:
    found = call(inputs, backend)
    return [Packed(found.codes, layout), Packed(values("", inputs, backend).detach().view(torch.int8), layout)]


def gradient_of_batch(inputs: Inputs, layout: Layout, backend: str) -> list[Packed]:
    inputs["logits"].requires_grad_()
    found = call(inputs, backend)
    loss = found.values.square().sum() + found.probability_sums.sum()
    return [Packed(torch.autograd.grad(loss, inputs["logits"])[0], layout), *codes_of_batch(inputs, layout, backend)]


LOGITS, CODEVECTORS = torch.randn(7, 2, 5), torch.rand(2, 5, 3)
STANDARD = Standard(
    op="gumbel_quantize",
    cases=CASES,
    make_inputs=make_inputs,
    run=probability_sums,
    outputs={"values": values, "probability_sums": probability_sums},
    constants=("noise",),
    exact=codes_and_counts,
    forward_dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    mates={
        "drawn": Mates(
            make=make_batch,
            call=gradient_of_batch,
            lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
            drawn=(st.sampled_from([3, 32, 70]), st.sampled_from([torch.float32, torch.bfloat16])),
            shared=("codevectors",),
            examples=10,
            shorten=lambda lengths: lengths[:2],
            # The other implementations leave a product in the gradient to a library.
            same_bits=lambda backend, device: (backend, device) == ("native", "cpu"),
            tolerance=(1e-3, 1e-5),
        )
    },
    good={"logits": LOGITS, "codevectors": CODEVECTORS},
    bad={
        r"logits: expected \(M, G, V\) floating point, got \(7, 10\)": {"logits": LOGITS.flatten(1)},
        r"logits: .* got \(7, 2, 0\)": {"logits": LOGITS[..., :0]},
        r"logits: .* torch.int64": {"logits": LOGITS.long()},
        r"codevectors: expected \(2, 5, E\) .* got \(2, 4, 3\)": {"codevectors": CODEVECTORS[:, 1:]},
        r"codevectors: .* torch.int64": {"codevectors": CODEVECTORS.long()},
        r"codevectors: is on meta": {"codevectors": CODEVECTORS.to("meta")},
        r"noise: expected float \(7, 2, 5\)": {"noise": LOGITS.flatten(1)},
        r"seeds: expected \(7,\) torch.int64, got .* torch.int32": {"seeds": torch.zeros(7, dtype=torch.int32)},
        r"seeds: expected \(7,\)": {"seeds": torch.zeros(6, dtype=torch.int64)},
        "noise and seeds: give at most one": {"noise": LOGITS, "seeds": torch.zeros(7, dtype=torch.int64)},
        "temperature: must be above 0": {"temperature": 0.0},
        "backend='warp': not available for gumbel_quantize on cpu": {"backend": "warp"},
    },
    frames=frames,
    call=lambda inputs, layout, backend: call(inputs, backend).values,
    gradcheck_cases=SMALL,
    smooth=smooth,
    compile_cases=("seeds",),
    compiler=compiler_for,
    trace=trace,
    opcheck_cases=("seeds", "noise", "empty_batch"),
    opcheck_dtypes=(torch.float32, torch.bfloat16),
)


@pytest.mark.parametrize("case", SMALL)
@EVERY_IMPLEMENTATION
def test_the_gradient_of_values_is_that_of_a_softmax(case: str, backend: str, device: str) -> None:
    """The choice of a code has no gradient, so the softmax's gradient is used instead (straight-through)."""
    skip_float64_in_triton(backend)
    inputs = {name: x.to(device) for name, x in make_inputs(case, torch.float64).items()}
    (logits, codevectors), noise = differentiable(inputs), torch.zeros(()).double()
    if "seeds" in inputs:
        groups, codes = logits.shape[1:]
        noise = inputs["noise"] = reference.gumbel_noise(inputs.pop("seeds"), groups, codes, torch.float64)
    soft = torch.einsum("mgv,gve->mge", F.softmax((logits + noise) / TEMPERATURE, -1), codevectors.detach()).flatten(1)
    out, grad = call(inputs, backend).values, torch.randn_like(soft)
    found, expected = (torch.autograd.grad(x, logits, grad)[0] for x in (out, soft))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@EVERY_IMPLEMENTATION
def test_noise_is_a_function_of_key_position_and_code(backend: str, device: str) -> None:
    """Recover the noise from the gradient of the logits, and compare it with the noise for key, position and code."""
    frames, groups, codes = 50, 2, 16
    keys, positions = torch.arange(frames) % 7 - 3, torch.arange(frames) * 31
    seeds = noise_seeds(keys, positions * groups * codes, stream=3)
    counters = positions.unsqueeze(1) * groups * codes + torch.arange(groups * codes)
    expected = gumbel(keys.unsqueeze(1), counters, stream=3).unflatten(1, (groups, codes))
    assert torch.equal(reference.gumbel_noise(seeds, groups, codes), expected)
    # Code 0's vector is 1, all others are 0. Logit v > 0 gets the gradient -p_v p_0, so ratios of gradients are ratios
    # of probabilities, and these give differences of noise.
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
    """The largest noise comes from u near 1. The logarithm of u is tiny there, and needs a small relative error."""
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


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("codes", [7, 320])
@pytest.mark.parametrize("place", ["logits", "noise"])
def test_a_row_with_nan_chooses_its_first_nan(backend: str, device: str, codes: int, place: str) -> None:
    """As `torch.argmax` does. Counts still add up to the number of rows, and other rows keep their vectors."""
    inputs = {"logits": randn(6, 2, codes).float(), "codevectors": randn(2, codes, 4).float()}
    inputs["noise"] = randn(6, 2, codes).float() + 1
    clean = call({name: x.to(device) for name, x in inputs.items()}, backend)
    for row, group, code in ((0, 0, 0), (2, 1, codes - 1), (4, 0, 3), (4, 0, 5)):
        inputs[place][row, group, code] = torch.nan
    inputs[place][5] = torch.nan
    found = call({name: x.to(device) for name, x in inputs.items()}, backend)
    expected = clean.codes.clone()
    expected[0, 0], expected[2, 1], expected[4, 0], expected[5] = 0, codes - 1, 3, 0
    assert torch.equal(found.codes, expected)
    assert found.counts.sum(1).tolist() == [6, 6]
    unharmed = torch.tensor([1, 3], device=device)
    assert torch.equal(found.values.index_select(0, unharmed), clean.values.index_select(0, unharmed))
    assert found.probability_sums.isnan().any(1).tolist() == [place == "logits"] * 2
