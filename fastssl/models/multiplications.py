"""How many multiplications an encoder takes, and how many of them sequence compression can spare."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.folder import SAMPLE_RATE_HZ

_EXAMPLE_S = 10.0


class Multiplications(NamedTuple):
    """Multiply-accumulates of one utterance, forward; spectra, norms, activations and softmax are left out."""

    front_end: int  # convolutions, and what weighs frames for compression: at the full frame rate
    transformer: int  # projection, positional convolution and layers: at the rate that is left

    @property
    def total(self) -> int:
        """Of both."""
        return self.front_end + self.transformer


def count_multiplications(
    config: SpeechEncoderConfig, *, seconds: float, frame_period_ms: float | None = None
) -> Multiplications:
    """Multiply-accumulates of an utterance.

    Args:
        config: Of the encoder.
        seconds: Length of the utterance.
        frame_period_ms: Mean period of the frames that are left; None is that of the front end, or of the factor of its
            compressor.
    """
    frames, front_end, c_in, per_frame = config.count_parts(int(seconds * SAMPLE_RATE_HZ))
    if config.compressor == "integrate-and-fire":
        front_end += frames * c_in * (5 * c_in + 1)
    elif config.compressor == "strided":
        front_end += frames * c_in * c_in
    left = frames / config.compressor_factor
    if frame_period_ms is not None:
        left = frames * config.frame_period_ms / frame_period_ms
    attention = config.num_hidden_layers * 2 * left * config.hidden_size
    return Multiplications(front_end, round(left * (per_frame + attention)))


def convolve(
    frames: int, c_in: int, channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int]
) -> tuple[int, int]:
    """Frames that convolutions leave of so many with `c_in` channels, and the multiply-accumulates that they take."""
    total = 0
    for c_out, kernel, stride in zip(channels, kernels, strides, strict=True):
        frames = max(0, (frames - kernel) // stride + 1)
        total += frames * c_in * c_out * kernel
        c_in = c_out
    return frames, total


def describe_compression(config: SpeechEncoderConfig) -> str:
    """How frames become fewer, and what that spares of the multiplications for ten seconds, for a model card.

    Args:
        config: Of an encoder with a compressor.
    """
    plain = count_multiplications(replace(config, compressor="none", compressor_factor=1), seconds=_EXAMPLE_S)

    def spared(frame_period_ms: float | None) -> str:
        found = count_multiplications(config, seconds=_EXAMPLE_S, frame_period_ms=frame_period_ms)
        return f"{100 * (1 - found.total / plain.total):.0f} %"

    fixed = 100 * plain.front_end / plain.total
    what = f"Of the multiplications for {_EXAMPLE_S:g} s the convolutions take {fixed:.0f} %, which nothing here spares"
    if config.compressor != "integrate-and-fire":
        return f"{config.compressor}, {config.compressor_factor} frames to one. {what}; this spares {spared(None)}"
    low, high = config.compression_range
    unit = "a rate" if config.compression_draw == "rate" else "a frame period in ms"
    trained = f"trained at {unit} of {low:g}" + (
        ", at which it is without them" if low == high else f" to {high:g}; without them the rate is 1"
    )
    twice, four_times = 2 * config.frame_period_ms, 4 * config.frame_period_ms
    return (
        f"integrate-and-fire, at a rate or frame period given at run time (`rate=`, `frame_period_ms=`), {trained}. "
        f"{what}; a frame every {twice:g} ms spares {spared(twice)}, every {four_times:g} ms {spared(four_times)}"
    )
