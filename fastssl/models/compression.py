"""Training of sequence compressors (Once-for-All, arXiv 2211.02332): draw rates, and add the compressor's losses."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastssl.data.segments import FrameSegments
from fastssl.models.config import CompressedConfig, CompressorConfig
from fastssl.models.losses import add_weighted
from fastssl.nn.compression import Compressed, Kind, SequenceCompressor
from fastssl.nn.rates import draw_rates
from fastssl.nn.segmentation import quantity_loss, segmentation_losses


def make_compressor(config: CompressorConfig, channels: int) -> SequenceCompressor:
    """Make the compressor that a config describes.

    If the config trains for a single rate or period, the compressor is set to that value.

    Args:
        config: Kind of compressor, factor, and range of rates or periods; `config.compressor` must not be "none".
        channels: C, the number of channels of the frames to compress.
    """
    compressor = SequenceCompressor(
        channels,
        kind=cast(Kind, config.compressor),
        factor=None if config.draws_rates else config.compressor_factor,
        input_period_ms=config.frame_period_ms,
    )
    low, high = config.compression_range
    if config.draws_rates and low == high:
        if config.compression_draw == "rate":
            compressor.rate = low
        else:
            compressor.frame_period_ms = low
    return compressor


def draw_compression(config: CompressedConfig, keys: Tensor) -> dict[str, Tensor]:
    """Draw how strongly to compress each utterance of a training batch.

    Args:
        config: The range to draw from, and whether to draw a rate or a frame period.
        keys: (B,) int64 from `nn.random.utterance_keys` or `draw_keys`; equal keys give equal draws.

    Returns:
        Keyword arguments for the encoder: `rate` or `frame_period_ms` (in milliseconds), (B,) fp32. Empty if the kind
        of compressor has a fixed factor.
    """
    if not config.draws_rates:
        return {}
    drawn = draw_rates(keys[:1].expand_as(keys) if config.compression_per_batch else keys, *config.compression_range)
    return {"rate" if config.compression_draw == "rate" else "frame_period_ms": drawn}


class CompressionScores(NamedTuple):
    """Losses and frame period of a compressor, summed over utterances, each weighted by its number of masked frames.

    Attributes:
        segment_loss: () fp32, segment loss (`nn.segmentation.segmentation_losses`); 0 without segments.
        frame_loss: () fp32, frame loss from the same function; 0 without segments.
        quantity_loss: () fp32, distance between the share of frames kept and `config.quantity_share`.
        frame_period_ms: () fp32, mean frame period after compression, in milliseconds.
    """

    segment_loss: Tensor
    frame_loss: Tensor
    quantity_loss: Tensor
    frame_period_ms: Tensor


def with_compression_loss(
    loss: Tensor,
    config: CompressedConfig,
    compressed: Compressed,
    masked: Tensor,
    segments: FrameSegments | None,
) -> tuple[Tensor, CompressionScores | None]:
    """Add the weighted losses of an integrate-and-fire compressor to a loss.

    Args:
        loss: () fp32, the loss of the objective, summed over masked frames.
        config: Weights of the compressor's losses, and the share of frames to keep.
        compressed: Result of the compressor.
        masked: (B,) weight of each utterance in the sums: its number of masked frames (distillation: all its frames).
        segments: Segments of the N input frames, which teach the compressor where to fire; None leaves the segment and
            frame losses at 0.

    Returns:
        The total loss, and the compressor's scores, detached. For a compressor with a fixed factor, `loss` unchanged
        and None.
    """
    if compressed.weights is None or compressed.learned_weights is None:  # a fixed factor
        return loss, None
    layout = compressed.layout
    if segments is None:
        segment = frame = torch.zeros_like(masked)
    else:
        segment, frame = segmentation_losses(
            compressed.learned_weights, layout, weights=segments.weights, ends=segments.ends
        )
    quantity = quantity_loss(compressed.weights, layout, share=config.quantity_share)
    period_ms = config.frame_period_ms * layout.device_lengths / compressed.frames.layout.divisors
    scores = CompressionScores(*(torch.sum(of_each * masked) for of_each in (segment, frame, quantity, period_ms)))
    loss = add_weighted(
        loss,
        (config.segment_loss_weight, scores.segment_loss),
        (config.frame_loss_weight, scores.frame_loss),
        (config.quantity_loss_weight, scores.quantity_loss),
    )
    return loss, CompressionScores(*(score.detach() for score in scores))
