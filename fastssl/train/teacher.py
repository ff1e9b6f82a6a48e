"""The encoder that a student learns from: frozen, packed, and run once for each batch."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fastssl.data.batches import AudioBatch
from fastssl.eval.extract import weights_digest
from fastssl.interop import load_encoder
from fastssl.models.distillation import DistillationConfig, DistillationModel, initialise_from_teacher
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig

logger = logging.getLogger(__name__)

_FRONT_END_FIELDS = ("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm")


class Teacher:
    """An encoder in evaluation mode, without gradient; it is no part of what is trained, saved or wrapped.

    Args:
        encoder: With its front end at the full frame rate.
        layers: Which of its hidden states a student predicts.
        gives_frames: Whether the student's front end is this one's, and stays so.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int], *, gives_frames: bool) -> None:
        self.encoder = encoder.eval().requires_grad_(requires_grad=False)
        self.layers = tuple(layers)
        self.gives_frames = gives_frames

    @cached_property
    def digest(self) -> str:
        """Of its weights."""
        return weights_digest(self.encoder)

    @torch.no_grad()
    def encode(self, waveforms: Packed) -> tuple[Packed, list[Tensor]]:
        """Frames (N, C) of the front end, and the layers, each (N, D).

        On a GPU layers are in bf16 whatever the run's precision: they are targets. Frames, which a student may take as
        its own, are as the run has them.
        """
        device = waveforms.values.device
        self.encoder.to(device)
        frames = self.encoder.extract_features(waveforms)
        reduced = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
        with reduced:
            states = self.encoder.encoder(self.encoder.project(frames).frames)
        return frames, [states[layer].values for layer in self.layers]

    def of(self, batch: AudioBatch) -> tuple[Packed | None, Sequence[Tensor]]:
        """Frames (N, C), where a student takes them, and layers: those that the batch has, or made now."""
        kept = batch.teacher
        if kept is None:
            frames, layers = self.encode(batch.waveforms)
            return frames if self.gives_frames else None, layers
        if kept.front_end is None:
            return None, kept.layers
        layout = self.encoder.frame_layout(batch.waveforms.layout)
        return Packed(kept.front_end.float(), layout), kept.layers


def shares_front_end(config: PretrainConfig, teacher: EncoderConfig) -> bool:
    """Whether a student's convolutions are its teacher's from the first update to the last."""
    student = config.model
    assert isinstance(student, DistillationConfig)
    same = all(getattr(student, name) == getattr(teacher, name) for name in _FRONT_END_FIELDS)
    return same and student.initialise_from_teacher and student.feature_grad_mult == 0 and config.init is None


def open_teacher(config: PretrainConfig) -> tuple[PretrainConfig, Encoder]:
    """The teacher of a run, and the run's settings with what the teacher decides.

    Raises:
        ValueError: There is none, or a student of it cannot be made.
    """
    student = config.model
    assert isinstance(student, DistillationConfig)
    if config.teacher is None:
        raise ValueError("--teacher: is missing: the model to learn from")
    encoder = load_encoder(config.teacher)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"--teacher: {config.teacher} has other frames than a student (25 Hz, of log-mel)")
    if encoder.compressor is not None:
        if encoder.compressor.factor is not None:
            raise ValueError(f"--teacher: {config.teacher} leaves fewer frames than a student has to predict")
        encoder.compressor.rate, encoder.compressor.frame_period_ms = 0.0, None
    try:
        config = replace(config, model=student.of_teacher(encoder.config))
    except ValueError as error:
        raise ValueError(f"--teacher: {config.teacher}: {error}") from None
    if student.feature_grad_mult == 0 and config.init is None and not shares_front_end(config, encoder.config):
        other = [name for name in _FRONT_END_FIELDS if getattr(config.model, name) != getattr(encoder.config, name)]
        why = f"they differ in {', '.join(other)}" if other else "model.initialise_from_teacher is false"
        raise ValueError(
            f"model.feature_grad_mult: 0 freezes the convolutions, and these do not begin as the teacher's: {why}"
        )
    return config, encoder


def teach(config: PretrainConfig, model: DistillationModel, encoder: Encoder, *, fresh: bool) -> Teacher:
    """Make a teacher of an encoder, and give a new student what it can take of its weights.

    Args:
        config: Of the run.
        model: The student.
        encoder: The teacher.
        fresh: Whether the student has not learned anything yet.
    """
    student = model.hubert
    if fresh and model.config.initialise_from_teacher:
        copied = initialise_from_teacher(student, encoder)
        total = sum(tensor.numel() for tensor in student.state_dict().values())
        numel = sum(student.state_dict()[name].numel() for name in copied)
        logger.info("from the teacher: %d of %d weights (%.0f %%)", numel, total, 100 * numel / total)
    return Teacher(encoder, model.config.targets, gives_frames=shares_front_end(config, encoder.config))
