"""Count the multiplications of an encoder, and those that sequence compression saves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.folder import SAMPLE_RATE_HZ

_EXAMPLE_S = 10.0


class Multiplications(NamedTuple):
    """Multiply-accumulates for one utterance in a forward pass, not counting spectra, norms, activations or softmax.

    Attributes:
        front_end: Everything that runs at the full frame rate: the front end, and the compressor's own network.
        transformer: Everything after the compressor, which runs on the frames that are left.
    """

    front_end: int
    transformer: int

    @property
    def total(self) -> int:
        """Sum of both parts."""
        return self.front_end + self.transformer


def count_multiplications(
    config: SpeechEncoderConfig, *, seconds: float, frame_period_ms: float | None = None
) -> Multiplications:
    """Count the multiply-accumulates of an encoder for one utterance.

    Args:
        config: Shape of the encoder.
        seconds: Length of the utterance, in seconds.
        frame_period_ms: Mean frame period after compression, in milliseconds; None takes the front end's period times
            `config.compressor_factor`.
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
    """Count the output frames and the multiply-accumulates of a stack of convolutions without padding.

    Args:
        frames: Number of input frames.
        c_in: Number of input channels.
        channels: Output channels of each convolution.
        kernels: Kernel size of each convolution.
        strides: Stride of each convolution.

    Returns:
        Number of output frames, and number of multiply-accumulates.
    """
    total = 0
    for c_out, kernel, stride in zip(channels, kernels, strides, strict=True):
        frames = max(0, (frames - kernel) // stride + 1)
        total += frames * c_in * c_out * kernel
        c_in = c_out
    return frames, total


def describe_compression(config: SpeechEncoderConfig) -> str:
    """Describe an encoder's compressor for a model card, with the share of multiplications it saves on 10 s of audio.

    Args:
        config: Shape of an encoder with a compressor.
    """
    plain = count_multiplications(replace(config, compressor="none", compressor_factor=1), seconds=_EXAMPLE_S)

    def spared(frame_period_ms: float | None) -> str:
        found = count_multiplications(config, seconds=_EXAMPLE_S, frame_period_ms=frame_period_ms)
        return f"{100 * (1 - found.total / plain.total):.0f} %"

    fixed = 100 * plain.front_end / plain.total
    what = (
        f"Compression cannot reduce the front end's {fixed:.0f} % of the multiplications for {_EXAMPLE_S:g} s of audio"
    )
    if config.compressor != "integrate-and-fire":
        return f"{config.compressor}, {config.compressor_factor} frames to one. {what}; it saves {spared(None)}"
    low, high = config.compression_range
    unit = "a rate" if config.compression_draw == "rate" else "a frame period in ms"
    trained = f"trained at {unit} of {low:g}" + (
        ", which is the default" if low == high else f" to {high:g}; the default is rate 1"
    )
    twice, four_times = 2 * config.frame_period_ms, 4 * config.frame_period_ms
    return (
        f"integrate-and-fire, at a rate or frame period given at run time (`rate=`, `frame_period_ms=`), {trained}. "
        f"{what}; a frame every {twice:g} ms saves {spared(twice)}, every {four_times:g} ms {spared(four_times)}"
    )
