"""Test that the contrastive loss module equals the op, and that its negatives depend only on the utterance's key."""

from typing import Any

import pytest
import torch

from fastssl import ops
from fastssl.nn.contrastive import ContrastiveLoss
from fastssl.nn.masking import sample_negatives
from fastssl.nn.random import draw_keys
from fastssl.packing import Layout

LENGTHS = [30, 0, 1, 17]


def inputs(rows: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 8, generator=generator), torch.randn(rows, 8, generator=generator)


def keys_of(batch: int) -> torch.Tensor:
    return draw_keys(batch, generator=torch.Generator().manual_seed(5))


def test_is_the_loss_with_negatives_of_the_same_utterance() -> None:
    layout, keys = Layout.from_lengths(LENGTHS), keys_of(4)
    context, targets = inputs()
    loss, correct = ContrastiveLoss(negatives=7, temperature=0.2)(context, targets, layout, keys=keys)
    negatives = sample_negatives(torch.ones(48, dtype=torch.bool), layout, keys, count=7)
    logits = torch.cosine_similarity(
        context[:, None], targets[torch.cat([torch.arange(48)[:, None], negatives], 1)], -1
    )
    expected = torch.logsumexp(logits / 0.2, 1) - logits[:, 0] / 0.2
    expected[30] = 0  # this utterance has one masked frame, so no negatives
    torch.testing.assert_close(loss, expected)
    assert torch.equal(correct[:30], logits[:30, 0] >= logits[:30].amax(1))
    assert not correct[30]


def test_a_mask_says_the_same_as_the_layout_of_masked_frames() -> None:
    layout, keys = Layout.from_lengths([70, 12, 9, 40]), keys_of(4)
    mask = torch.zeros(131, dtype=torch.bool)
    for first, count in ((3, 30), (85, 1), (95, 17)):
        mask[first : first + count] = True
    context, targets = inputs()
    contrastive_loss = ContrastiveLoss(negatives=7)
    loss, correct = contrastive_loss(context, targets, layout, mask=mask, keys=keys)
    expected_loss, expected = contrastive_loss(context, targets, Layout.from_lengths(LENGTHS), keys=keys)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(correct, expected)


def test_batch_mates_do_not_matter() -> None:
    layout, keys = Layout.from_lengths(LENGTHS), keys_of(4)
    context, targets = inputs()
    contrastive_loss = ContrastiveLoss(negatives=7)
    loss, _ = contrastive_loss(context, targets, layout, keys=keys)
    for row, (first, count) in enumerate(zip(layout.offsets, LENGTHS, strict=False)):
        part = slice(first, first + count)
        alone, _ = contrastive_loss(
            context[part], targets[part], Layout.from_lengths([count]), keys=keys[row : row + 1]
        )
        assert torch.equal(loss[part], alone)


def test_keys_are_drawn_where_none_are_given() -> None:
    layout, (context, targets) = Layout.from_lengths(LENGTHS), inputs()
    contrastive_loss = ContrastiveLoss(negatives=7)

    def run() -> torch.Tensor:
        loss: torch.Tensor = contrastive_loss(context, targets, layout)[0]
        return loss

    torch.manual_seed(0)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(run(), first)


def test_gradients_are_those_of_the_op() -> None:
    layout, keys = Layout.from_lengths(LENGTHS), keys_of(4)
    context, targets = (x.requires_grad_() for x in inputs())
    loss, _ = ContrastiveLoss(negatives=7)(context, targets, layout, keys=keys)
    negatives = sample_negatives(torch.ones(48, dtype=torch.bool), layout, keys, count=7)
    expected, _ = ops.contrastive_loss(context, targets, negatives, temperature=0.1)
    found = torch.autograd.grad(loss.sum(), (context, targets))
    for grad, expected_grad in zip(found, torch.autograd.grad(expected.sum(), (context, targets)), strict=True):
        assert torch.equal(grad, expected_grad)


def test_rejects_bad_input() -> None:
    contrastive_loss, layout, (context, targets) = ContrastiveLoss(), Layout.from_lengths(LENGTHS), inputs()
    mask = torch.ones(48, dtype=torch.bool)
    cases: dict[str, dict[str, Any]] = {
        r"keys: expected \(4,\) torch.int64.* got \(3,\)": {"keys": keys_of(3)},
        r"keys: expected .* torch.int32": {"keys": keys_of(4).int()},
        r"mask: expected \(48,\) torch.bool, got \(47,\)": {"mask": mask[1:]},
        r"mask: expected \(48,\) torch.bool, got \(48,\) torch.int64": {"mask": mask.long()},
        r"mask: has 0 masked frames, but context is \(48, 8\)": {"mask": ~mask},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            contrastive_loss(context, targets, layout, **options)
    with pytest.raises(ValueError, match=r"layout: has 48 masked frames, but context is \(40, 8\)"):
        contrastive_loss(context[:40], targets[:40], layout)
    for negatives in (0, 2.5):
        with pytest.raises(ValueError, match="negatives: must be a whole number"):
            ContrastiveLoss(negatives=negatives)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature: must be above 0"):
        ContrastiveLoss(temperature=0.0)
