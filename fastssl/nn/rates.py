"""Rates of sequence compression, lambda of arXiv 2211.02332 (once-for-all): solved for a period, drawn, learned."""

import torch
from torch import Tensor, nn

from fastssl.nn import random

#: Of a learned weight: where all were zero, no sum could be raised.
LEAST_WEIGHT = 1e-6
_STREAM_RATES = 7


def mix_weights(learned: Tensor, rate: Tensor) -> Tensor:
    """The weights alpha' of arXiv 2211.02332: from all frames (rate 0) over the learned ones (1) to none (2).

    Args:
        learned: alpha, (N,).
        rate: lambda, broadcast against it.
    """
    return torch.where(rate <= 1, rate * learned + (1 - rate), (2 - rate) * learned)


def rate_for_period(period_ms: Tensor, mean_weight: Tensor, input_period_ms: float) -> Tensor:
    """The rate at which frames come out with a period: its inverse is the mean of `mix_weights`.

    Args:
        period_ms: (B,), at least `input_period_ms`.
        mean_weight: (B,) of the learned weights, in (0, 1).
        input_period_ms: From one input frame to the next.

    Returns:
        (B,) in [0, 2).
    """
    share = input_period_ms / period_ms
    up_to_one = (1 - share) / (1 - mean_weight).clamp(min=LEAST_WEIGHT)
    beyond = 2 - share / mean_weight.clamp(min=LEAST_WEIGHT)
    return torch.where(share >= mean_weight, up_to_one, beyond)


def draw_rates(keys: Tensor, low: float, high: float) -> Tensor:  # (B,) -> (B,)
    """A number for each utterance, uniform between two: rates or frame periods for training one model for all of them.

    Args:
        keys: int64 from `nn.random.utterance_keys` or `draw_keys`; the same key for all makes one draw of a batch.
        low: The least; the same as `high` for a fixed one.
        high: The most.
    """
    return low + (high - low) * random.uniform(keys, torch.zeros_like(keys), stream=_STREAM_RATES)


class AdaptiveRate(nn.Module):
    """A rate that is learned with a task, instead of tried out (arXiv 2211.02332).

    The task's loss alone rarely asks for fewer frames; add a price for them, w * mean(alpha'), which is w times the
    share of frames that is left (`Compressed.weights.mean()`). The rate is one number among thousands of weights: give
    it a learning rate of its own, some hundred times theirs.

    The derivative of one batch says little, because each boundary behind a frame moves with its weight: average over
    much audio, or follow the slope between two rates (`fastssl.eval.probe.adaptive.learn_rates`).

    The parameter is the rate itself, and what a step takes beyond a bound is taken back, so that a bound can be reached
    and left again.

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
        start: At first.
        low: The least, at least 0, where every frame is left.
        high: The most, up to 2; at 1 the learned segments are left, and beyond it fewer.

    Raises:
        ValueError: The numbers are out of range.
    """

    def __init__(self, start: float, *, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not 0 <= low <= start <= high <= 2:
            raise ValueError(f"start, low, high: must rise from 0 to 2, got {start} from {low} to {high}")
        self.low, self.high = low, high
        self.rate = nn.Parameter(torch.tensor(float(start)))

    def forward(self) -> Tensor:
        """() the rate, within its bounds, with gradient."""
        # Beside autograd, which would else refuse the backward of an earlier call.
        self.rate.data.clamp_(self.low, self.high)
        return self.rate.view(())
