"""Losses that show a compressor where segments end (Once-for-All Sequence Compression, arXiv 2211.02332)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.integrate_and_fire.reference import fire_positions
from fastssl.packing import Layout


class SegmentationLosses(NamedTuple):
    """Of each utterance, so that batches add up however they are divided; fp32."""

    segment: Tensor  # (B,) how far the sums of learned weights and of segments are apart where segments end; mean
    frame: Tensor  # (B,) how far the two weights of a frame are apart; mean over its frames


def segmentation_losses(
    learned: Tensor,  # (N,)
    layout: Layout,
    *,
    weights: Tensor,  # (N,)
    ends: Tensor,  # (N,)
) -> SegmentationLosses:
    """The segment and the frame loss of the authors' code, on the weights before a rate mixes them.

    The first wants a frame to fire where a segment ends: at the j-th end the weights have added up to j. A crop that
    begins within a segment begins with the share of it that is left.

    Args:
        learned: alpha of each frame, `Compressed.learned_weights`.
        layout: Where each utterance begins.
        weights: One over the frames of the segment that a frame lies in, of the whole segment, also where the crop
            ends before it does.
        ends: bool, where a segment ends with the frame.

    Raises:
        ValueError: A shape does not fit.
    """
    for name, tensor in (("learned", learned), ("weights", weights), ("ends", ends)):
        if tensor.shape != (layout.total,):
            raise ValueError(f"{name}: expected ({layout.total},) for this layout, got {tuple(tensor.shape)}")
    apart = (fire_positions(learned, layout, 1.0) - fire_positions(weights, layout, 1.0)).abs()
    segments = layout.sums(ends).clamp(min=1)
    frames = layout.device_lengths.clamp(min=1)
    return SegmentationLosses(
        (layout.sums(torch.where(ends, apart, 0.0)) / segments).float(),
        (layout.sums((learned - weights.to(learned)).abs()) / frames).float(),
    )


def quantity_loss(weights: Tensor, layout: Layout, *, share: float) -> Tensor:  # (N,) -> (B,)
    """How far the share of frames that an utterance keeps is from the one wanted (the authors' `card`); fp32.

    Args:
        weights: alpha' of each frame, `Compressed.weights`.
        layout: Where each utterance begins.
        share: Wanted; 0.25 is one frame of four, 80 ms.
    """
    frames = layout.device_lengths
    kept = layout.sums(weights) / frames.clamp(min=1)
    return torch.where(frames > 0, (kept - share).abs(), 0.0).float()
