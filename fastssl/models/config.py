"""Settings shared by all encoders, and the settings for training a compressor and for masking."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastssl.models.bounds import bounded, check_bounds, declared
from fastssl.models.folder import SAMPLE_RATE_HZ
from fastssl.nn.compression import KINDS
from fastssl.reading import brief

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class Parts(NamedTuple):
    """Multiply-accumulates for one utterance, by part of the encoder, without sequence compression.

    Attributes:
        frames: Number of front-end frames.
        front_end: Multiply-accumulates of the front end.
        c_in: Number of channels of the frames that a compressor would receive.
        per_frame: Multiply-accumulates per frame after the front end, without those of attention between frames, which
            grow with the square of the number of frames.
    """

    frames: int
    front_end: int
    c_in: int
    per_frame: int


@dataclass(frozen=True)
class CompressorConfig:
    """How an encoder compresses its sequence of frames, if at all, and the rates that it is trained at.

    Args:
        compressor: Kind of `nn.SequenceCompressor` that shortens the front end's output; "none" keeps every frame.
            Transformers has no compressor and opens such an encoder without it.
        compressor_factor: Number of frames merged into one, for "average" and "strided".
        compression_draw: What integrate-and-fire draws for each utterance in training: the "rate" (lambda), or the
            frame "period", which determines the utterance's rate.
        compression_range: Lowest and highest rate (0 to 2) or period (in milliseconds); training draws uniformly
            between them. Two equal numbers train at that value only, and the encoder then uses it by default.

    Raises:
        ValueError: A value is out of bounds, or values do not fit together.
    """

    compressor: str = bounded("none", choices=("none", *KINDS))
    compressor_factor: int = bounded(1, least=1, ceiling=1024)
    compression_draw: str = bounded("rate", choices=("rate", "period"))
    compression_range: tuple[float, ...] = bounded((0.0, 1.0), least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.compressor_factor != 1 and self.compressor not in ("average", "strided"):
            raise ValueError(
                f"compressor_factor: must be 1 unless compressor is 'average' or 'strided', "
                f"got {self.compressor_factor} with compressor={self.compressor!r}"
            )
        limits = (0.0, 2.0) if self.compression_draw == "rate" else (self.frame_period_ms, math.inf)
        numbers = self.compression_range
        if len(numbers) != 2 or not limits[0] <= numbers[0] <= numbers[1] <= limits[1]:
            raise ValueError(
                f"compression_range: must be two numbers from {limits[0]:g} to {limits[1]:g}, the smaller one first "
                f"(compression_draw is {self.compression_draw}), got {list(numbers)}"
            )

    @property
    def draws_rates(self) -> bool:
        """Whether the compressor can run at any rate (integrate-and-fire), so that training draws rates at random."""
        return self.compressor == "integrate-and-fire"

    @property
    def meets_all_frames(self) -> bool:
        """Whether training includes the uncompressed case, where every front-end frame reaches the layers."""
        if self.draws_rates:
            return self.compression_range[0] <= (0.0 if self.compression_draw == "rate" else self.frame_period_ms)
        return self.compressor_factor == 1

    @property
    def samples_per_frame(self) -> int:
        """Number of samples, at 16 kHz, from one front-end frame to the next."""
        raise NotImplementedError

    @property
    def frame_period_ms(self) -> float:
        """Time from one front-end frame to the next, in milliseconds."""
        return 1000 * self.samples_per_frame / SAMPLE_RATE_HZ


#: Names of the compressor's settings, which the config.json of an `Encoder` without a compressor leaves out.
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
    """The settings shared by `EncoderConfig` and `ConformerConfig`, named as in Transformers' configs.

    Args:
        hidden_size: Width of the layers.
        num_hidden_layers: Number of layers.
        num_attention_heads: Attention heads per layer.
        intermediate_size: Inner width of the feed-forward blocks.
        hidden_dropout: Dropout on the output of each block and on the input of the first layer.
        attention_dropout: Dropout on attention probabilities.
        activation_dropout: Dropout inside the feed-forward blocks.
        layerdrop: Probability of skipping a layer in training.
        conv_dim: Output channels of each front-end convolution.
        layer_norm_eps: Number added to the variance in layer norms.
        do_normalize: Scale each waveform to zero mean and unit variance before the encoder.
        model_type: Name of the architecture in `config.json`.

    Raises:
        ValueError: A value is out of bounds, or values do not fit together.
    """

    hidden_size: int = bounded(768, least=1, ceiling=65_536)
    num_hidden_layers: int = bounded(12, least=0, ceiling=1024)
    num_attention_heads: int = bounded(12, least=1, ceiling=65_536)
    intermediate_size: int = bounded(3072, least=1, ceiling=1_048_576)
    hidden_dropout: float = bounded(0.1, least=0, below=1)
    attention_dropout: float = bounded(0.1, least=0, below=1)
    activation_dropout: float = bounded(0.1, least=0, below=1)
    layerdrop: float = bounded(0.1, least=0, below=1)
    conv_dim: tuple[int, ...] = bounded((512,) * 7, least=1, ceiling=65_536)
    layer_norm_eps: float = bounded(1e-5, above=0)
    do_normalize: bool = True
    model_type: str = "wav2vec2"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """Make a config from a `config.json`, or from the `model` section of a run's `config.yaml`.

        Unknown keys are ignored, and missing keys take their defaults.

        Args:
            values: Settings by name, as parsed from JSON or YAML.

        Raises:
            ValueError: A value is out of bounds or not supported.
        """
        return _from_dict(cls, values)

    @property
    def receptive_field_samples(self) -> int:
        """Number of samples, at 16 kHz, that one front-end frame depends on."""
        raise NotImplementedError

    @property
    def feature_width(self) -> int:
        """Number of channels of the encoder's features."""
        return self.hidden_size

    @property
    def feature_period_ms(self) -> float:
        """Time from one frame of the encoder's features to the next, in milliseconds, as if nothing was compressed."""
        return self.frame_period_ms

    @property
    def num_modules(self) -> int:
        """Number of layers or of convolutions, whichever is larger; a model has at least as many weights."""
        return max(self.num_hidden_layers, len(self.conv_dim))

    def count_parts(self, samples: int) -> Parts:
        """Count the multiply-accumulates for one utterance, as if the encoder had no compressor.

        Args:
            samples: Length of the utterance, in samples at 16 kHz.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CompressedConfig(CompressorConfig):
    """How to train an encoder's compressor, if it has one (Once-for-All Sequence Compression, arXiv 2211.02332).

    A system's config inherits from this class and from the config of its encoder.

    Args:
        compression_per_batch: Draw one rate or period for the whole batch, as the authors' code does, instead of one
            for each utterance.
        segment_loss_weight: Weight of the loss that makes frames fire where segments end (needs data.segments).
        frame_loss_weight: Weight of the loss that pulls the weight of each frame towards 1 / (number of frames in its
            segment) (needs data.segments).
        quantity_loss_weight: Weight of the loss that pulls the share of frames kept towards quantity_share.
        quantity_share: Share of frames to keep, from 0 to 1; used by the quantity loss only.

    Raises:
        ValueError: A value is out of bounds, or `model_type` is not that of the system's encoder.
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
            raise ValueError(f"model_type: this system trains a {own} encoder, got {brief(given)}")


@dataclass(frozen=True)
class MaskedConfig(CompressedConfig):
    """How to mask spans of frames (`nn.masking.sample_span_mask`; wav2vec 2.0, arXiv 2006.11477, section 3.1).

    Args:
        mask_time_prob: Share of frames that would be masked if spans did not overlap.
        mask_time_length: Length of a masked span, in frames.
        mask_time_min_masks: Smallest number of spans per utterance.
    """

    mask_time_prob: float = bounded(0.65, least=0, most=1)
    mask_time_length: int = bounded(10, least=1, ceiling=1_048_576)
    mask_time_min_masks: int = bounded(2, least=0, ceiling=65_536)
