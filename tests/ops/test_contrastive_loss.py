from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastssl.kernels.dispatch import BACKENDS
from fastssl.ops import contrastive_loss
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS, check_against_reference, compiler_for, implementations, layout_of, randn
from tests.ops.standard import Inputs, Mates, Standard, interpreted

Case = tuple[tuple[int, ...], int, int, float, int | None]
#: Name -> (masked frames of each utterance, D, K, share of negatives set to -1, number of distinct targets or None).
CASES: dict[str, Case] = {
    "odd": (LENGTHS["odd"], 16, 10, 0.0, None),
    "one_long": (LENGTHS["one_long"], 8, 100, 0.0, None),
    "codes": (LENGTHS["odd"], 16, 10, 0.0, 4),
    "one_code": (LENGTHS["odd"], 16, 5, 0.0, 1),
    "missing": (LENGTHS["with_empty"], 5, 7, 0.5, 6),
    "one_negative": (LENGTHS["odd"], 3, 1, 0.3, None),
    "no_negatives": (LENGTHS["odd"], 8, 0, 0.0, None),
    "single_frame": (LENGTHS["single_frame"], 8, 4, 1.0, None),
    "empty_batch": (LENGTHS["empty_batch"], 8, 4, 0.0, None),
}
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("contrastive_loss"))
SMALL: dict[str, Case] = {
    "small": ((4, 1, 6), 3, 4, 0.2, None),
    "small, codes": ((4, 1, 6), 3, 4, 0.2, 3),
}


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return draw(*(SMALL | CASES)[case], dtype)


def few_frames(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Make the case with an eighth of the frames, because Triton's interpreter takes 15 ms per frame."""
    lengths, width, count, missing, codes = (SMALL | CASES)[case]
    return draw(tuple(-(-length // 8) for length in lengths), width, count, missing, codes, dtype)


def draw(
    lengths: Sequence[int],
    width: int,
    count: int,
    missing: float,
    codes: int | None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Draw inputs. Negatives are any frames of the same utterance, so a frame may be its own negative."""
    generator = torch.Generator().manual_seed(0)
    frames = sum(lengths)
    context, targets = (torch.randn(frames, width, generator=generator, dtype=dtype) for _ in range(2))
    if codes is not None:
        targets = targets[:codes][torch.randint(codes, (frames,), generator=generator)]
    negatives = [torch.empty(0, count, dtype=torch.int64)]
    for length in lengths:
        begin = sum(len(rows) for rows in negatives)
        negatives.append(begin + torch.randint(max(length, 1), (length, count), generator=generator))
    rows = torch.cat(negatives)
    return {
        "context": context,
        "targets": targets,
        "negatives": rows.masked_fill(torch.rand(rows.shape, generator=generator) < missing, -1),
    }


def call(inputs: Inputs, backend: str | None = None, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    context, targets, negatives = inputs.values()
    return contrastive_loss(context, targets, negatives, temperature=temperature, backend=backend)


def run(inputs: Inputs, backend: str | None = None) -> Tensor:
    loss, correct = call(inputs, backend)
    assert correct.shape == loss.shape
    assert correct.dtype == torch.bool
    assert not correct.requires_grad
    assert loss.dtype == torch.promote_types(inputs["context"].dtype, torch.float32)
    return loss


def run_with_constant_codes(case: str, inputs: Inputs, backend: str | None) -> Tensor:
    """Keep shared targets fixed: gradcheck's step would make equal targets differ, and the loss would jump."""
    if "codes" in case:
        inputs = inputs | {"targets": make_inputs(case, torch.float64)["targets"]}
    return run(inputs, backend)


def trace(case: str, inputs: Inputs, backend: str) -> tuple[Callable[..., Tensor], tuple[Inputs]]:
    def loss_and_correct(tensors: Inputs) -> Tensor:
        return torch.cat(call(tensors, backend))

    return loss_and_correct, (inputs,)


def frames(count: int) -> Inputs:
    negatives = torch.randint(-1, count, (count, 11), generator=torch.Generator().manual_seed(1))
    return {"context": randn(count, 24), "targets": randn(count, 24) + 1, "negatives": negatives}


def make_batch(lengths: Sequence[int], width: int, count: int, dtype: torch.dtype) -> Inputs:
    """Make inputs whose negatives are numbered from the start of their sequence."""
    inputs = draw(lengths, width, count, 0.1, sum(lengths) // 2 + 1, dtype)
    return inputs | {"negatives": moved(inputs["negatives"], layout_of(lengths), -1)}


def moved(negatives: Tensor, layout: Layout, sign: int) -> Tensor:
    begins = layout.cu_seqlens[:-1].repeat_interleave(layout.cu_seqlens.diff())
    return torch.where(negatives < 0, negatives, negatives + sign * begins[:, None])


def loss_of_batch(inputs: Inputs, layout: Layout, backend: str) -> list[Packed]:
    results = call(inputs | {"negatives": moved(inputs["negatives"], layout, 1)}, backend)
    return [Packed(result, layout) for result in results]


CONTEXT, TARGETS, NEGATIVES = torch.randn(6, 4), torch.randn(6, 4), torch.zeros(6, 3, dtype=torch.int64)
STANDARD = Standard(
    op="contrastive_loss",
    cases=CASES,
    make_inputs=make_inputs,
    interpreter_inputs=few_frames,
    run=lambda case, inputs, backend: run(inputs, backend),
    mates={
        "drawn": Mates(
            make=make_batch,
            call=loss_of_batch,
            lengths=st.lists(st.integers(0, 120), min_size=1, max_size=5),
            drawn=(
                st.sampled_from([5, 64, 256]),
                st.sampled_from([1, 7, 100]),
                st.sampled_from([torch.float32, torch.bfloat16]),
            ),
            examples=25,
            on=lambda backend, device: not interpreted(backend, device),
        ),
        "kernels": Mates(
            make=make_batch,
            call=loss_of_batch,
            lengths=st.just((6, 1, 0, 5)),
            drawn=(st.just(20), st.just(40), st.just(torch.float32)),
            on=lambda backend, device: backend in ("native", "triton"),
        ),
    },
    good={"context": CONTEXT, "targets": TARGETS, "negatives": NEGATIVES},
    bad={
        r"context: expected \(N, D\)": {"context": torch.randn(6)},
        r"targets: expected \(6, 4\)": {"targets": torch.randn(5, 4)},
        "targets: expected .* got .* torch.float64": {"targets": TARGETS.double()},
        r"negatives: expected \(6, K\)": {"negatives": NEGATIVES[:5]},
        "negatives: expected .* got .* torch.float32": {"negatives": NEGATIVES.float()},
        "negatives: must be from -1 to 5, got 0 to 6": {"negatives": NEGATIVES + torch.tensor([0, 6, 1])},
        "negatives: must be from -1 to 5, got -2 to 0": {"negatives": NEGATIVES - torch.tensor([0, 2, 1])},
        "temperature: must be above 0": {"temperature": 0.0},
        "backend='triton': not available.*its kernels compute in float32": {
            "context": CONTEXT.double(),
            "targets": TARGETS.double(),
            "backend": "triton",
        },
        "backend='torch': not available for contrastive_loss on cpu": {"backend": "torch"},
    },
    frames=frames,
    call=lambda inputs, layout, backend: run(inputs, backend),
    gradcheck_cases=(*SMALL, "empty_batch"),
    smooth=run_with_constant_codes,
    compile_cases=("codes",),
    compiler=compiler_for,
    trace=trace,
    opcheck_cases=("missing", "no_negatives", "empty_batch"),
)


@pytest.mark.parametrize("namespace", ["fastssl_native", "fastssl_triton"])
@pytest.mark.parametrize("case", ["odd", "empty_batch"])
def test_fake_kernels_have_the_shapes_of_the_reference(case: str, namespace: str) -> None:
    op = getattr(torch.ops, namespace)
    inputs = draw(*CASES[case])
    inputs |= {name: inputs[name].bfloat16() for name in ("context", "targets")}
    with FakeTensorMode() as mode:
        context, targets, negatives = (mode.from_tensor(x) for x in inputs.values())
        loss, correct, logits = op.contrastive_loss_fwd(context, targets, negatives, 0.1)
        grads = op.contrastive_loss_bwd(torch.empty_like(loss), context, targets, negatives, loss, logits, 0.1)
    for found, reference in zip((loss, correct), call(inputs), strict=True):
        assert (found.shape, found.dtype) == (reference.shape, reference.dtype)
    frames, count = negatives.shape
    assert (logits.shape, logits.dtype) == ((frames, count + 1), torch.float32)
    for grad, x in zip(grads, (context, targets), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("codes", [None, 5])
@EVERY_IMPLEMENTATION
def test_equals_transformers(codes: int | None, backend: str, device: str) -> None:
    # Imported here, because other tests import this module in processes that would wait seconds for Transformers.
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2ForPreTraining

    lengths, width, count, temperature = (12 if interpreted(backend, device) else 60,), 32, 20, 0.2
    inputs = {name: tensor.to(device) for name, tensor in draw(lengths, width, count, 0.0, codes).items()}
    context, targets, negatives = inputs.values()
    leaves = (context.requires_grad_(), targets.requires_grad_())
    sampled = targets[negatives].transpose(0, 1)[:, None]  # (K, 1, T, D)
    logits = Wav2Vec2ForPreTraining.compute_contrastive_logits(targets[None, None], sampled, context[None], temperature)
    logits[1:][(targets == sampled).all(-1)] = -torch.inf
    logits = logits.flatten(1).t()  # (T, 1 + K)
    expected = F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), reduction="none")
    loss, correct = call(inputs, backend, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for grad, expected_grad in zip(
        torch.autograd.grad(loss.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    # fairseq counts a frame as correct if its logit is the highest and not also the lowest. Every frame here has a
    # negative that is not left out.
    assert torch.equal(correct, (logits.argmax(1) == 0) & (logits.argmin(1) != 0))
    assert 0 < correct.sum() < len(correct)


@EVERY_IMPLEMENTATION
def test_equal_targets_are_left_out_and_no_others(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small integers, so that many rows are permutations of each other or have equal sums, and a few are equal.
    frames = 20 if interpreted(backend, device) else 200
    targets = torch.randint(-1, 2, (frames, 5), generator=generator).to(device, torch.float32)
    targets[::3] *= -0.0  # zeros of either sign are equal
    context = torch.randn(frames, 5, generator=generator).to(device)
    negatives = torch.arange(frames, device=device).expand(frames, frames)
    equal = (targets.unsqueeze(1) == targets).all(2)
    assert 0 < equal.sum() - frames < frames**2 / 2
    loss, correct = contrastive_loss(context, targets, negatives, backend=backend)
    spelled_out, correct_too = contrastive_loss(context, targets, torch.where(equal, -1, negatives), backend=backend)
    assert torch.equal(loss, spelled_out)
    assert torch.equal(correct, correct_too)
    logits = F.cosine_similarity(context.unsqueeze(1), targets, dim=2) / 0.1
    expected = logits.masked_fill(equal & ~torch.eye(frames, dtype=torch.bool, device=device), -torch.inf).logsumexp(1)
    torch.testing.assert_close(loss, expected - logits.diagonal(), rtol=1e-4, atol=1e-5)


@EVERY_IMPLEMENTATION
def test_correct_needs_a_negative_and_no_tie_of_all(backend: str, device: str) -> None:
    targets = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [1.0, 0.0]], device=device)
    none = -1
    for context, negatives, expected in (
        ([1.0, 0.0], [1, none], True),
        ([-1.0, 0.0], [1, none], False),
        ([1.0, 0.0], [1, 2], True),  # as good as the best negative, better than the other
        ([1.0, 0.0], [2, 2], False),  # as good as all negatives
        ([0.0, 0.0], [1, 2], False),  # a zero context cannot tell targets apart
        ([1.0, 0.0], [3, none], False),  # the only negative equals the target
        ([1.0, 0.0], [none, none], False),
    ):
        rows = torch.tensor([negatives] * 4, device=device)
        loss, correct = contrastive_loss(
            torch.tensor([context] * 4, device=device), targets, rows, temperature=1.0, backend=backend
        )
        assert correct[0] == expected, (context, negatives)
        assert (loss[0] == 0) == (max(none if row == 3 else row for row in negatives) == none)


@pytest.mark.skipif("native" not in BACKENDS["contrastive_loss"]["cpu"], reason="the compiled module was not built")
def test_same_bits_with_any_number_of_threads() -> None:
    inputs = draw((150, 90, 1, 60), 64, 100, 0.1, 40)
    leaves = (inputs["context"].requires_grad_(), inputs["targets"].requires_grad_())
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 7):
        torch.set_num_threads(number)
        try:
            loss = run(inputs, "native")
            results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
        finally:
            torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@EVERY_IMPLEMENTATION
def test_short_rows_take_the_least_norm(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in draw((5,), 8, 4, 0.0, None).items()}
    # Below the least norm a gradient keeps its component along the row. The last row, just below it, tests this.
    factors = torch.tensor([[1.0], [0.0], [1e-12], [1.0], [3e-9]], device=device)
    inputs |= {name: inputs[name] * factors for name in ("context", "targets")}
    check_against_reference(run, inputs, backend=backend, device=device, dtype=torch.float32, backward=True)


@EVERY_IMPLEMENTATION
def test_int32_negatives_are_the_same(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in STANDARD.inputs("missing", backend, device).items()}
    assert torch.equal(run(inputs, backend), run(inputs | {"negatives": inputs["negatives"].int()}, backend))


def test_low_precision_is_computed_in_fp32() -> None:
    inputs = draw(*CASES["codes"], dtype=torch.bfloat16)
    precise = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    assert torch.equal(run(inputs, "reference"), run(precise, "reference"))


def test_autocast_changes_nothing() -> None:
    inputs = draw(*CASES["odd"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(inputs)
    assert torch.equal(loss, run(inputs))
