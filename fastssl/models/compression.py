"""Once-for-all sequence compression in training (arXiv 2211.02332): rates to draw, boundaries to learn."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastssl.data.segments import FrameSegments
from fastssl.models.config import CompressedConfig, CompressorConfig
from fastssl.nn.compression import Compressed, Kind, SequenceCompressor
from fastssl.nn.rates import draw_rates
from fastssl.nn.segmentation import quantity_loss, segmentation_losses


def make_compressor(config: CompressorConfig, channels: int) -> SequenceCompressor:
    """The compressor of frames of so many channels, at the rate or period that it is trained for alone, if any."""
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
    """How much a batch is compressed in training.

    Args:
        config: The range to draw from.
        keys: (B,) of the utterances.

    Returns:
        What the encoder is called with: (B,) `rate` or `frame_period_ms`; nothing if its factor is fixed.
    """
    if not config.draws_rates:
        return {}
    drawn = draw_rates(keys[:1].expand_as(keys) if config.compression_per_batch else keys, *config.compression_range)
    return {"rate" if config.compression_draw == "rate" else "frame_period_ms": drawn}


class CompressionScores(NamedTuple):
    """Sums over utterances, each counted as often as it has masked frames; () fp32."""

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
    """The loss and those of a compressor, each by its weight; and what is reported of it, if it has rates.

    Args:
        loss: () fp32.
        config: Has the weights, and says which share of frames is wanted.
        compressed: What the compressor made.
        masked: (B,) how often each utterance counts.
        segments: Segments of the N frames that the compressor should learn; None trains it by the objective alone.
    """
    if compressed.weights is None or compressed.learned_weights is None:  # a fixed factor
        return loss, None
    layout = compressed.layout
    segment = frame = masked.new_zeros(len(masked))
    if segments is not None:
        segment, frame = segmentation_losses(
            compressed.learned_weights, layout, weights=segments.weights, ends=segments.ends
        )
    quantity = quantity_loss(compressed.weights, layout, share=config.quantity_share)
    frames, fewer = layout.device_lengths, compressed.frames.layout.device_lengths
    period_ms = config.frame_period_ms * frames / fewer.clamp(min=1)
    scores = CompressionScores(*(torch.sum(of_each * masked) for of_each in (segment, frame, quantity, period_ms)))
    loss = (
        loss
        + config.segment_loss_weight * scores.segment_loss
        + config.frame_loss_weight * scores.frame_loss
        + config.quantity_loss_weight * scores.quantity_loss
    )
    return loss, CompressionScores(*(score.detach() for score in scores))
