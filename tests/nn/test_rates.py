"""Test rates of sequence compression: the paper's figures, random rates for training, and a learned rate."""

import pytest
import torch

from fastssl.nn import AdaptiveRate, SequenceCompressor
from fastssl.nn.random import draw_keys
from fastssl.nn.rates import draw_rates, mix_weights, rate_for_period
from fastssl.packing import Packed


def test_periods_of_rates_are_those_of_the_paper() -> None:
    """The paper's table assumes a mean weight of 2/9, so the frame period is 90 ms at rate 1."""
    table = {0.0: 20.0, 0.25: 24.83, 0.5: 32.73, 0.7: 43.9, 0.75: 48.0, 1.0: 90.0}
    learned = torch.full((1,), 2 / 9, dtype=torch.float64)
    for rate, period in table.items():
        mixed = mix_weights(learned, torch.tensor(rate, dtype=torch.float64))
        assert abs(20 / mixed.item() - period) < 0.05
    for period in (20.0, 30.0, 89.0, 90.0, 91.0, 200.0, 5000.0):
        rate_ = rate_for_period(torch.tensor([period], dtype=torch.float64), learned, 20.0)
        assert abs(20 / mix_weights(learned, rate_).item() - period) < 1e-6 * period
        assert (rate_ <= 1).item() == (period <= 90)
    saturated = rate_for_period(torch.tensor([20.0, 40.0]), torch.ones(2), 20.0)
    assert saturated.tolist() == [0.0, 1.5]


def test_a_rate_of_one_has_the_gradient_from_below() -> None:
    """An adaptive rate at its upper bound of 1 must feel that fewer frames are left as it rises to 1."""
    learned = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    of_learned, of_rate = torch.autograd.grad(mix_weights(learned, rate).sum(), (learned, rate))
    assert of_learned.tolist() == [0.5, 1.0, 0.5]
    assert of_rate.tolist() == [0.25 - 1, 0.5 - 1, -0.75]


def test_draws_are_uniform_and_follow_from_the_key_alone() -> None:
    keys = draw_keys(4000, generator=torch.Generator().manual_seed(0))
    rates = draw_rates(keys, 0.25, 1.0)
    assert 0.25 <= rates.min() < 0.26
    assert 0.99 < rates.max() <= 1.0
    assert abs(rates.mean() - 0.625) < 0.02
    assert torch.equal(draw_rates(keys[[7]], 0.25, 1.0), rates[[7]])
    assert draw_rates(keys, 0.4, 0.4).unique().tolist() == [pytest.approx(0.4)]
    assert draw_rates(keys[:0], 0.0, 1.0).shape == (0,)


@pytest.mark.parametrize("start", [0.2, 0.5, 0.8])
def test_an_adaptive_rate_finds_the_price_that_balances_the_loss(start: float) -> None:
    """The loss is the squared rate and each frame costs 0.8, so the optimum is where both slopes cancel."""
    torch.manual_seed(0)
    compressor = SequenceCompressor(8, kind="integrate-and-fire")
    frames = Packed.pack([torch.randn(200, 8)])
    learned = compressor(frames).learned_weights
    assert learned is not None
    best = 0.8 * (1 - learned.mean().item()) / 2  # d/dr of r^2 + 0.8 (1 - r (1 - abar))
    rate = AdaptiveRate(start)
    optimizer = torch.optim.Adam(rate.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        weights = compressor(frames, rate=rate()).weights
        assert weights is not None
        (rate() ** 2 + 0.8 * weights.mean()).backward()
        optimizer.step()
    assert abs(rate().item() - best) < 0.01


def test_an_adaptive_rate_stays_within_its_bounds_and_leaves_them_again() -> None:
    rate = AdaptiveRate(0.5, low=0.1, high=1.5)
    optimizer = torch.optim.SGD(rate.parameters(), lr=1.0)
    for slope, expected in ((-40.0, 1.5), (0.25, 1.25), (40.0, 0.1), (-0.5, 0.6)):
        optimizer.zero_grad()
        (slope * rate()).backward()
        optimizer.step()
        assert rate().item() == pytest.approx(expected)
    first = rate()
    rate()
    (first * first).backward()  # the gradient of an earlier call still works
    for numbers in ((0.5, 0.6, 1.0), (0.5, -0.1, 1.0), (0.5, 0.0, 2.1), (float("nan"), 0.0, 1.0)):
        with pytest.raises(ValueError, match="start, low, high"):
            AdaptiveRate(numbers[0], low=numbers[1], high=numbers[2])
