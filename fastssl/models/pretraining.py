"""What every pre-training system has: its interface to the training loop, an encoder, and a head.

A system is one file of this folder: a config, a `PretrainingModel` that declares what it needs, its `step`, its scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fastssl.data.segments import FrameSegments
from fastssl.models.compression import CompressionScores, draw_compression, with_compression_loss
from fastssl.models.config import CompressedConfig, MaskedConfig, SpeechEncoderConfig
from fastssl.models.folder import read_config, read_weights
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.compression import Compressed
from fastssl.nn.masking import sample_span_mask
from fastssl.packing import Layout, Packed

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastssl.data.batches import AudioBatch


class Needs(NamedTuple):
    """What a system's step needs in addition to waveforms. The training loop supplies it.

    Segments are not declared: every system with a trained compressor takes them, and trains without them too.
    """

    labels: bool = False  # `batch.labels`, one of `config.num_clusters` classes for each frame
    teacher: bool = False  # `context.teacher`; the config is a `StudentConfig`
    noise: bool = False  # `batch.noise` if the user names recordings of noise; the config is a `NoisyConfig`


class StudentConfig(Protocol):
    """What the config of a system that needs a teacher has in addition."""

    @property
    def targets(self) -> tuple[int, ...]:
        """Layers of the teacher that the student predicts; 0 is the input of the first layer."""

    def of_teacher(self, teacher: Any) -> Any:
        """The same student with the settings that the teacher's config decides.

        Raises:
            ValueError: This teacher cannot teach this student.
        """

    def keeps_front_end(self, teacher: Any) -> bool:
        """Whether the student's convolutions start as the teacher's and stay frozen."""


class NoisyConfig(Protocol):
    """What the config of a system that takes noise has in addition."""

    @property
    def noise_share(self) -> float:
        """The fraction of training utterances to read a recording of noise for."""


class TeacherOutput(Protocol):
    """The source of a student's targets."""

    def of(self, batch: "AudioBatch") -> tuple[Packed | None, Sequence[Tensor]]:
        """Front-end frames (N, C) if the student shares them, and the target layers, each (N, D)."""


class StepContext(NamedTuple):
    """What a training step depends on besides the batch."""

    keys: Tensor  # (B,) int64, `nn.random.utterance_keys`: masks, negatives and noise of an utterance follow from it
    update: int  # number of finished updates, for schedules
    layer_drop: torch.Generator | None = None  # CPU generator that decides which layers to skip
    teacher: TeacherOutput | None = None


class StepOutput(Protocol):
    """What the training loop reads from the result of one step."""

    @property
    def loss(self) -> Tensor:
        """() fp32, summed over the masked frames."""

    @property
    def masked_frames(self) -> int:
        """Number of frames that the loss is summed over."""

    @property
    def code_counts(self) -> Tensor | None:
        """(V,) int64, how often each code is the target; None if the system reports perplexities itself."""

    def scores(self) -> dict[str, Tensor]:
        """() sums over masked frames by the names in `PretrainingModel.score_names`; averages are reported."""


class Score(NamedTuple):
    """How a score is shown at the end of a run."""

    label: str  # in the table and the figure
    card: str | None = None  # in the model card; None leaves the score out
    factor: float = 1.0  # from the score to what is shown
    digits: int = 3


ACCURACY = {
    "accuracy": Score("accuracy, %", "accuracy of the masked frames", 100, 1),
    "chance": Score("chance, %", "accuracy at chance", 100, 1),
}
_FRAME_PERIOD = {"frame_period_ms": Score("frame period, ms", digits=1)}


class PretrainingModel(nn.Module):
    """An encoder with the head that its objective needs.

    Args:
        config: Shape and objective.
    """

    #: The system's name in print, and the command that trains it.
    title: ClassVar[str]
    command: ClassVar[str] = "pretrain"
    #: Name of the attribute that is the encoder.
    encoder_name: ClassVar[str]
    config_class: ClassVar[type[SpeechEncoderConfig]]
    needs: ClassVar[Needs] = Needs()
    #: How the scores are shown: first what is minimised, then what tells most about success.
    main_scores: ClassVar[Mapping[str, Score]]
    #: What the loss is averaged over, in print.
    averaged_over: ClassVar[str] = "masked frame"
    #: Also a `CompressedConfig`.
    config: SpeechEncoderConfig

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config

    def step(self, batch: "AudioBatch", context: StepContext) -> StepOutput:
        """The objective on one batch.

        Args:
            batch: With what `needs` declares.
            context: Keys, schedules and the teacher.
        """
        raise NotImplementedError

    @property
    def speech_encoder(self) -> SpeechEncoder:
        """The encoder."""
        encoder = getattr(self, self.encoder_name)
        assert isinstance(encoder, SpeechEncoder)
        return encoder

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores that `StepOutput.scores` returns, the most telling one first."""
        raise NotImplementedError

    @classmethod
    def shown_scores(cls) -> dict[str, Score]:
        """How the scores are shown, the compressor's too."""
        return {**cls.main_scores, **_FRAME_PERIOD}

    def schedules(self, update: int) -> dict[str, float]:
        """Values by name that the model changes from update to update, for metrics.csv."""
        return {}

    def start_from_teacher(self, teacher: SpeechEncoder) -> None:
        """Initialise the model from its teacher, before the first update; does nothing if it has no teacher."""

    def draw_compression(self, keys: Tensor) -> dict[str, Tensor]:  # (B,)
        """Arguments for the encoder in training (`compression.draw_compression`)."""
        return {} if self.config.compressor == "none" else draw_compression(cast(CompressedConfig, self.config), keys)

    def with_compression_loss(
        self,
        loss: Tensor,  # ()
        compressed: Compressed | None,
        masked: Tensor,  # (B,)
        segments: FrameSegments | None,
    ) -> tuple[Tensor, CompressionScores | None]:
        """Add the compressor's losses (`compression.with_compression_loss`), if there is a compressor."""
        if compressed is None:
            return loss, None
        return with_compression_loss(loss, cast(CompressedConfig, self.config), compressed, masked, segments)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Self":
        """Open a folder of such a model; one that holds an encoder alone gets a fresh head.

        Raises:
            ValueError: The folder holds no model of this system, or its weights do not fit its config.
        """
        folder = Path(folder)
        values = read_config(folder, model_types=[cls.config_class().model_type])
        try:
            model = cls(cls.config_class.from_dict(values))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        model.load_weights(read_weights(folder), name=str(folder))
        return model

    def head_state(self) -> dict[str, Tensor]:
        """The weights that are not the encoder's."""
        prefix = f"{self.encoder_name}."
        return {key: tensor for key, tensor in self.state_dict().items() if not key.startswith(prefix)}

    def load_weights(self, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False) -> None:
        """Load an encoder's weights, and the head's where they are all there too.

        Args:
            weights: By name.
            name: Of the folder or file, for errors.
            fresh_compressor: Whether the compressor may stay as it is where the weights have none.

        Raises:
            ValueError: A weight of the encoder is missing, or one has another shape.
        """
        self.speech_encoder.load_weights(weights, name=name, fresh_compressor=fresh_compressor)
        own = self.head_state()
        if not own.keys() <= weights.keys():
            return
        for key, tensor in own.items():
            if weights[key].shape != tensor.shape:
                raise ValueError(
                    f"{name}: {key} has shape {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}; "
                    "the encoder alone, RUN/encoder, goes with any head"
                )
        self.load_state_dict({key: weights[key] for key in own}, strict=False)


PREDICTION = {
    "prediction_loss": Score("cross-entropy, nats", "cross-entropy of the masked frames"),
    **ACCURACY,
}
PREDICTION_SCORES = ("prediction_loss", "accuracy", "chance", "features_penalty")


@dataclass(frozen=True)
class PredictionOutput:
    """Masked prediction of discrete targets, one batch; sums over its M masked frames unless a line says otherwise."""

    loss: Tensor  # () fp32, what is minimised: prediction + weighted features penalty
    prediction_loss: Tensor  # () fp32, cross-entropy of the targets, nats
    features_penalty: Tensor  # () fp32, unweighted; 0 where the system has none
    correct: Tensor  # () int64, masked frames whose own target scores highest
    masked_frames: int  # M
    code_counts: Tensor  # (V,) int64, how often each code is the target, over all frames, masked or not
    features: Packed  # (N, D) of the masked input
    compression: CompressionScores | None = None

    def scores(self) -> dict[str, Tensor]:
        """Sums by the names of `prediction_scores`."""
        chance = torch.full_like(self.prediction_loss, self.masked_frames / len(self.code_counts))
        values = (self.prediction_loss, self.correct, chance, self.features_penalty)
        own = dict(zip(PREDICTION_SCORES, values, strict=True))
        return own | ({} if self.compression is None else self.compression._asdict())


def prediction_scores(config: CompressedConfig) -> tuple[str, ...]:
    """Names of the scores of masked prediction."""
    return (*PREDICTION_SCORES, *(CompressionScores._fields if config.draws_rates else ()))


def count_codes(codes: Tensor, *, size: int) -> Tensor:  # (N,) int64 -> (size,) int64
    """How often each code occurs; `torch.bincount`, for which the host would wait."""
    return codes.new_zeros(size).scatter_add(0, codes, torch.ones_like(codes))


def draw_mask(config: MaskedConfig, layout: Layout, keys: Tensor) -> Tensor:  # (B,) -> (N,) bool
    """Spans of frames to mask, which follow from the key of their utterance."""
    return sample_span_mask(
        layout,
        keys,
        probability=config.mask_time_prob,
        length=config.mask_time_length,
        min_spans=config.mask_time_min_masks,
    )


def masked_by_utterance(mask: Tensor, layout: Layout) -> Tensor:  # (N,) bool -> (B,) fp32
    """How many frames of each utterance are masked: what is averaged over its frames counts so often in a sum."""
    none = torch.zeros(len(layout.lengths), device=mask.device)
    return none.index_add(0, layout.sequence_ids, mask.float())


def features_penalty(frames: Packed, masked: Tensor) -> Tensor:
    """Sum over utterances of the mean square of its frames, times its masked frames, so that batches add up.

    Args:
        frames: (N, C) of the front end.
        masked: (B,) of `masked_by_utterance`.

    Returns:
        () fp32.
    """
    layout = frames.layout
    squares = frames.values.float().square().mean(1)
    weight = masked / layout.device_lengths.clamp(min=1)
    return (squares * weight[layout.sequence_ids]).sum()


def perplexity(probabilities: Tensor) -> Tensor:  # (..., V) -> (...)
    """The exponential of the entropy."""
    return torch.exp(-(probabilities * torch.log(probabilities + 1e-7)).sum(-1))
