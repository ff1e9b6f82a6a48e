"""How many multiplications an encoder takes, and how many of them sequence compression can spare."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

from fastssl.models.folder import CONFORMER, SAMPLE_RATE_HZ
from fastssl.nn.log_mel import HOP_SAMPLES, WINDOW_SAMPLES

if TYPE_CHECKING:
    from fastssl.models.conformer import ConformerConfig
    from fastssl.models.encoder import EncoderConfig

_EXAMPLE_S = 10.0


class Operations(NamedTuple):
    """Multiply-accumulates of one utterance, forward; spectra, norms, activations and softmax are left out."""

    front_end: int  # convolutions, and what weighs frames for compression: at the full frame rate
    transformer: int  # projection, positional convolution and layers: at the rate that is left

    @property
    def total(self) -> int:
        """Of both."""
        return self.front_end + self.transformer


def count_operations(
    config: "EncoderConfig | ConformerConfig", *, seconds: float, frame_period_ms: float | None = None
) -> Operations:
    """Multiply-accumulates of an utterance.

    Args:
        config: Of the encoder.
        seconds: Length of the utterance.
        frame_period_ms: Mean period of the frames that are left; None is that of the front end, or of the factor of its
            compressor.
    """
    samples = int(seconds * SAMPLE_RATE_HZ)
    if config.model_type == CONFORMER:
        frames, front_end, c_in, per_frame = _of_conformer(cast("ConformerConfig", config), samples)
    else:
        frames, front_end, c_in, per_frame = _of_transformer(cast("EncoderConfig", config), samples)
    if config.compressor == "integrate-and-fire":
        front_end += frames * c_in * (5 * c_in + 1)
    elif config.compressor == "strided":
        front_end += frames * c_in * c_in
    left = frames / config.compressor_factor
    if frame_period_ms is not None:
        left = frames * config.frame_period_ms / frame_period_ms
    attention = config.num_hidden_layers * 2 * left * config.hidden_size
    return Operations(front_end, round(left * (per_frame + attention)))


class _Parts(NamedTuple):
    """What the two kinds of encoders differ in."""

    frames: int  # of the front end
    front_end: int
    c_in: int  # channels of these frames, where a compressor takes them
    per_frame: int  # behind it, but for attention's products of frames with frames


def _of_transformer(config: "EncoderConfig", samples: int) -> _Parts:
    frames, front_end = _convolve(samples, 1, config.conv_dim, config.conv_kernel, config.conv_stride)
    c_in, width, inner = config.conv_dim[-1], config.hidden_size, config.intermediate_size
    kernel = config.num_conv_pos_embeddings  # of data2vec-audio, how many there are
    if config.model_type == "data2vec-audio":
        kernel *= config.conv_pos_kernel_size
    positions = width * width // config.num_conv_pos_embedding_groups * kernel
    layer = 4 * width * width + 2 * width * inner
    return _Parts(frames, front_end, c_in, c_in * width + positions + config.num_hidden_layers * layer)


def _of_conformer(config: "ConformerConfig", samples: int) -> _Parts:
    mel = max(0, (samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)
    frames, front_end = _convolve(mel, config.num_mel_bins, config.conv_dim, config.conv_kernel, config.conv_stride)
    width, inner = config.hidden_size, config.intermediate_size
    convolutions = 3 * width * width + width * config.conv_depthwise_kernel_size
    layer = 4 * width * width + 4 * width * inner + convolutions
    front_end += frames * config.conv_dim[-1] * width
    return _Parts(frames, front_end, width, config.num_hidden_layers * layer)


def _convolve(
    frames: int, c_in: int, channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int]
) -> tuple[int, int]:
    """Frames that are left, and multiply-accumulates."""
    total = 0
    for c_out, kernel, stride in zip(channels, kernels, strides, strict=True):
        frames = max(0, (frames - kernel) // stride + 1)
        total += frames * c_in * c_out * kernel
        c_in = c_out
    return frames, total


def describe_compression(config: "EncoderConfig | ConformerConfig") -> str:
    """How frames become fewer, and what that spares of the multiplications for ten seconds, for a model card.

    Args:
        config: Of an encoder with a compressor.
    """
    plain = count_operations(replace(config, compressor="none", compressor_factor=1), seconds=_EXAMPLE_S)

    def spared(frame_period_ms: float | None) -> str:
        found = count_operations(config, seconds=_EXAMPLE_S, frame_period_ms=frame_period_ms)
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
