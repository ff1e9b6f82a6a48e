"""Test sums of weighted losses."""

import torch

from fastssl.models.losses import add_weighted


def test_a_term_without_weight_gets_no_gradient() -> None:
    loss, first, second = (torch.tensor(value, requires_grad=True) for value in (1.0, 2.0, torch.nan))
    total = add_weighted(loss, (0.5, first), (0.0, second))
    assert total.item() == 2.0
    total.backward()
    assert loss.grad is not None
    assert first.grad is not None
    assert (loss.grad.item(), first.grad.item(), second.grad) == (1.0, 0.5, None)
