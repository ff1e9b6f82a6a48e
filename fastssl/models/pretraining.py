"""Base class of the pre-training systems, their interface to the training loop, and code that several systems share.

Each system is one file in this folder: a config, and a `PretrainingModel` with its needs, its `step` and its scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fastssl.data.segments import FrameSegments
from fastssl.models.compression import CompressionScores, draw_compression, with_compression_loss
from fastssl.models.config import CompressedConfig, SpeechEncoderConfig
from fastssl.models.draws import Draws
from fastssl.models.folder import check_matching, read_config, read_weights
from fastssl.models.skeleton import skeleton
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.compression import Compressed
from fastssl.packing import Layout, Packed, send

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastssl.data.batches import AudioBatch


class Needs(NamedTuple):
    """What the step of a system needs besides waveforms; the training loop supplies it.

    Segments are not listed, because any system with an integrate-and-fire compressor can use them or do without them.
    """

    labels: bool = False  # `batch.labels`, one of `config.num_clusters` classes for each frame
    teacher: bool = False  # `context.teacher`; the system's config must be a `StudentConfig`
    noise: bool = False  # `batch.noise`, if the user names recordings; the system's config must be a `NoisyConfig`


class StudentConfig(Protocol):
    """What the config of a system that needs a teacher must provide in addition."""

    @property
    def targets(self) -> tuple[int, ...]:
        """Layers of the teacher that the student predicts; 0 is the input of the first layer."""

    def of_teacher(self, teacher: Any) -> Any:
        """Return a copy of this config with the settings that the teacher decides, such as the teacher's width.

        Args:
            teacher: Config of the teacher's encoder.

        Raises:
            ValueError: This teacher cannot teach this student.
        """

    def keeps_front_end(self, teacher: Any) -> bool:
        """Return whether the student's front end starts as a copy of the teacher's and stays frozen.

        Args:
            teacher: Config of the teacher's encoder.
        """


class NoisyConfig(Protocol):
    """What the config of a system that mixes noise into its input must provide in addition."""

    @property
    def noise_share(self) -> float:
        """Fraction of the training utterances that need a noise recording, from 0 to 1."""


class TeacherOutput(Protocol):
    """The source of a student's targets."""

    def of(self, batch: "AudioBatch") -> tuple[Packed | None, Sequence[Tensor]]:
        """Return the teacher's frames and layers for a batch.

        Args:
            batch: The batch that the student is trained on.

        Returns:
            A pair: front-end frames (N, C) if the student uses them as its own, else None; the target layers, each
            (N, D).
        """


class StepContext(NamedTuple):
    """What a training step depends on besides the batch."""

    keys: Tensor  # (B,) int64 on the CPU, from `nn.random.utterance_keys`; all random choices follow from them
    update: int  # number of finished updates, for schedules
    layer_drop: torch.Generator | None = None  # CPU generator that decides which layers to skip
    teacher: TeacherOutput | None = None  # source of the targets, for systems that need a teacher


class StepOutput(Protocol):
    """What the training loop reads from the result of one step."""

    @property
    def loss(self) -> Tensor:
        """() fp32 loss, summed over the masked frames."""

    @property
    def masked_frames(self) -> int | Tensor:
        """Number of frames that the loss is summed over; a () tensor if only the device knows it."""

    @property
    def code_counts(self) -> Tensor | None:
        """(V,) int64 number of times each code is the target; None if the system reports perplexities as scores."""

    def scores(self) -> dict[str, Tensor]:
        """Return sums over the masked frames as () tensors, by the names in `score_names`; their means are reported."""


class Score(NamedTuple):
    """How to show a score at the end of a run."""

    label: str  # name in the table and in the figure
    card: str | None = None  # name in the model card; None leaves the score out of the card
    factor: float = 1.0  # the score is multiplied by this before it is shown, such as 100 for per cent
    digits: int = 3  # decimal places in the table


ACCURACY = {
    "accuracy": Score("accuracy, %", "accuracy of the masked frames", 100, 1),
    "chance": Score("chance, %", "accuracy at chance", 100, 1),
}
_FRAME_PERIOD = {"frame_period_ms": Score("frame period, ms", digits=1)}


class PretrainingModel(nn.Module):
    """Base class of the pre-training systems: an encoder, and the head that the objective needs.

    Args:
        config: Shape of the encoder, and settings of the objective.
    """

    #: Name of the system for readers, and the `fastssl` command that trains it.
    title: ClassVar[str]
    command: ClassVar[str] = "pretrain"
    #: Name of the attribute that contains the encoder.
    encoder_name: ClassVar[str]
    config_class: ClassVar[type[SpeechEncoderConfig]]
    needs: ClassVar[Needs] = Needs()
    #: How to show the scores. The first is the loss that is minimised, the second the best measure of success.
    main_scores: ClassVar[Mapping[str, Score]]
    #: Whether the outputs have `code_counts`; if so, their perplexity and the share of codes in use are reported.
    counts_codes: ClassVar[bool] = False
    #: What the loss is averaged over, for the axis of the figure.
    averaged_over: ClassVar[str] = "masked frame"
    #: Always a `CompressedConfig` too.
    config: SpeechEncoderConfig

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config

    def step(self, batch: "AudioBatch", context: StepContext) -> StepOutput:
        """Compute the objective for one batch.

        Args:
            batch: Waveforms, and the labels or noise that `needs` declares.
            context: Keys, number of finished updates, layer drop and teacher.

        Returns:
            The loss with gradient, and the scores.
        """
        raise NotImplementedError

    @classmethod
    def draw(cls, config: Any, samples: Layout, keys: Tensor, *, training: bool) -> Draws | None:
        """Draw what `step` needs, before the model runs: in the data loader, for `batch.draws`.

        Args:
            config: Config of the system.
            samples: Layout of the waveforms, on the CPU.
            keys: (B,) int64 keys of the utterances, on the CPU.
            training: Whether the batch is trained on, or scored.

        Returns:
            The choices that `step` would make itself; None if they depend on more than the lengths of the waveforms.
        """
        return None

    @property
    def speech_encoder(self) -> SpeechEncoder:
        """The encoder, without the head."""
        encoder = getattr(self, self.encoder_name)
        assert isinstance(encoder, SpeechEncoder)
        return encoder

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the values in `StepOutput.scores`, in the order of metrics.csv; the first is the main loss."""
        raise NotImplementedError

    @classmethod
    def shown_scores(cls) -> dict[str, Score]:
        """Return how to show each score, by name: `main_scores`, and the frame period of a compressor."""
        return {**cls.main_scores, **_FRAME_PERIOD}

    def schedules(self, update: int) -> dict[str, float]:
        """Return the scheduled values of an update by name, such as a temperature, for metrics.csv.

        Args:
            update: Number of finished updates.
        """
        return {}

    def start_from_teacher(self, teacher: SpeechEncoder) -> None:
        """Initialise the model from its teacher, before the first update. Systems without a teacher do nothing.

        Args:
            teacher: The teacher's encoder.
        """

    def draw_compression(self, keys: Tensor) -> dict[str, Tensor]:  # (B,)
        """Draw how strongly to compress each utterance in training.

        Args:
            keys: (B,) int64 keys of the utterances.

        Returns:
            Keyword arguments for the encoder, from `compression.draw_compression`, on the device of the model; empty
            without a compressor.
        """
        if self.config.compressor == "none":
            return {}
        drawn = draw_compression(cast(CompressedConfig, self.config), keys)
        device = next(self.parameters()).device
        return dict(zip(drawn, send(list(drawn.values()), device), strict=True))

    def with_compression_loss(
        self,
        loss: Tensor,  # ()
        compressed: Compressed | None,
        masked: Tensor,  # (B,)
        segments: FrameSegments | None,
    ) -> tuple[Tensor, CompressionScores | None]:
        """Add the compressor's losses to a loss (`compression.with_compression_loss`), if there is a compressor.

        Args:
            loss: () fp32 loss, summed over masked frames.
            compressed: Result of the compressor; None if the encoder has none.
            masked: (B,) fp32 number of masked frames of each utterance.
            segments: Segments of the input frames, which teach the compressor where to fire, or None.

        Returns:
            The total loss, and the compressor's scores; without a compressor, `loss` unchanged and None.
        """
        if compressed is None:
            return loss, None
        return with_compression_loss(loss, cast(CompressedConfig, self.config), compressed, masked, segments)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Self":
        """Open a model from a folder. If the folder contains only an encoder, the head is initialised randomly.

        Args:
            folder: Folder with config.json and weights.

        Raises:
            ValueError: The folder contains no model for this system, or its weights do not fit its config.
        """
        folder = Path(folder)
        values = read_config(folder, model_types=[cls.config_class().model_type])
        weights = read_weights(folder)
        try:
            config = cls.config_class.from_dict(values)
            shape = skeleton(lambda: cls(config)).speech_encoder
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        check_matching(shape, shape.matching_weights(weights, name=str(folder)), name=str(folder))
        model = cls(config)
        model.load_weights(weights, name=str(folder))
        return model

    def head_state(self) -> dict[str, Tensor]:
        """Return the weights of the head: all tensors of the state dict that do not belong to the encoder."""
        prefix = f"{self.encoder_name}."
        return {key: tensor for key, tensor in self.state_dict().items() if not key.startswith(prefix)}

    def load_weights(self, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False) -> None:
        """Load the weights of the encoder, and those of the head if all of them are given.

        Args:
            weights: Tensors by name.
            name: Name of the folder or file, for error messages.
            fresh_compressor: Allow `weights` to contain no compressor; the encoder's compressor then stays unchanged.

        Raises:
            ValueError: A weight of the encoder is missing, or a weight has the wrong shape.
        """
        self.speech_encoder.load_weights(weights, name=name, fresh_compressor=fresh_compressor)
        own = self.head_state()
        if not own.keys() <= weights.keys():
            return
        for key, tensor in own.items():
            if weights[key].shape != tensor.shape:
                raise ValueError(
                    f"{name}: {key} has shape {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}; "
                    "to load only the encoder of a run, use RUN/encoder"
                )
        self.load_state_dict({key: weights[key] for key in own}, strict=False)


PREDICTION = {
    "prediction_loss": Score("cross-entropy, nats", "cross-entropy of the masked frames"),
    **ACCURACY,
}
PREDICTION_SCORES = ("prediction_loss", "accuracy", "chance", "features_penalty")


@dataclass(frozen=True)
class PredictionOutput:
    """Loss and statistics of masked prediction for one batch; sums over its M masked frames unless stated otherwise."""

    loss: Tensor  # () fp32, the value to minimise: all losses, weighted
    prediction_loss: Tensor  # () fp32, cross-entropy of the targets, in nats
    features_penalty: Tensor  # () fp32, before weighting; 0 if the system has no such penalty
    correct: Tensor  # () int64, number of masked frames whose target has the highest score
    masked_frames: int | Tensor  # M; a () int64 tensor on a GPU if it depends on a compressor, to save a wait
    code_counts: Tensor  # (V,) int64, number of times each code is the target, over all frames, masked or not
    features: Packed  # (N, D) last hidden state of the encoder for the masked input
    compression: CompressionScores | None = None  # scores of an integrate-and-fire compressor

    def scores(self) -> dict[str, Tensor]:
        """Return the sums over the masked frames as () tensors, by the names from `prediction_scores`."""
        chance = self.masked_frames / len(self.code_counts)
        if isinstance(chance, float):
            chance = torch.full_like(self.prediction_loss, chance)
        values = (self.prediction_loss, self.correct, chance, self.features_penalty)
        own = dict(zip(PREDICTION_SCORES, values, strict=True))
        return own | ({} if self.compression is None else self.compression._asdict())


def prediction_scores(config: CompressedConfig) -> tuple[str, ...]:
    """List the names of the scores of masked prediction.

    Args:
        config: Config of the system; an integrate-and-fire compressor adds its scores.
    """
    return (*PREDICTION_SCORES, *(CompressionScores._fields if config.draws_rates else ()))


def count_codes(codes: Tensor, *, size: int) -> Tensor:  # (N,) int64 -> (size,) int64
    """Count how often each code occurs, like `torch.bincount`, but without making the host wait for the device.

    Args:
        codes: (N,) int64 codes, from 0 to size - 1.
        size: V, the number of different codes.

    Returns:
        (V,) int64 counts.
    """
    return codes.new_zeros(size).scatter_add(0, codes, torch.ones_like(codes))


def features_penalty(frames: Packed, masked: Tensor) -> Tensor:
    """Return the weighted sum over utterances of the mean square of their frames.

    The weight of an utterance is its number of masked frames. Summed over batches and divided by the total number of
    masked frames, this is a weighted mean, like the other losses.

    Args:
        frames: (N, C) front-end frames.
        masked: (B,) fp32 masked frames of each utterance, from `draws.masked_by_utterance`.

    Returns:
        The sum, a () fp32 tensor.
    """
    layout = frames.layout
    squares = frames.values.float().square().mean(1)
    weight = masked / layout.divisors
    return (squares * weight[layout.sequence_ids]).sum()


def perplexity(probabilities: Tensor) -> Tensor:  # (..., V) -> (...)
    """Compute the perplexity, the exponential of the entropy in nats, of distributions over V codes.

    Args:
        probabilities: (..., V) probabilities.

    Returns:
        (...) perplexities, from 1 to V.
    """
    return torch.exp(-(probabilities * torch.log(probabilities + 1e-7)).sum(-1))
