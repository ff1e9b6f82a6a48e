"""Test segmentation: short sequences get the least cost of all possible divisions; other properties hold."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastssl.data import segments
from fastssl.data.segments import smooth_classes


def random_costs(frames: int, classes: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((frames, classes), dtype=np.float32) * 10


def total(costs: NDArray[np.float32], classes: NDArray[np.int64], price: float) -> float:
    """Return the cost of frames and segments when each frame has the given class."""
    segments = 1 + np.count_nonzero(np.diff(classes))
    return float(costs[np.arange(len(costs)), classes].astype(np.float64).sum() + price * segments)


def least_by_trying_all(costs: NDArray[np.float32], price: float) -> float:
    """Minimise the paper's formula over every division into segments, with the best class for each segment."""
    frames = len(costs)
    best = np.inf
    for cuts in itertools.product([False, True], repeat=frames - 1):
        bounds = [0, *(at + 1 for at, cut in enumerate(cuts) if cut), frames]
        # The paper rewards long segments, where we price each segment: the two costs differ by this constant.
        found = price * frames
        for begin, end in itertools.pairwise(bounds):
            found += costs[begin:end].astype(np.float64).sum(0).min() - price * (end - begin - 1)
        best = min(best, found)
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.floats(0, 20), st.integers(0, 100))
def test_no_division_into_segments_costs_less(frames: int, classes: int, price: float, seed: int) -> None:
    costs = random_costs(frames, classes, seed)
    found = smooth_classes(costs, price=price)
    assert total(costs, found, price) == pytest.approx(least_by_trying_all(costs, price), rel=1e-9)


def test_the_host_module_equals_numpy() -> None:
    costs = random_costs(2000, 17)
    expected = segments._smooth_with_numpy(costs, 6.0)
    assert len(set(expected.tolist())) > 2
    assert np.array_equal(smooth_classes(costs, price=6.0), expected)


def test_without_a_price_every_frame_has_its_nearest_class() -> None:
    costs = random_costs(300, 12)
    assert np.array_equal(smooth_classes(costs, price=0.0), costs.argmin(1))


def test_a_higher_price_makes_longer_segments() -> None:
    costs = random_costs(1000, 5)
    numbers = [1 + np.count_nonzero(np.diff(smooth_classes(costs, price=price))) for price in (0, 3, 10, 1e9)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[2] > numbers[3] == 1


def test_no_frames() -> None:
    assert smooth_classes(np.empty((0, 3), np.float32), price=1.0).shape == (0,)


@pytest.mark.parametrize(
    ("costs", "price", "message"),
    [
        (np.zeros((3, 2)), 1.0, "float32"),
        (np.zeros(3, np.float32), 1.0, "frames, classes"),
        (np.zeros((3, 0), np.float32), 1.0, "frames, classes"),
        (np.full((3, 2), np.nan, np.float32), 1.0, "NaN"),
        (np.zeros((3, 2), np.float32), -1.0, "price"),
        (np.zeros((3, 2), np.float32), np.inf, "price"),
    ],
)
def test_rejects_bad_input(costs: Any, price: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smooth_classes(costs, price=price)
