"""Smooth the classes of frames into segments, in C++ if the module `_host` is built, else in NumPy."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor


class FrameSegments(NamedTuple):
    """The segments of the T frames of a batch, which teach a compressor where to fire."""

    weights: Tensor  # (T,) fp32, 1 / frames of the segment
    ends: Tensor  # (T,) bool, whether the segment ends with this frame


def smooth_classes(costs: npt.NDArray[np.float32], *, price: float) -> npt.NDArray[np.int64]:
    """Choose one class per frame that minimises the sum of the frames' costs plus a price for each segment.

    A segment is a run of equal classes. The result is the optimum over all segmentations. With squared distances to
    k-means centres it is the duration-penalised segmentation of arXiv 2012.07551 (section 3): its reward of
    lambda (length - 1) per segment equals a price of lambda per segment, up to a constant. The paper tries all pairs of
    segment start and end. Here each frame either keeps the class of the frame before or pays for a change, which finds
    the same optimum in O(T K) steps, because merging neighbouring segments of the same class never raises the cost.

    Args:
        costs: (T, K) float32, all finite: the cost of giving class k to frame t. A term that all classes of a frame
            share, such as the frame's own norm in a squared distance, may be left out.
        price: Cost of each segment, in the unit of `costs`; 0 gives each frame its cheapest class.

    Returns:
        (T,) int64 class of each frame.

    Raises:
        ValueError: `costs` has the wrong shape or dtype or is not finite, or `price` is negative or not finite.
    """
    if costs.ndim != 2 or costs.shape[1] < 1 or costs.dtype != np.float32:
        raise ValueError(f"costs: expected float32 (frames, classes), got {costs.dtype} {costs.shape}")
    if not np.isfinite(costs).all():
        raise ValueError("costs: some are NaN or infinite, expected finite values; check the features they come from")
    if not 0 <= price < math.inf:
        raise ValueError(f"price: must be finite and not negative, got {price}")
    return _smooth(costs, price)


def _smooth_with_numpy(costs: npt.NDArray[np.float32], price: float) -> npt.NDArray[np.int64]:
    frames, classes = costs.shape
    totals = np.zeros(classes)
    cheapest = np.empty(frames, np.int64)
    changes = np.empty((frames, classes), bool)
    for frame, cost in enumerate(costs):
        cheapest[frame] = totals.argmin()
        changed = totals[cheapest[frame]] + price
        changes[frame] = changed < totals
        totals = np.minimum(totals, changed) + cost
    chosen = np.empty(frames, np.int64)
    current = int(totals.argmin())
    for frame in reversed(range(frames)):
        chosen[frame] = current
        if changes[frame, current]:
            current = int(cheapest[frame])
    return chosen


try:
    from fastssl._host import smooth_classes as _smooth
except ImportError:  # `_host` was not built; `fastssl info` says why
    _smooth = _smooth_with_numpy
