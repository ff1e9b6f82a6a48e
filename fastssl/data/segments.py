"""Where one sound ends and the next begins: classes of frames, smoothed into segments; in C++ where it is built."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class FrameSegments(NamedTuple):
    """The segments of the T frames of a batch, from which a compressor learns where to fire."""

    weights: Tensor  # (T,) fp32, 1 / frames of the segment
    ends: Tensor  # (T,) bool, whether the segment ends with this frame

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "FrameSegments":
        """The same segments on another device."""
        return FrameSegments(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def pin_memory(self) -> "FrameSegments":
        """The same segments in page-locked memory."""
        return FrameSegments(*(tensor.pin_memory() for tensor in self))


def smooth_classes(costs: npt.NDArray[np.float32], *, price: float) -> npt.NDArray[np.int64]:
    """A class for each frame, the same over whole segments: least sum of the frames' costs and a price per segment.

    Of all divisions into segments and classes for them this is the best: with squared distances to the centres of
    k-means, the duration-penalised segmentation of arXiv 2012.07551 (section 3), whose reward of lambda (length - 1)
    for a segment is a price of lambda but for a constant. There all pairs of beginning and end are tried; here a frame
    either goes on with the class before it or pays for another, which takes frames x classes steps and comes to the
    same, because neighbouring segments of one class are better one.

    Args:
        costs: (T, K) float32, finite, what it costs that a frame has a class. What all classes of a frame have in
            common, as the frame's own norm in a squared distance, may be left out.
        price: Of a segment, in the unit of the costs; 0 gives each frame the class of least cost.

    Returns:
        (T,) int64.

    Raises:
        ValueError: Shape or dtype do not fit, a cost is not finite, or the price is negative or not finite.
    """
    if costs.ndim != 2 or costs.shape[1] < 1 or costs.dtype != np.float32:
        raise ValueError(f"costs: expected float32 (frames, classes), got {costs.dtype} {costs.shape}")
    if not np.isfinite(costs).all():
        raise ValueError("costs: some are NaN or infinite")
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
except ImportError:  # not built: the reason is in `fastssl info`
    _smooth = _smooth_with_numpy
