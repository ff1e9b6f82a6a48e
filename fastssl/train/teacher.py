"""The encoder that a student learns from: frozen, packed, and run once for each batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from fastssl.data.batches import AudioBatch
from fastssl.eval.extract import weights_digest
from fastssl.interop import load_encoder
from fastssl.models.encoder import Encoder
from fastssl.models.pretraining import StudentConfig
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig


class Teacher:
    """An encoder in evaluation mode, without gradient. It is not part of what is trained, saved or wrapped.

    Args:
        encoder: The teacher; a compressor in it, if any, must keep all frames.
        layers: Hidden states that the student predicts; 0 is the input of the first layer.
        gives_frames: Whether the student's front end is the teacher's and stays so.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int], *, gives_frames: bool) -> None:
        self.encoder = encoder.eval().requires_grad_(requires_grad=False)
        self.layers = tuple(layers)
        self.gives_frames = gives_frames

    @cached_property
    def digest(self) -> str:
        """A hash of the teacher's weights."""
        return weights_digest(self.encoder)

    @torch.no_grad()
    def encode(self, waveforms: Packed) -> tuple[Packed, list[Tensor]]:
        """Frames (N, C) of the front end, and the layers, each (N, D).

        On a GPU the layers are in bf16 whatever the run's precision, because they are only targets. Frames, which a
        student may use as its own, have the run's precision.
        """
        device = waveforms.values.device
        self.encoder.to(device)
        frames = self.encoder.extract_features(waveforms)
        reduced = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
        with reduced:
            states = self.encoder.encoder(self.encoder.project(frames).frames)
        return frames, [states[layer].values for layer in self.layers]

    def of(self, batch: AudioBatch) -> tuple[Packed | None, Sequence[Tensor]]:
        """Frames (N, C), if the student uses them, and the layers: those in the batch, or else computed."""
        kept = batch.teacher
        if kept is None:
            frames, layers = self.encode(batch.waveforms)
            return frames if self.gives_frames else None, layers
        if kept.front_end is None:
            return None, kept.layers
        layout = self.encoder.frame_layout(batch.waveforms.layout)
        return Packed(kept.front_end.float(), layout), kept.layers


def open_teacher(config: PretrainConfig) -> tuple[PretrainConfig, Teacher]:
    """Open the teacher of a run.

    Returns:
        The run's settings with those that the teacher decides, and the teacher.

    Raises:
        ValueError: No teacher is named, or it cannot teach this student.
    """
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
        config = replace(config, model=cast(StudentConfig, config.model).of_teacher(encoder.config))
    except ValueError as error:
        raise ValueError(f"--teacher: {config.teacher}: {error}") from None
    student = cast(StudentConfig, config.model)
    try:
        gives_frames = config.init is None and student.keeps_front_end(encoder.config)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None
    return config, Teacher(encoder, student.targets, gives_frames=gives_frames)
