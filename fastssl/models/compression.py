"""Once-for-all sequence compression in training (arXiv 2211.02332): rates to draw, boundaries to learn."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.models.compressor import CompressorConfig
from fastssl.nn.compression import Compressed
from fastssl.nn.rates import draw_rates
from fastssl.nn.segmentation import quantity_loss, segmentation_losses


@dataclass(frozen=True)
class CompressedConfig(CompressorConfig):
    """How the compressor of an encoder is trained, where it has one; to be inherited beside the encoder's own settings.

    Args:
        compression_per_batch: One draw for all utterances of a batch, as the authors' code has it.
        segment_loss_weight: Weight of the loss that wants frames to fire where segments end (`data.segments`).
        frame_loss_weight: Weight of the loss that wants a frame's weight to be one over the length of its segment.
        quantity_loss_weight: Weight of the distance from `quantity_share`.
        quantity_share: Share of frames that is wanted.
    """

    compression_per_batch: bool = False
    segment_loss_weight: float = 0.05
    frame_loss_weight: float = 0.5
    quantity_loss_weight: float = 0.0
    quantity_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segment_loss_weight", "frame_loss_weight", "quantity_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not 0 < self.quantity_share <= 1:
            raise ValueError(f"quantity_share: must be above 0 and at most 1, got {self.quantity_share}")

    @property
    def draws_rates(self) -> bool:
        """Whether the compressor is one of any rate."""
        return self.compressor == "integrate-and-fire"


class Draw(NamedTuple):
    """Of each utterance (B,): what the encoder is called with; None where it takes none."""

    rate: Tensor | None
    frame_period_ms: Tensor | None


def draw_compression(config: CompressedConfig, keys: Tensor) -> Draw:
    """What a batch is compressed by in training.

    Args:
        config: Says from which range.
        keys: (B,) of the utterances.
    """
    if not config.draws_rates:
        return Draw(None, None)
    drawn = draw_rates(keys[:1].expand_as(keys) if config.compression_per_batch else keys, *config.compression_range)
    return Draw(drawn, None) if config.compression_draw == "rate" else Draw(None, drawn)


class CompressionScores(NamedTuple):
    """Sums over utterances, each counted as often as it has masked frames; () fp32."""

    segment_loss: Tensor
    frame_loss: Tensor
    quantity_loss: Tensor
    frame_period_ms: Tensor


def with_compression_loss(
    loss: Tensor,
    config: CompressedConfig,
    compressed: Compressed | None,
    masked: Tensor,
    *,
    segment_weights: Tensor | None,
    segment_ends: Tensor | None,
) -> tuple[Tensor, CompressionScores | None]:
    """The loss and those of a compressor, each by its weight; and what is reported of it, if it has rates.

    Args:
        loss: () fp32.
        config: Has the weights, and says which share of frames is wanted.
        compressed: What the compressor made; None where there is none.
        masked: (B,) how often each utterance counts.
        segment_weights: (N,) of `segmentation_losses`; None for no guidance.
        segment_ends: (N,) likewise.
    """
    if compressed is None or not config.draws_rates:
        return loss, None
    assert compressed.weights is not None
    assert compressed.learned_weights is not None
    layout = compressed.layout
    segment = frame = masked.new_zeros(len(masked))
    if segment_weights is not None and segment_ends is not None:
        segment, frame = segmentation_losses(
            compressed.learned_weights, layout, weights=segment_weights, ends=segment_ends
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
