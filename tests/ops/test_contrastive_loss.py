from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2ForPreTraining

from fastssl.kernels.dispatch import BACKENDS
from fastssl.ops import contrastive_loss
from tests.ops.common import LENGTHS, check_against_reference, compiler_for, implementations

#: name -> (masked frames of each utterance, D, K, share of negatives that are -1, number of distinct targets or None)
CASES = {
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
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("contrastive_loss"))
COMPILED = pytest.mark.parametrize(("backend", "device"), implementations("contrastive_loss", compiled_only=True))


def interpreted(backend: str, device: str) -> bool:
    """Triton's interpreter takes 15 ms for a frame: it gets small batches."""
    return (backend, device) == ("triton", "cpu")


def draw_case(case: str, backend: str, device: str) -> dict[str, Tensor]:
    lengths, width, count, missing, codes = CASES[case]
    if interpreted(backend, device):
        lengths = tuple(-(-length // 8) for length in lengths)
    return draw(lengths, width, count, missing, codes)


def draw(
    lengths: tuple[int, ...] | list[int],
    width: int,
    count: int,
    missing: float,
    codes: int | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Negatives from the same utterance, any row of it, so that the frame itself is among them at times."""
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


def call(inputs: dict[str, Tensor], backend: str | None = None, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    context, targets, negatives = inputs.values()
    return contrastive_loss(context, targets, negatives, temperature=temperature, backend=backend)


def run(inputs: dict[str, Tensor], backend: str | None = None) -> Tensor:
    loss, correct = call(inputs, backend)
    assert correct.shape == loss.shape
    assert correct.dtype == torch.bool
    assert not correct.requires_grad
    return loss


@EVERY_CASE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(case: str, backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = draw_case(case, backend, device)
    check_against_reference(run, inputs, backend=backend, device=device, dtype=dtype, backward=False)
    rounded = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
    assert run(rounded, backend).dtype == torch.float32


@EVERY_CASE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward(case: str, backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = draw_case(case, backend, device)
    check_against_reference(run, inputs, backend=backend, device=device, dtype=dtype, backward=True)


@pytest.mark.parametrize("case", ["distinct", "codes", "empty_batch"])
@EVERY_IMPLEMENTATION
def test_gradcheck(case: str, backend: str, device: str) -> None:
    if device == "cuda" or backend == "triton":
        pytest.skip("gradcheck runs on the reference and the native CPU kernels")
    codes = 3 if case == "codes" else None
    inputs = draw((4, 1, 6) if case != "empty_batch" else (), 3, 4, 0.2, codes, torch.float64)
    context, targets = inputs["context"].requires_grad_(), inputs["targets"]
    # A step of gradcheck tells equal targets apart, and the loss jumps.
    targets.requires_grad_(codes is None)
    assert torch.autograd.gradcheck(
        lambda context, targets: contrastive_loss(context, targets, inputs["negatives"], backend=backend)[0],
        (context, targets),
    )


@pytest.mark.parametrize("case", ["missing", "no_negatives", "empty_batch"])
@COMPILED
def test_opcheck(case: str, backend: str, device: str) -> None:
    context, targets, negatives = (x.to(device) for x in draw_case(case, backend, device).values())
    ops = getattr(torch.ops, f"fastssl_{backend}")
    torch.library.opcheck(ops.contrastive_loss_fwd.default, (context, targets, negatives, 0.1))
    loss, _, logits = ops.contrastive_loss_fwd(context, targets, negatives, 0.1)
    grad_loss = torch.rand_like(loss)
    torch.library.opcheck(ops.contrastive_loss_bwd.default, (grad_loss, context, targets, negatives, loss, logits, 0.1))


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


@EVERY_IMPLEMENTATION
def test_compile(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in draw_case("codes", backend, device).items()}
    targets = inputs["targets"].requires_grad_()
    compiled = torch.compile(
        lambda tensors: call(tensors, backend), fullgraph=True, dynamic=True, backend=compiler_for(backend)
    )
    (loss, correct), (eager, eager_correct) = compiled(inputs), call(inputs, backend)
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, eager_correct)
    grad, grad_eager = (torch.autograd.grad(x.sum(), targets)[0] for x in (loss, eager))
    torch.testing.assert_close(grad, grad_eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "device"), [it for it in implementations("contrastive_loss") if it.id != "triton-cpu"]
)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=5),
    width=st.sampled_from([5, 64, 256]),
    count=st.sampled_from([1, 7, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_batch_mates_do_not_matter(
    backend: str, device: str, lengths: list[int], width: int, count: int, dtype: torch.dtype
) -> None:
    check_batch_mates(backend, device, lengths, width, count, dtype)


@COMPILED
def test_batch_mates_do_not_matter_to_the_kernels(backend: str, device: str) -> None:
    check_batch_mates(backend, device, [6, 1, 0, 5], 20, 40, torch.float32)


def check_batch_mates(
    backend: str, device: str, lengths: list[int], width: int, count: int, dtype: torch.dtype
) -> None:
    inputs = draw(lengths, width, count, 0.1, sum(lengths) // 2 + 1, dtype)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    loss, correct = call(inputs, backend)
    for begin, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
        rows = slice(begin, begin + length)
        negatives = inputs["negatives"][rows]
        alone, alone_correct = contrastive_loss(
            inputs["context"][rows].clone(),  # memory of its own, which is aligned differently
            inputs["targets"][rows].clone(),
            torch.where(negatives < 0, negatives, negatives - begin),
            backend=backend,
        )
        if device == "cpu":
            assert torch.equal(loss[rows], alone)
            assert torch.equal(correct[rows], alone_correct)
        else:
            torch.testing.assert_close(loss[rows], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codes", [None, 5])
@EVERY_IMPLEMENTATION
def test_equals_transformers(codes: int | None, backend: str, device: str) -> None:
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
    # fairseq's count: the highest, and not also the lowest. Here every frame has a negative that is left.
    assert torch.equal(correct, (logits.argmax(1) == 0) & (logits.argmin(1) != 0))
    assert 0 < correct.sum() < len(correct)


@EVERY_IMPLEMENTATION
def test_equal_targets_are_left_out_and_no_others(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: many rows are permutations of each other, or have the same sum, and a few are equal.
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
        ([1.0, 0.0], [1, 2], True),  # level with the best negative, above another
        ([1.0, 0.0], [2, 2], False),  # level with all
        ([0.0, 0.0], [1, 2], False),  # a context that says nothing
        ([1.0, 0.0], [3, none], False),  # only the same target
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
    # A row just below the least norm shows that its gradient keeps the direction of the row itself.
    factors = torch.tensor([[1.0], [0.0], [1e-12], [1.0], [3e-9]], device=device)
    inputs |= {name: inputs[name] * factors for name in ("context", "targets")}
    for backward in (False, True):
        check_against_reference(run, inputs, backend=backend, device=device, dtype=torch.float32, backward=backward)


@EVERY_IMPLEMENTATION
def test_int32_negatives_are_the_same(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in draw_case("missing", backend, device).items()}
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


def test_rejects_bad_input() -> None:
    context, targets, negatives = torch.randn(6, 4), torch.randn(6, 4), torch.zeros(6, 3, dtype=torch.int64)
    changes: dict[str, dict[str, Any]] = {
        r"context: expected \(N, D\)": {"context": torch.randn(6)},
        r"targets: expected \(6, 4\)": {"targets": torch.randn(5, 4)},
        "targets: expected .* got .* torch.float64": {"targets": targets.double()},
        r"negatives: expected \(6, K\)": {"negatives": negatives[:5]},
        "negatives: expected .* got .* torch.float32": {"negatives": negatives.float()},
        "negatives: must be -1 to 5, got 0 to 6": {"negatives": negatives + torch.tensor([0, 6, 1])},
        "negatives: must be -1 to 5, got -2 to 0": {"negatives": negatives - torch.tensor([0, 2, 1])},
        "temperature: must be above 0": {"temperature": 0.0},
        "backend='triton': not available.*it computes in float32": {
            "context": context.double(),
            "targets": targets.double(),
            "backend": "triton",
        },
        "backend='torch': not available for contrastive_loss on cpu": {"backend": "torch"},
    }
    good = {"context": context, "targets": targets, "negatives": negatives}
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            contrastive_loss(**(good | change))
