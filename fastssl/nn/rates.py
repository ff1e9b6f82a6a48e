"""Rates of sequence compression (lambda of Once-for-All, arXiv 2211.02332): solved, drawn or learned."""

import torch
from torch import Tensor, nn

from fastssl.nn import random

#: Smallest learned weight. Above zero, so that weights can always be scaled up to a required sum.
LEAST_WEIGHT = 1e-6
_STREAM_RATES = 7


def mix_weights(learned: Tensor, rate: Tensor) -> Tensor:
    """Mix learned weights with a rate (arXiv 2211.02332): rate 0 gives all ones, 1 the learned weights, 2 all zeros.

    Args:
        learned: (N,) learned weights alpha.
        rate: lambda in [0, 2], broadcast against `learned`.

    Returns:
        alpha', in the broadcast shape: rate * alpha + 1 - rate for rates up to 1, (2 - rate) * alpha above.
    """
    # Only the rate is chosen by `where`, so that the gradient of `learned` is one product.
    below = rate <= 1
    return torch.where(below, rate, 2 - rate) * learned + (1 - rate) * below


def rate_for_period(period_ms: Tensor, mean_weight: Tensor, input_period_ms: float) -> Tensor:
    """Solve for the rate of a mean frame period; mixed weights then have the mean input_period_ms / period_ms.

    Args:
        period_ms: (B,) target mean frame periods in milliseconds, at least `input_period_ms`.
        mean_weight: (B,) mean learned weight of each utterance, in (0, 1).
        input_period_ms: Time from one input frame to the next, in milliseconds.

    Returns:
        (B,) rates in [0, 2).
    """
    share = input_period_ms / period_ms
    up_to_one = (1 - share) / (1 - mean_weight).clamp(min=LEAST_WEIGHT)
    beyond = 2 - share / mean_weight.clamp(min=LEAST_WEIGHT)
    return torch.where(share >= mean_weight, up_to_one, beyond)


def draw_rates(keys: Tensor, low: float, high: float) -> Tensor:  # (B,) -> (B,)
    """Draw a uniform random number for each utterance, to train one model for a range of rates or frame periods.

    Args:
        keys: (B,) int64 keys from `nn.random.utterance_keys` or `draw_keys`; equal keys give equal numbers.
        low: Lower bound; equal to `high` for a fixed number.
        high: Upper bound.

    Returns:
        (B,) fp32 numbers from `low` to `high`.
    """
    return low + (high - low) * random.uniform(keys, torch.zeros_like(keys), stream=_STREAM_RATES)


class AdaptiveRate(nn.Module):
    """A compression rate that is learned together with a task, so that no search is needed (arXiv 2211.02332).

    The loss of a task alone rarely favours fewer frames. Add a price w * mean(alpha') to it
    (`w * Compressed.weights.mean()`), which is w times the share of frames that are left. The rate is a single
    parameter among thousands of weights: give it its own learning rate, about a hundred times larger.

    The gradient from one batch is noisy, because a change of one weight moves all later boundaries. Average it over
    many batches, or use the slope between two rates (`fastssl.eval.probe.adaptive.learn_rates`).

    The parameter is the rate itself. Each call of `forward` clamps it to the bounds, so an optimiser step can reach a
    bound, and later steps can leave it.

    Example:
        >>> import torch
        >>> from fastssl.nn import AdaptiveRate
        >>> rate = AdaptiveRate(0.5)
        >>> rate().item()
        0.5
        >>> optimizer = torch.optim.SGD(rate.parameters(), lr=1.0)
        >>> (-2 * rate()).backward()
        >>> optimizer.step()
        >>> rate().item()  # not 2.5
        1.0

    Args:
        start: Initial rate.
        low: Lower bound of the rate, at least 0. Rate 0 keeps every frame.
        high: Upper bound of the rate, at most 2. Rate 1 leaves one frame per learned segment, higher rates fewer.

    Raises:
        ValueError: 0 <= `low` <= `start` <= `high` <= 2 does not hold.
    """

    def __init__(self, start: float, *, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not 0 <= low <= start <= high <= 2:
            raise ValueError(f"start, low, high: need 0 <= low <= start <= high <= 2, got {start}, {low}, {high}")
        self.low, self.high = low, high
        self.rate = nn.Parameter(torch.tensor(float(start)))

    def forward(self) -> Tensor:
        """Return the rate, clamped to its bounds: a () fp32 tensor with gradient."""
        # Clamp through `.data`: autograd would otherwise refuse the backward pass of an earlier call.
        self.rate.data.clamp_(self.low, self.high)
        return self.rate.view(())
