"""What may be said of a difference, and how well one measure predicts another."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats


class Spread:
    """Values of several seeds.

    Args:
        values: One per seed.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)
        self.mean = statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Of the sample; 0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        of = f" +- {100 * self.deviation:.1f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:.1f}{of} %"


def compare(name: str, found: Spread, other_name: str, other: Spread) -> str:
    """Which of two errors is lower, where the difference is above the spread over seeds.

    A difference counts where Welch's t test rejects its absence at 5 %. One seed has no spread, so its difference never
    counts, nor does one between values that are the same for all seeds.
    """
    sizes = f"{name} {found}, {other_name} {other}"
    if len(found.values) < 2 or len(other.values) < 2:
        return f"{sizes}: not resolved, one seed"
    difference = found.mean - other.mean
    # Two counts of few examples often agree over all seeds: no spread is no evidence of one below the difference.
    spread = max(found.deviation, other.deviation) > 0
    if not spread or stats.ttest_ind(found.values, other.values, equal_var=False).pvalue >= 0.05:
        return f"{sizes}: not resolved at this scale"
    return f"{sizes}: {name} is {'lower' if difference < 0 else 'higher'} by {100 * abs(difference):.1f} points"


def chance(comparisons: int) -> str:
    """How many of so many differences tests at 5 % call resolved where there are none."""
    return f"{comparisons} comparisons, each at 5 %: were there no differences, {comparisons / 20:.1f} would be claimed"


class Correlation(NamedTuple):
    """A coefficient with the interval in which 95 % of the resampled ones lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def correlate(x: Sequence[float], y: Sequence[float], *, rank: bool, draws: int = 2000, seed: int = 0) -> Correlation:
    """A coefficient with its bootstrap interval (percentiles, pairs drawn with replacement).

    Args:
        x: A measure, of runs that are independent: no two of the same settings.
        y: Another.
        rank: Spearman's, else Pearson's.
        draws: Resamplings.
        seed: Of these.

    Returns:
        NaN where one of them is constant, or fewer than three pairs are finite.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(math.nan, math.nan, math.nan)
    rows = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    found = _coefficients(a[rows], b[rows], rank=rank)
    # A resample of one pair alone has no coefficient.
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Correlation(float(_coefficients(a[None], b[None], rank=rank)[0]), float(low), float(high))


def _coefficients(a: NDArray[np.float64], b: NDArray[np.float64], *, rank: bool) -> NDArray[np.float64]:
    """Of each row; NaN where one of them is constant."""
    if rank:
        a, b = stats.rankdata(a, axis=1), stats.rankdata(b, axis=1)
    # Whether a row is constant must not hang on how its mean was rounded.
    constant = (np.ptp(a, axis=1) == 0) | (np.ptp(b, axis=1) == 0)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    a[constant] = np.nan
    coefficients: NDArray[np.float64] = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return coefficients
