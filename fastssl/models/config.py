"""Settings that every encoder has, and those that train a compressor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastssl.models.bounds import bounded, check_bounds, declared
from fastssl.models.folder import SAMPLE_RATE_HZ
from fastssl.nn.compression import KINDS

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class Parts(NamedTuple):
    """Multiply-accumulates of one utterance, before sequence compression saves any."""

    frames: int  # frames of the front end
    front_end: int
    c_in: int  # channels of these frames, where a compressor takes them
    per_frame: int  # after the front end, for each frame, without attention's products of frames with frames


@dataclass(frozen=True)
class CompressorConfig:
    """Whether an encoder has a compressor, and of which kind.

    Args:
        compressor: Kind of `nn.SequenceCompressor` that shortens the front end's output; "none" keeps every frame.
            Transformers has no compressor and opens such an encoder without it.
        compressor_factor: Number of frames that become one, for "average" and "strided".
        compression_draw: What integrate-and-fire draws for each utterance in training: the "rate" (lambda), or the
            frame "period", from which the utterance's own rate follows.
        compression_range: The two numbers between which rate or period is drawn uniformly: rates from 0 to 2, or
            periods in milliseconds. Twice the same number trains for this one alone, and the encoder then opens at it.
    """

    compressor: str = bounded("none", choices=("none", *KINDS))
    compressor_factor: int = bounded(1, least=1)
    compression_draw: str = bounded("rate", choices=("rate", "period"))
    compression_range: tuple[float, ...] = bounded((0.0, 1.0), least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.compressor_factor != 1 and self.compressor not in ("average", "strided"):
            raise ValueError(f"compressor_factor: is of 'average' and 'strided', got one for {self.compressor!r}")
        limits = (0.0, 2.0) if self.compression_draw == "rate" else (self.frame_period_ms, math.inf)
        numbers = self.compression_range
        if len(numbers) != 2 or not limits[0] <= numbers[0] <= numbers[1] <= limits[1]:
            raise ValueError(
                f"compression_range: must be two rising numbers from {limits[0]:g} to {limits[1]:g} "
                f"(compression_draw is {self.compression_draw}), got {list(numbers)}"
            )

    @property
    def draws_rates(self) -> bool:
        """Whether the compressor serves any rate, and training draws one for each utterance."""
        return self.compressor == "integrate-and-fire"

    @property
    def meets_all_frames(self) -> bool:
        """Whether training sees every frame of the front end, always or at times."""
        if self.draws_rates:
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


#: What a plain encoder does not have.
COMPRESSOR_FIELDS = tuple(field.name for field in fields(CompressorConfig))


def _from_dict(config: type[T], values: Mapping[str, Any]) -> T:
    known: dict[str, Any] = {}
    for name, hint, _ in declared(config):
        if name in values:
            value = values[name]
            if isinstance(value, Mapping) and isinstance(hint, type) and is_dataclass(hint):
                value = _from_dict(hint, value)
            known[name] = tuple(value) if isinstance(value, list) else value
    return config(**known)


@dataclass(frozen=True)
class SpeechEncoderConfig(CompressorConfig):
    """The settings shared by `EncoderConfig` and `ConformerConfig`; names and defaults of Transformers' base models.

    Args:
        hidden_size: Width of the layers.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads of each layer.
        intermediate_size: Width of the feed-forward layers.
        hidden_dropout: Dropout on the output of each block and on the input of the first layer.
        attention_dropout: Dropout on attention probabilities.
        activation_dropout: Dropout inside the feed-forward layers.
        layerdrop: Probability of skipping a layer in training.
        conv_dim: Channels of each convolution of the front end.
        layer_norm_eps: Added to the variance in layer norms.
        do_normalize: Whether waveforms are brought to zero mean and unit variance before the encoder.
        model_type: The architecture.

    Raises:
        ValueError: Values that no encoder has, or that do not fit together.
    """

    hidden_size: int = bounded(768, least=1)
    num_hidden_layers: int = bounded(12, least=0)
    num_attention_heads: int = bounded(12, least=1)
    intermediate_size: int = bounded(3072, least=1)
    hidden_dropout: float = bounded(0.1, least=0, below=1)
    attention_dropout: float = bounded(0.1, least=0, below=1)
    activation_dropout: float = bounded(0.1, least=0, below=1)
    layerdrop: float = bounded(0.1, least=0, below=1)
    conv_dim: tuple[int, ...] = bounded((512,) * 7, least=1)
    layer_norm_eps: float = bounded(1e-5, above=0)
    do_normalize: bool = True
    model_type: str = "wav2vec2"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """Read the values of a `config.json`, or of `model` in a `config.yaml`.

        Unknown keys are ignored, and missing ones take their defaults.

        Raises:
            ValueError: A value is not supported.
        """
        return _from_dict(cls, values)

    @property
    def receptive_field_samples(self) -> int:
        """Samples that one frame of the front end sees."""
        raise NotImplementedError

    def count_parts(self, samples: int) -> Parts:
        """Count the multiplications for an utterance of so many samples, had the encoder no compressor."""
        raise NotImplementedError


@dataclass(frozen=True)
class CompressedConfig(CompressorConfig):
    """How an encoder's compressor is trained, if it has one; a system's config inherits it beside its encoder's.

    Args:
        compression_per_batch: One draw for all utterances of a batch, as the authors' code has it.
        segment_loss_weight: Weight of the loss that wants frames to fire where segments end (`data.segments`).
        frame_loss_weight: Weight of the loss that wants a frame's weight to be one over the length of its segment.
        quantity_loss_weight: Weight of the distance from `quantity_share`.
        quantity_share: Share of frames that is wanted.
    """

    compression_per_batch: bool = False
    segment_loss_weight: float = bounded(0.05, least=0)
    frame_loss_weight: float = bounded(0.5, least=0)
    quantity_loss_weight: float = bounded(0.0, least=0)
    quantity_share: float = bounded(0.25, above=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        given, own = getattr(self, "model_type", None), getattr(type(self), "model_type", None)
        if given != own:
            raise ValueError(f"model_type: this system trains a {own} encoder, got {given!r}")


@dataclass(frozen=True)
class MaskedConfig(CompressedConfig):
    """How spans of frames are masked.

    Args:
        mask_time_prob: Share of frames that would be masked if spans did not overlap.
        mask_time_length: Frames of a masked span.
        mask_time_min_masks: Least number of spans per utterance.
    """

    mask_time_prob: float = bounded(0.65, least=0, most=1)
    mask_time_length: int = bounded(10, least=1)
    mask_time_min_masks: int = bounded(2, least=0)
