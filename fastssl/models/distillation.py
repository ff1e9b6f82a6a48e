"""Distillation of an encoder into a smaller one: prediction heads (DistilHuBERT) or layer to layer (deep or wide)."""

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
    """A student, and what it learns of a teacher; the defaults are DistilHuBERT's.

    Args:
        distillation: "pred", where heads on the last layer predict some of the teacher's (DistilHuBERT, arXiv
            2110.01900), or "l2l", where each layer has one of the teacher's to be like (arXiv 2207.06867).
        teacher_layers: Layers of the teacher to predict; 0 is the input of its first. If none are given, "pred" takes
            those at a third, two thirds and all of its depth L, and "l2l" for layer i of S the one nearest to i L / S.
        teacher_hidden_size: Width of the teacher, which decides it.
        teacher_num_hidden_layers: L, which the teacher decides.
        cosine_loss_weight: Weight of -log sigmoid(cosine) beside the mean absolute difference.
        initialise_from_teacher: Begin with all weights of the teacher whose names and shapes the student has too.
    """

    model_type: str = "hubert"
    num_hidden_layers: int = 2
    layerdrop: float = 0.0
    do_normalize: bool = False
    feature_grad_mult: float = 0.1
    distillation: str = bounded("pred", choices=("pred", "l2l"))
    teacher_layers: tuple[int, ...] = bounded((), least=0)
    teacher_hidden_size: int = bounded(768, least=1)
    teacher_num_hidden_layers: int = bounded(12, least=1)
    cosine_loss_weight: float = bounded(1.0, least=0)
    initialise_from_teacher: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation == "l2l" and self.teacher_layers and len(self.teacher_layers) != self.num_hidden_layers:
            raise ValueError(
                f"teacher_layers: l2l takes one for each of {self.num_hidden_layers}, got {len(self.teacher_layers)}"
            )
        if self.distillation == "l2l" and self.num_hidden_layers == 0:
            raise ValueError("num_hidden_layers: l2l takes at least one")

    @property
    def targets(self) -> tuple[int, ...]:
        """The teacher's layers that are predicted."""
        if self.teacher_layers:
            return self.teacher_layers
        layers, students = self.teacher_num_hidden_layers, self.num_hidden_layers
        parts = 3 if self.distillation == "pred" else students
        # A half is rounded up.
        found = [max(1, (2 * layers * part + parts) // (2 * parts)) for part in range(1, parts + 1)]
        return tuple(dict.fromkeys(found)) if self.distillation == "pred" else tuple(found)

    def of_teacher(self, teacher: EncoderConfig) -> "DistillationConfig":
        """The same student of this teacher, whose input it takes.

        Raises:
            ValueError: Their frames would not agree, or the teacher has not the layers that are asked for.
        """
        for name in ("conv_kernel", "conv_stride"):
            if getattr(self, name) != getattr(teacher, name):
                raise ValueError(
                    f"{name}: the teacher has {list(getattr(teacher, name))}, the student {list(getattr(self, name))}; "
                    "their frames must agree"
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
        """Whether the student's convolutions start as the teacher's and stay frozen.

        Raises:
            ValueError: They are frozen and would not start as the teacher's.
        """
        if self.feature_grad_mult != 0:
            return False
        other = [name for name in _FRONT_END_FIELDS if getattr(self, name) != getattr(teacher, name)]
        if other or not self.initialise_from_teacher:
            why = f"they differ in {', '.join(other)}" if other else "model.initialise_from_teacher is false"
            raise ValueError(
                f"feature_grad_mult: 0 freezes the convolutions, and these do not begin as the teacher's: {why}"
            )
        return True


@dataclass(frozen=True)
class DistillationOutput:
    """Loss and statistics of one batch; sums over its N frames."""

    loss: Tensor  # () fp32, over layers and frames: mean absolute difference and weighted -log sigmoid(cosine)
    l1_loss: Tensor  # () fp32, mean over layers
    cosine_similarity: Tensor  # () fp32, mean over layers
    distillation_loss: Tensor  # () fp32, the loss without those of a compressor
    masked_frames: int  # N: all of the teacher's frames count
    features: Packed  # of the student, (N_out, D)
    compression: CompressionScores | None = None

    @property
    def code_counts(self) -> None:
        """There are no codes."""
        return None

    def scores(self) -> dict[str, Tensor]:
        """Sums by the names of `DistillationModel.score_names`."""
        own = {"distillation_loss": self.distillation_loss, "l1_loss": self.l1_loss}
        own |= {"cosine_similarity": self.cosine_similarity}
        return own | ({} if self.compression is None else self.compression._asdict())


class PredictionHeads(nn.Module):
    """DistilHuBERT's heads on one layer: a linear map for all, GELU, and a linear map for each.

    Args:
        width: Of the student.
        teacher_width: Of what is predicted.
        number: Layers that are predicted.
    """

    def __init__(self, width: int, teacher_width: int, number: int) -> None:
        super().__init__()
        self.teacher_width = teacher_width
        self.hidden = PackedLinear(width, number * teacher_width)
        self.outputs = nn.ModuleList(PackedLinear(teacher_width, teacher_width) for _ in range(number))

    def forward(self, x: Tensor) -> list[Tensor]:  # (N, D) -> of (N, teacher_width)
        """A prediction for each layer."""
        hidden = F.gelu(self.hidden(x)).split(self.teacher_width, dim=1)
        return [output(part) for output, part in zip(self.outputs, hidden, strict=True)]


class DistillationModel(PretrainingModel):
    """A student with the heads that its objective needs; the student's names are those of Transformers' `HubertModel`.

    Args:
        config: Shape and objective.
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
        # Nothing is masked.
        self.hubert.masked_spec_embed.requires_grad = False
        width, teacher_width, number = config.hidden_size, config.teacher_hidden_size, len(config.targets)
        self.heads: PredictionHeads | nn.ModuleList
        if config.distillation == "pred":
            self.heads = PredictionHeads(width, teacher_width, number)
        else:
            self.heads = nn.ModuleList(PackedLinear(width, teacher_width) for _ in range(number))

    @property
    def score_names(self) -> tuple[str, ...]:
        """As in `DistillationOutput.scores`."""
        return (*_SCORES, *(CompressionScores._fields if self.config.draws_rates else ()))

    def start_from_teacher(self, teacher: SpeechEncoder) -> None:
        """Copy the teacher's weights that the student has too, if the config asks for it."""
        if not self.config.initialise_from_teacher:
            return
        student = self.hubert.state_dict()
        copied = initialise_from_teacher(self.hubert, teacher)
        numel, total = (sum(student[name].numel() for name in names) for names in (copied, student))
        logger.info("from the teacher: %d of %d weights (%.0f %%)", numel, total, 100 * numel / total)

    def step(self, batch: "AudioBatch", context: StepContext) -> DistillationOutput:
        """`forward` with the teacher's layers of the batch."""
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
        """Encode, predict the teacher's layers frame by frame, and compare; nothing is computed on padding.

        With a compressor the predictions are repeated for the frames that went into each, so that there is one for each
        of the teacher's.

        Args:
            waveforms: (N, 1) samples at 16 kHz; a batch of no utterances is legal and contributes nothing.
            keys: (B,) int64 from `nn.random.utterance_keys` or `draw_keys`; a compressor's rates follow from them.
            targets: Of each layer in `config.targets` the teacher's frames (N, teacher_hidden_size).
            frames: (N, C) of the front end, where it is frozen and the teacher's; None computes them.
            layer_drop: CPU generator for the layers to skip; None takes torch's own.
            segments: Segments of the N frames that a compressor should learn; None for no guidance.

        Raises:
            ValueError: The targets are not as many as the layers, or have other frames or another width.
        """
        config = self.config
        frames = self.hubert.extract_features(waveforms) if frames is None else frames
        expected = (frames.layout.total, config.teacher_hidden_size)
        if len(targets) != len(config.targets) or any(target.shape != expected for target in targets):
            shapes = [tuple(target.shape) for target in targets]
            raise ValueError(f"targets: expected {len(config.targets)} of {expected}, got {shapes}")
        projected = self.hubert.project(frames, **self.draw_compression(keys))
        hidden_states = self.hubert.encoder(projected.frames, layer_drop=layer_drop)
        if isinstance(self.heads, PredictionHeads):
            predictions = self.heads(hidden_states[-1].values)
        else:
            states = hidden_states[1:]
            predictions = [head(state.values) for head, state in zip(self.heads, states, strict=True)]
        if projected.compressed is not None:
            predictions = [projected.compressed.upsample(prediction) for prediction in predictions]

        l1, cosine, loss = (torch.zeros((), device=keys.device) for _ in range(3))
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
    """Mean absolute difference, and cosine; bf16 has too few digits for them."""
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.float()
        return (prediction - target).abs().mean(1), F.cosine_similarity(prediction, target, dim=1)


@torch.no_grad()
def initialise_from_teacher(student: SpeechEncoder, teacher: SpeechEncoder) -> list[str]:
    """Copy the teacher's weights whose names and shapes the student has too: of its first layers, where it is as wide.

    Returns:
        The names of those that were copied.
    """
    theirs = teacher.state_dict()
    copied = []
    for name, tensor in student.state_dict().items():
        if name in theirs and theirs[name].shape == tensor.shape:
            tensor.copy_(theirs[name])
            copied.append(name)
    return copied
