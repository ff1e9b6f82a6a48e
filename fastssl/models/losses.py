"""Sums of weighted losses."""

from torch import Tensor


def add_weighted(loss: Tensor, *terms: tuple[float, Tensor]) -> Tensor:
    """Add terms to a loss, each times its weight.

    A term with weight 0 is left out: its gradient is 0, and computing it would take as long as any other.

    Args:
        loss: () the loss.
        terms: Weight and () value of each term, added in this order.

    Returns:
        () the sum.
    """
    for weight, term in terms:
        if weight != 0:
            loss = loss + weight * term
    return loss
