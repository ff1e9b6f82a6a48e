"""A sequence compressor as a part of an encoder, between its front end and its layers."""

import math
from dataclasses import dataclass, fields
from typing import cast

from torch import Tensor

from fastssl.models.folder import SAMPLE_RATE_HZ
from fastssl.nn.compression import KINDS, Compressed, Kind, SequenceCompressor
from fastssl.packing import Packed


@dataclass(frozen=True)
class CompressorConfig:
    """Whether an encoder has a compressor, and of which kind.

    Args:
        compressor: What makes fewer frames of the front end's, a kind of `nn.SequenceCompressor`; "none" leaves them.
            Not of Transformers, which opens such an encoder without it.
        compressor_factor: Of "average" and "strided".
        compression_draw: Of integrate-and-fire, what is drawn for each utterance in training: the "rate" (lambda), or
            the frame "period", from which the utterance's own rate follows.
        compression_range: Between which numbers, uniformly: of the rate within 0 and 2, of the period in milliseconds.
            Twice the same number trains for this one alone, at which the encoder is opened then.
    """

    compressor: str = "none"
    compressor_factor: int = 1
    compression_draw: str = "rate"
    compression_range: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.compressor not in ("none", *KINDS):
            raise ValueError(f"compressor: {self.compressor!r} is none of none, {', '.join(KINDS)}")
        if self.compressor_factor != 1 and self.compressor not in ("average", "strided"):
            raise ValueError(f"compressor_factor: is of 'average' and 'strided', got one for {self.compressor!r}")
        if self.compression_draw not in ("rate", "period"):
            raise ValueError(f"compression_draw: must be rate or period, got {self.compression_draw!r}")
        limits = (0.0, 2.0) if self.compression_draw == "rate" else (self.frame_period_ms, math.inf)
        numbers = self.compression_range
        if len(numbers) != 2 or not limits[0] <= numbers[0] <= numbers[1] <= limits[1] or math.isinf(numbers[1]):
            raise ValueError(
                f"compression_range: must be two rising numbers from {limits[0]:g} to {limits[1]:g} "
                f"(compression_draw is {self.compression_draw}), got {list(numbers)}"
            )

    @property
    def meets_all_frames(self) -> bool:
        """Whether every frame of the front end is left at times in training, or always."""
        if self.compressor == "integrate-and-fire":
            return self.compression_range[0] <= (0.0 if self.compression_draw == "rate" else self.frame_period_ms)
        return self.compressor_factor == 1

    @property
    def samples_per_frame(self) -> int:
        """Samples from one frame of the front end to the next."""
        raise NotImplementedError

    @property
    def frame_period_ms(self) -> float:
        """Milliseconds from one frame of the front end to the next."""
        return 1000 * self.samples_per_frame / SAMPLE_RATE_HZ


#: What a plain encoder has not.
COMPRESSOR_FIELDS = tuple(field.name for field in fields(CompressorConfig))


def make_compressor(config: CompressorConfig, channels: int) -> SequenceCompressor | None:
    """The compressor of frames of so many channels, at the rate or period that it is for alone, or None."""
    if config.compressor == "none":
        return None
    compressor = SequenceCompressor(
        channels,
        kind=cast(Kind, config.compressor),
        factor=None if config.compressor == "integrate-and-fire" else config.compressor_factor,
        input_period_ms=config.frame_period_ms,
    )
    low, high = config.compression_range
    if config.compressor == "integrate-and-fire" and low == high:
        if config.compression_draw == "rate":
            compressor.rate = low
        else:
            compressor.frame_period_ms = low
    return compressor


def compress(
    compressor: SequenceCompressor | None,
    frames: Packed,
    *,
    rate: float | Tensor | None,
    frame_period_ms: float | Tensor | None,
) -> tuple[Packed, Compressed | None]:
    """What goes on of the front end's frames.

    Args:
        compressor: The encoder's.
        frames: (N, C).
        rate: As of `SequenceCompressor`.
        frame_period_ms: Likewise.

    Raises:
        ValueError: A rate or a period is out of range, or there is no compressor that takes one.
    """
    if compressor is not None:
        compressed = compressor(frames, rate=rate, frame_period_ms=frame_period_ms)
        return compressed.frames, compressed
    if rate is not None or frame_period_ms is not None:
        raise ValueError("rate and frame_period_ms: this encoder has no compressor")
    return frames, None
