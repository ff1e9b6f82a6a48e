"""The encoder that a student learns from: frozen, packed, and run once for each batch."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastssl.interop import load_encoder
from fastssl.models.distillation import DistillationConfig, DistillationModel, initialise_from_teacher
from fastssl.models.encoder import Encoder
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig

logger = logging.getLogger(__name__)


class Teacher:
    """An encoder in evaluation mode, without gradient; it is no part of what is trained, saved or wrapped.

    Args:
        encoder: With its front end at the full frame rate.
        layers: Which of its hidden states a student predicts.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int]) -> None:
        self.encoder = encoder.eval().requires_grad_(requires_grad=False)
        self.layers = tuple(layers)
        self._shares_front_end: bool | None = None

    @torch.no_grad()
    def __call__(self, waveforms: Packed, student: Encoder) -> tuple[Packed | None, list[Tensor]]:
        """Its layers, each (N, D), and before them the front end's frames (N, C), where a student has the same.

        Args:
            waveforms: (N, 1) samples at 16 kHz.
            student: Whose front end is the teacher's, and stays so, where it is frozen and began with these weights.
        """
        self.encoder.to(waveforms.values.device)
        if self._shares_front_end is None:  # not before: a resumed student gets its weights late
            self._shares_front_end = student.config.feature_grad_mult == 0 and _same_front_end(self.encoder, student)
        frames = self.encoder.extract_features(waveforms)
        states = self.encoder.encoder(self.encoder.project(frames).frames)
        return frames if self._shares_front_end else None, [states[layer].values for layer in self.layers]


def _same_front_end(one: Encoder, other: Encoder) -> bool:
    ones, others = (encoder.feature_extractor.state_dict() for encoder in (one, other))
    return ones.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in ones.items())


def open_teacher(config: PretrainConfig) -> tuple[PretrainConfig, Encoder]:
    """The teacher of a run, and the run's settings with what the teacher decides.

    Raises:
        ValueError: There is none, or a student of it cannot be made.
    """
    assert isinstance(config.model, DistillationConfig)
    if config.teacher is None:
        raise ValueError("--teacher: is missing: the model to learn from")
    encoder = load_encoder(config.teacher)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"--teacher: {config.teacher} has other frames than a student (25 Hz, of log-mel)")
    if encoder.compressor is not None:
        if encoder.compressor.factor is not None:
            raise ValueError(f"--teacher: {config.teacher} leaves fewer frames than a student has to predict")
        encoder.compressor.rate = 0.0
    try:
        model = config.model.of_teacher(encoder.config)
    except ValueError as error:
        raise ValueError(f"--teacher: {config.teacher}: {error}") from None
    return replace(config, model=model), encoder


def teach(model: DistillationModel, encoder: Encoder, *, fresh: bool) -> Teacher:
    """Make a teacher of an encoder, and give a new student what it can take of its weights.

    Args:
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
    return Teacher(encoder, model.config.targets)
