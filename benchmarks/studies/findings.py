"""Statistics of the studies: significance of differences, and correlations between measures."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats


class Spread:
    """Mean and standard deviation of a measure over seeds.

    Args:
        values: One value per seed, as a fraction (0 to 1); printed as a percentage.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)
        self.mean = statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation; 0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        of = f" +- {100 * self.deviation:.1f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:.1f}{of} %"


def compare(name: str, found: Spread, other_name: str, other: Spread) -> str:
    """Say in words which of two errors is lower, if the difference is significant over seeds.

    A difference is significant if Welch's t test rejects equality at the 5 % level. It is never significant if one of
    the two has a single seed, or if neither varies over seeds.

    Args:
        name: Name of the first contender.
        found: Its errors.
        other_name: Name of the second contender.
        other: Its errors.
    """
    sizes = f"{name} {found}, {other_name} {other}"
    if len(found.values) < 2 or len(other.values) < 2:
        return f"{sizes}: not resolved, one seed"
    difference = found.mean - other.mean
    # Error counts of few examples are often equal for all seeds; zero spread is then no evidence of precision.
    spread = max(found.deviation, other.deviation) > 0
    if not spread or stats.ttest_ind(found.values, other.values, equal_var=False).pvalue >= 0.05:
        return f"{sizes}: not resolved at this scale"
    return f"{sizes}: {name} is {'lower' if difference < 0 else 'higher'} by {100 * abs(difference):.1f} points"


def chance(comparisons: int) -> str:
    """Say how many of these comparisons would be significant by chance at the 5 % level if nothing really differed."""
    return f"{comparisons} comparisons at the 5 % level: {comparisons / 20:.1f} would be significant by chance alone"


class Correlation(NamedTuple):
    """A correlation coefficient with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def correlate(x: Sequence[float], y: Sequence[float], *, rank: bool, draws: int = 2000, seed: int = 0) -> Correlation:
    """Correlate two measures, with a percentile bootstrap interval (pairs drawn with replacement).

    Args:
        x: First measure, one value per run; the runs must be independent, with no two of the same settings.
        y: Second measure of the same runs.
        rank: Whether to compute Spearman's coefficient instead of Pearson's.
        draws: Number of resamplings.
        seed: Seed of the resampling.

    Returns:
        The coefficient and its interval; NaN if a measure is constant or fewer than three pairs are finite.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(math.nan, math.nan, math.nan)
    rows = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    found = _coefficients(a[rows], b[rows], rank=rank)
    # Resamples in which a measure is constant have no coefficient (NaN) and are ignored.
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Correlation(float(_coefficients(a[None], b[None], rank=rank)[0]), float(low), float(high))


def _coefficients(a: NDArray[np.float64], b: NDArray[np.float64], *, rank: bool) -> NDArray[np.float64]:
    """Return the correlation coefficient of each row, (draws,); NaN if the row of `a` or `b` is constant."""
    if rank:
        a, b = stats.rankdata(a, axis=1), stats.rankdata(b, axis=1)
    # Test for constant rows before subtracting the mean, whose rounding could hide them.
    constant = (np.ptp(a, axis=1) == 0) | (np.ptp(b, axis=1) == 0)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    a[constant] = np.nan
    coefficients: NDArray[np.float64] = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return coefficients
