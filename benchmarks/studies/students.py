"""Students of the studies on distillation: what their runs share."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from benchmarks.studies.probes import Probe
from fastssl.models.encoder import Encoder
from fastssl.packing import Layout, Packed

DIGITS, PHONES, VOICES = "digit error", "phone error", "voice error, 1 s"
#: Frames shorter than these are many in a head's window: Adam's steps must be smaller, and then more.
_SMALL_STEPS_MS, _MANY_STEPS_MS = 35.0, 25.0


def probes_at(period_ms: float, *, phones: bool) -> dict[str, Probe]:
    """What is read from a student, by name, with heads for frames of about this period.

    Heads of CTC see 0.2 s on either side. Where they see 0.1 s, that is 220 ms in all at 20 ms a frame and 300 ms at 60
    ms, and errors follow it rather than the student. Windows of many frames want smaller steps of Adam: where 16
    thousandths are best at 60 ms, they are several times too large at 20 ms, where a head needs twice as many steps
    too. Small batches, and many of them, leave less to the order of the examples; phones, of which there are more in a
    batch, need half as many as digits.

    Args:
        period_ms: Of a frame.
        phones: Read these too.
    """
    rates = (4e-3, 8e-3) if period_ms < _SMALL_STEPS_MS else (8e-3, 16e-3)
    share = 2.0 if period_ms < _MANY_STEPS_MS else 1.0
    of_digits = Probe("test", "digits", batch_s=25.0, context_s=0.2, learning_rates=rates, share_of_steps=share)
    found = {DIGITS: of_digits, VOICES: Probe("voices_test", "voice", segment_s=1.0, batch_s=25.0)}
    return found | {PHONES: of_digits._replace(target="phones", share_of_steps=share / 2)} if phones else found


def student_options(teacher: Path, *, updates: int, precision: str, frames: Path | None) -> dict[str, Any]:
    """Options of `fastssl distill` for whole utterances.

    Args:
        teacher: A run of `make_teacher`, whose convolutions the student has.
        updates: Of the optimiser.
        precision: Of the trainer.
        frames: Folder for the teacher's frames, where the convolutions are frozen; None trains them.
    """
    shape = yaml.safe_load((teacher / "config.yaml").read_text())["model"]
    options = {
        "teacher": str(teacher.absolute()),
        "model.conv_dim": shape["conv_dim"],
        "model.feature_grad_mult": 0.1 if frames is None else 0.0,
        "data.crop_s": None,
        "data.min_duration_s": 1.0,
        # Probes judge a student; its loss on held-out recordings says how well it copies.
        "data.valid": 0,
        "trainer.max_steps": updates,
        "trainer.precision": precision,
        "trainer.progress": "false",
    }
    return options if frames is None else options | {"data.teacher_cache": str(frames.absolute())}


def remember_front_end(encoder: Encoder) -> None:
    """Have an encoder that is not trained any more keep what its convolutions make of each batch.

    They are most of a shallow encoder's work, and the same at every rate.
    """
    encoder.register_module("feature_extractor", _Remembering(encoder.feature_extractor))


class _Remembering(nn.Module):
    def __init__(self, front_end: nn.Module) -> None:
        super().__init__()
        self.front_end = front_end
        self._made: dict[tuple[tuple[int, ...], bytes], tuple[Tensor, Layout]] = {}

    def forward(self, waveforms: Packed) -> tuple[Tensor, Layout]:
        digest = hashlib.blake2b(waveforms.values.numpy().tobytes()).digest()
        key = (waveforms.layout.lengths, digest)
        if key not in self._made:
            self._made[key] = self.front_end(waveforms)
        return self._made[key]
