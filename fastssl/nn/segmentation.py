"""Losses that teach a compressor where segments end (Once-for-All Sequence Compression, arXiv 2211.02332)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.integrate_and_fire.reference import running_sums
from fastssl.packing import Layout


class SegmentationLosses(NamedTuple):
    """Segmentation losses of each utterance in fp32, not averaged over the batch.

    Attributes:
        segment: (B,) mean absolute difference between the running sums of learned and target weights at segment ends.
        frame: (B,) mean absolute difference between the learned and the target weight of a frame.
    """

    segment: Tensor  # (B,)
    frame: Tensor  # (B,)


def segmentation_losses(
    learned: Tensor,  # (N,)
    layout: Layout,
    *,
    weights: Tensor,  # (N,)
    ends: Tensor,  # (N,)
) -> SegmentationLosses:
    """Compute segment and frame loss of unmixed weights, as in the code of the paper's authors (arXiv 2211.02332).

    The segment loss pulls the sum of the weights towards j at the end of the j-th segment, so that a frame fires there.
    If a crop begins inside a segment, all targets are lower by the share of that segment before the crop.

    Args:
        learned: (N,) learned weight alpha of each frame, `Compressed.learned_weights`.
        layout: Where each utterance begins.
        weights: (N,) target weight of each frame: 1 / (number of frames of its segment). Count the whole segment, even
            if the crop contains only a part of it.
        ends: (N,) bool, True at the last frame of each segment.

    Returns:
        Both losses of each utterance, (B,) fp32.

    Raises:
        ValueError: `learned`, `weights` or `ends` does not have shape (N,).
    """
    for name, tensor in (("learned", learned), ("weights", weights), ("ends", ends)):
        if tensor.shape != (layout.total,):
            raise ValueError(f"{name}: expected ({layout.total},) for this layout, got {tuple(tensor.shape)}")
    # On a GPU, each call is a launch, so both weights are summed by one scan, and three values by one sum.
    learned_ends, target_ends = running_sums(torch.stack((learned, weights), 1), layout).unbind(1)
    is_end = ends.double()
    apart = (learned_ends - target_ends).abs() * is_end
    by_frame = torch.stack((is_end, apart, (learned - weights.to(learned)).abs()), 1)
    segments, of_segments, of_frames = layout.sums(by_frame).unbind(1)
    return SegmentationLosses(
        (of_segments / segments.detach().clamp(min=1)).float(),
        (of_frames / layout.divisors).float(),
    )


def quantity_loss(weights: Tensor, layout: Layout, *, share: float) -> Tensor:  # (N,) -> (B,)
    """Compute the absolute difference between the share of frames that an utterance keeps and the target share.

    The authors of arXiv 2211.02332 call it `card` in their code.

    Args:
        weights: (N,) mixed weight alpha' of each frame, `Compressed.weights`.
        layout: Where each utterance begins.
        share: Target share of frames; 0.25 keeps one frame in four, a period of 80 ms for input frames of 20 ms.

    Returns:
        (B,) fp32; 0 for an utterance without frames.
    """
    kept = layout.sums(weights) / layout.divisors
    return ((kept - share).abs() * (layout.device_lengths > 0)).float()
