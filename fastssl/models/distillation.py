"""Distil an encoder into a smaller one, with prediction heads (arXiv 2110.01900) or by layer (arXiv 2207.06867)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.data.segments import FrameSegments
from fastssl.models.bounds import bounded
from fastssl.models.compression import CompressionScores
from fastssl.models.config import CompressedConfig
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.pretraining import Needs, PretrainingModel, Score, StepContext
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Packed

if TYPE_CHECKING:
    from fastssl.data.batches import AudioBatch

logger = logging.getLogger(__name__)

_FRONT_END_FIELDS = ("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm")
_SCORES = ("distillation_loss", "l1_loss", "cosine_similarity")


@dataclass(frozen=True)
class DistillationConfig(CompressedConfig, EncoderConfig):
    """The student's encoder, and what it learns from a teacher; the defaults are those of DistilHuBERT.

    Args:
        distillation: "pred" to predict several layers of the teacher with heads on the student's last layer
            (DistilHuBERT, arXiv 2110.01900), or "l2l" to predict one from each layer of the student (arXiv 2207.06867).
        teacher_layers: Layers of the teacher to predict; 0 is the input of the first layer. If empty, "pred" predicts
            layers L/3, 2L/3 and L of the teacher's L layers, and with "l2l", layer i of the student's S layers
            predicts the one nearest to i L / S.
        teacher_hidden_size: Width of the teacher's layers; set from the teacher when training begins.
        teacher_num_hidden_layers: L, the teacher's number of layers; set from the teacher when training begins.
        cosine_loss_weight: Weight of -log sigmoid(cosine similarity), relative to the mean absolute difference.
        initialise_from_teacher: Start from the teacher's weights wherever name and shape agree; the rest is random.

    Raises:
        ValueError: A value is out of bounds, or `teacher_layers` does not list one layer for each of the student's
            in "l2l".
    """

    model_type: str = "hubert"
    num_hidden_layers: int = 2
    layerdrop: float = 0.0
    do_normalize: bool = False
    feature_grad_mult: float = 0.1
    feat_proj_layer_norm: bool = False  # as in s3prl's student
    distillation: str = bounded("pred", choices=("pred", "l2l"))
    teacher_layers: tuple[int, ...] = bounded((), least=0)
    teacher_hidden_size: int = bounded(768, least=1, ceiling=65_536)
    teacher_num_hidden_layers: int = bounded(12, least=1, ceiling=1024)
    cosine_loss_weight: float = bounded(1.0, least=0)
    initialise_from_teacher: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation == "l2l" and self.teacher_layers and len(self.teacher_layers) != self.num_hidden_layers:
            raise ValueError(
                f"teacher_layers: l2l needs one for each of the student's {self.num_hidden_layers} layers, "
                f"got {len(self.teacher_layers)}"
            )
        if self.distillation == "l2l" and self.num_hidden_layers == 0:
            raise ValueError("num_hidden_layers: l2l needs at least one layer, got 0")

    @property
    def targets(self) -> tuple[int, ...]:
        """Layers of the teacher that the student predicts; 0 is the input of the first layer."""
        if self.teacher_layers:
            return self.teacher_layers
        layers, students = self.teacher_num_hidden_layers, self.num_hidden_layers
        parts = 3 if self.distillation == "pred" else students
        # Halves are rounded up.
        found = [max(1, (2 * layers * part + parts) // (2 * parts)) for part in range(1, parts + 1)]
        return tuple(dict.fromkeys(found)) if self.distillation == "pred" else tuple(found)

    def of_teacher(self, teacher: EncoderConfig) -> "DistillationConfig":
        """Return a copy of this config with the teacher's width, number of layers and `do_normalize`.

        Args:
            teacher: Config of the teacher's encoder.

        Raises:
            ValueError: Student and teacher have frames of different length or period, or the teacher does not have the
                layers in `teacher_layers`.
        """
        for name in ("conv_kernel", "conv_stride"):
            if getattr(self, name) != getattr(teacher, name):
                raise ValueError(
                    f"{name}: the teacher has {list(getattr(teacher, name))}, the student {list(getattr(self, name))}; "
                    "they must be equal, so that each frame of the student has a target"
                )
        layers = teacher.num_hidden_layers
        if layers < 1 or any(layer > layers for layer in self.teacher_layers):
            raise ValueError(f"teacher_layers: the teacher has layers 0 to {layers}, got {list(self.teacher_layers)}")
        return replace(
            self,
            teacher_hidden_size=teacher.hidden_size,
            teacher_num_hidden_layers=teacher.num_hidden_layers,
            do_normalize=teacher.do_normalize,
        )

    def keeps_front_end(self, teacher: EncoderConfig) -> bool:
        """Return whether the student's front end starts as a copy of the teacher's and stays frozen.

        Args:
            teacher: Config of the teacher's encoder.

        Raises:
            ValueError: `feature_grad_mult` freezes the student's front end, which would not start as a copy of the
                teacher's.
        """
        if self.feature_grad_mult != 0:
            return False
        other = [name for name in _FRONT_END_FIELDS if getattr(self, name) != getattr(teacher, name)]
        if other or not self.initialise_from_teacher:
            why = f"they differ in {', '.join(other)}" if other else "model.initialise_from_teacher is false"
            raise ValueError(
                f"feature_grad_mult: 0 freezes the convolutions, which must then be copies of the teacher's, but {why}"
            )
        return True


@dataclass(frozen=True)
class DistillationOutput:
    """Loss and statistics of distillation for one batch; sums over its N frames.

    Attributes:
        loss: () fp32, the value to minimise: `distillation_loss` plus the compressor's losses.
        l1_loss: () fp32, mean absolute difference, averaged over the target layers.
        cosine_similarity: () fp32, averaged over the target layers.
        distillation_loss: () fp32, mean absolute difference plus weighted -log sigmoid(cosine), summed over the layers.
        masked_frames: N. Nothing is masked; the training loop divides sums by this number.
        features: (N_out, D) last hidden state of the student.
        compression: Scores of an integrate-and-fire compressor, or None.
    """

    loss: Tensor  # ()
    l1_loss: Tensor  # ()
    cosine_similarity: Tensor  # ()
    distillation_loss: Tensor  # ()
    masked_frames: int
    features: Packed  # (N_out, D)
    compression: CompressionScores | None = None

    @property
    def code_counts(self) -> None:
        """None, because distillation has no codes."""
        return None

    def scores(self) -> dict[str, Tensor]:
        """Return the sums over the frames as () tensors, by the names in `DistillationModel.score_names`."""
        own = {"distillation_loss": self.distillation_loss, "l1_loss": self.l1_loss}
        own |= {"cosine_similarity": self.cosine_similarity}
        return own | ({} if self.compression is None else self.compression._asdict())


class PredictionHeads(nn.Module):
    """DistilHuBERT's prediction heads (arXiv 2110.01900): a shared linear map, GELU, and one linear map per layer.

    Args:
        width: D, the width of the student's layers.
        teacher_width: Width of the teacher's layers.
        number: Number of layers to predict.
    """

    def __init__(self, width: int, teacher_width: int, number: int) -> None:
        super().__init__()
        self.teacher_width = teacher_width
        self.hidden = PackedLinear(width, number * teacher_width)
        self.outputs = nn.ModuleList(PackedLinear(teacher_width, teacher_width) for _ in range(number))

    def forward(self, x: Tensor) -> list[Tensor]:  # (N, D) -> each (N, teacher_width)
        """Predict the teacher's layers.

        Args:
            x: (N, D) last hidden state of the student.

        Returns:
            One prediction per layer, each (N, teacher_width).
        """
        hidden = F.gelu(self.hidden(x)).split(self.teacher_width, dim=1)
        return [output(part) for output, part in zip(self.outputs, hidden, strict=True)]


class DistillationModel(PretrainingModel):
    """A student encoder and its prediction heads; the encoder has the parameter names of Transformers' `HubertModel`.

    Args:
        config: Shape of the student, and settings of the objective.
    """

    title = "distillation"
    command = "distill"
    encoder_name = "hubert"
    config_class = DistillationConfig
    needs = Needs(teacher=True)
    main_scores: ClassVar = {
        "distillation_loss": Score("distillation loss", "distillation loss"),
        "cosine_similarity": Score("cosine similarity", "cosine similarity to the teacher"),
    }
    averaged_over = "frame"
    config: DistillationConfig

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(config)
        self.hubert = Encoder(config)
        # Nothing is masked, so the mask vector is not trained.
        self.hubert.masked_spec_embed.requires_grad = False
        width, teacher_width, number = config.hidden_size, config.teacher_hidden_size, len(config.targets)
        self.heads: PredictionHeads | nn.ModuleList
        if config.distillation == "pred":
            self.heads = PredictionHeads(width, teacher_width, number)
        else:
            self.heads = nn.ModuleList(PackedLinear(width, teacher_width) for _ in range(number))

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the values in `DistillationOutput.scores`, in the order of metrics.csv."""
        return (*_SCORES, *(CompressionScores._fields if self.config.draws_rates else ()))

    def start_from_teacher(self, teacher: SpeechEncoder) -> None:
        """Copy the teacher's weights into the student if `config.initialise_from_teacher` is true.

        Args:
            teacher: The teacher's encoder; only weights with the same name and shape are copied.
        """
        if not self.config.initialise_from_teacher:
            return
        student = self.hubert.state_dict()
        copied = initialise_from_teacher(self.hubert, teacher)
        numel, total = (sum(student[name].numel() for name in names) for names in (copied, student))
        logger.info("initialised from the teacher: %d of %d weights (%.0f %%)", numel, total, 100 * numel / total)

    def step(self, batch: "AudioBatch", context: StepContext) -> DistillationOutput:
        """Run `forward` on a batch, with the teacher's layers as targets."""
        assert context.teacher is not None
        frames, targets = context.teacher.of(batch)
        output: DistillationOutput = self(
            batch.waveforms,
            keys=context.keys,
            targets=targets,
            frames=frames,
            layer_drop=context.layer_drop,
            segments=batch.segments,
        )
        return output

    def forward(
        self,
        waveforms: Packed,
        *,
        keys: Tensor,
        targets: Sequence[Tensor],
        frames: Packed | None = None,
        layer_drop: torch.Generator | None = None,
        segments: FrameSegments | None = None,
    ) -> DistillationOutput:
        """Encode waveforms, predict the teacher's layers frame by frame, and compare.

        If the student has a compressor, each prediction is repeated for all frames that went into it, so that each
        frame of the teacher has a prediction.

        Args:
            waveforms: (N,) or (N, 1) samples at 16 kHz, already of zero mean and unit variance if `config.do_normalize`
                is true. A batch without utterances is allowed and adds nothing to the sums.
            keys: (B,) int64 from `nn.random.utterance_keys` or `draw_keys`; they determine a compressor's rates.
            targets: The teacher's frames (N, teacher_hidden_size) for each layer in `config.targets`.
            frames: (N, C) front-end frames, if the student's front end is frozen and equal to the teacher's; None
                computes them.
            layer_drop: CPU generator that decides which layers to skip; None uses PyTorch's global generator.
            segments: Segments of the N frames, which teach a compressor where to fire, or None.

        Raises:
            ValueError: `targets` is not one tensor (N, teacher_hidden_size) for each layer in `config.targets`.
        """
        config = self.config
        frames = self.hubert.extract_features(waveforms, normalize=False) if frames is None else frames
        expected = (frames.layout.total, config.teacher_hidden_size)
        if len(targets) != len(config.targets) or any(target.shape != expected for target in targets):
            shapes = [tuple(target.shape) for target in targets]
            raise ValueError(f"targets: expected {len(config.targets)} of shape {expected}, got {shapes}")
        projected = self.hubert.project(frames, **self.draw_compression(keys))
        hidden_states = self.hubert.encoder(projected.frames, layer_drop=layer_drop)
        if isinstance(self.heads, PredictionHeads):
            predictions = self.heads(hidden_states[-1].values)
        else:
            states = hidden_states[1:]
            predictions = [head(state.values) for head, state in zip(self.heads, states, strict=True)]
        if projected.compressed is not None:
            predictions = [projected.compressed.upsample(prediction) for prediction in predictions]

        l1, cosine, loss = (torch.zeros((), device=waveforms.values.device) for _ in range(3))
        for prediction, target in zip(predictions, targets, strict=True):
            difference, similarity = _compare(prediction, target)
            l1, cosine = l1 + difference.detach().sum(), cosine + similarity.detach().sum()
            loss = loss + (difference - config.cosine_loss_weight * F.logsigmoid(similarity)).sum()
        distillation_loss = loss.detach()
        loss, compression = self.with_compression_loss(
            loss,
            projected.compressed,
            frames.layout.device_lengths.float(),
            segments,
        )
        return DistillationOutput(
            loss=loss,
            l1_loss=l1 / len(targets),
            cosine_similarity=cosine / len(targets),
            distillation_loss=distillation_loss,
            masked_frames=frames.layout.total,
            features=hidden_states[-1],
            compression=compression,
        )


def _compare(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # (N, D), (N, D) -> (N,), (N,) fp32
    """Return the mean absolute difference and cosine similarity, in fp32 because bf16 is not precise enough."""
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.float()
        return (prediction - target).abs().mean(1), F.cosine_similarity(prediction, target, dim=1)


@torch.no_grad()
def initialise_from_teacher(student: SpeechEncoder, teacher: SpeechEncoder) -> list[str]:
    """Copy the teacher's weights into the student wherever name and shape agree.

    A student of the same width gets the teacher's first layers.

    Args:
        student: Encoder to change in place.
        teacher: Encoder to copy from.

    Returns:
        Names of the weights that were copied.
    """
    theirs = teacher.state_dict()
    copied = []
    for name, tensor in student.state_dict().items():
        if name in theirs and theirs[name].shape == tensor.shape:
            tensor.copy_(theirs[name])
            copied.append(name)
    return copied
