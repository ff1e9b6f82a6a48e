"""The frozen encoder that a student learns from in distillation."""

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
    """A frozen encoder in evaluation mode. It is not a submodule of the module that is trained and saved.

    Args:
        encoder: The teacher; if it has a compressor, the compressor must be set to keep all frames.
        layers: Hidden states that the student predicts; 0 is the input of the first layer.
        gives_frames: Whether the student's front end is a frozen copy of the teacher's, so that the student can use the
            teacher's front-end frames.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int], *, gives_frames: bool) -> None:
        self.encoder = encoder.eval().requires_grad_(requires_grad=False)
        self.layers = tuple(layers)
        self.gives_frames = gives_frames

    @cached_property
    def digest(self) -> str:
        """Hash of the teacher's weights, which identifies it in caches and checkpoints."""
        return weights_digest(self.encoder)

    @torch.no_grad()
    def encode(self, waveforms: Packed) -> tuple[Packed, list[Tensor]]:
        """Run the teacher on waveforms, without gradient.

        On a GPU, the layers are computed under bf16 autocast whatever the precision of the run, because they are only
        targets. The front end has the precision of the run, because a student may use its frames as its own.

        Args:
            waveforms: (N,) or (N, 1) samples at 16 kHz, normalised already if the teacher's config has `do_normalize`;
                the teacher is moved to their device.

        Returns:
            Front-end frames (N_out, C), and the hidden states of `layers`, each (N_out, D).
        """
        device = waveforms.values.device
        if next(self.encoder.parameters()).device != device:  # `Module.to` visits every tensor, even if all are there
            self.encoder.to(device)
        frames = self.encoder.extract_features(waveforms, normalize=False)
        reduced = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
        with reduced:
            states = self.encoder.encoder(self.encoder.project(frames).frames)
        return frames, [states[layer].values for layer in self.layers]

    def of(self, batch: AudioBatch) -> tuple[Packed | None, Sequence[Tensor]]:
        """Return the teacher's outputs for a batch: stored ones if the batch has them, else newly computed ones.

        Args:
            batch: The batch that the student is trained on.

        Returns:
            A pair: front-end frames (N, C) if the student uses them as its own, else None; the target layers, each
            (N, D).
        """
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

    Args:
        config: Settings of the run.

    Returns:
        A copy of the settings, with the values that the teacher determines, and the teacher.

    Raises:
        ValueError: `config.teacher` is None, cannot be opened, or cannot teach this student.
    """
    if config.teacher is None:
        raise ValueError("--teacher: is missing; give the model to learn from")
    encoder = load_encoder(config.teacher)
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"--teacher: {config.teacher} has log-mel frames at 25 Hz; choose a teacher with a waveform front end"
        )
    if encoder.compressor is not None:
        if encoder.compressor.factor is not None:
            raise ValueError(
                f"--teacher: {config.teacher} has a compressor with a fixed factor, which leaves fewer frames than the "
                "student has to predict; choose a teacher without such a compressor"
            )
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
