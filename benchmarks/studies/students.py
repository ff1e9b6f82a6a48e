"""Options and probes that the students of all distillation studies share."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from benchmarks.studies.probes import Probe
from fastssl.models.encoder import Encoder
from fastssl.packing import Layout, Packed

DIGITS, PHONES, VOICES = "digit error", "phone error", "voice error, 1 s"
#: Below these frame periods in ms, a head needs a smaller learning rate, or more steps, as its window has many frames.
_SMALL_STEPS_MS, _MANY_STEPS_MS = 35.0, 25.0


def probes_at(period_ms: float, *, phones: bool) -> dict[str, Probe]:
    """Return the probes of a student by name, with heads suited to frames of about this period.

    CTC heads see 0.2 s on either side. With 0.1 s, a window would cover 220 ms at 20 ms per frame but 300 ms at 60 ms,
    and errors would depend on that more than on the student. Windows of many frames need smaller steps of Adam. A
    learning rate of 0.016 is best at 60 ms, but several times too large at 20 ms. At 20 ms, a head also needs twice as
    many steps. Many small batches reduce the influence of the order of examples. Phones need half as many steps as
    digits, because a batch contains more phones.

    Args:
        period_ms: Frame period in milliseconds.
        phones: Whether to probe for phones as well as for digits and voices.
    """
    rates = (4e-3, 8e-3) if period_ms < _SMALL_STEPS_MS else (8e-3, 16e-3)
    share = 2.0 if period_ms < _MANY_STEPS_MS else 1.0
    of_digits = Probe("test", "digits", batch_s=25.0, context_s=0.2, learning_rates=rates, share_of_steps=share)
    found = {DIGITS: of_digits, VOICES: Probe("voices_test", "voice", segment_s=1.0, batch_s=25.0)}
    return found | {PHONES: of_digits._replace(target="phones", share_of_steps=share / 2)} if phones else found


def student_options(teacher: Path, *, updates: int, precision: str, frames: Path | None) -> dict[str, Any]:
    """Return options of `fastssl distill` for training on whole utterances.

    Args:
        teacher: A run of `make_teacher`; the student has convolutions of the same shape.
        updates: Number of optimiser updates.
        precision: Precision of the trainer, such as "32-true".
        frames: Folder in which the teacher's frames are kept; the student's convolutions are then frozen. None keeps no
            frames and trains the convolutions.
    """
    shape = yaml.safe_load((teacher / "config.yaml").read_text())["model"]
    options = {
        "teacher": str(teacher.absolute()),
        "model.conv_dim": shape["conv_dim"],
        "model.feature_grad_mult": 0.1 if frames is None else 0.0,
        "data.crop_s": None,
        "data.min_duration_s": 1.0,
        # Hold out nothing: probes judge the student, and its held-out loss would only show how well it copies.
        "data.valid": 0,
        "trainer.max_steps": updates,
        "trainer.precision": precision,
        "trainer.progress": "false",
    }
    return options if frames is None else options | {"data.teacher_cache": str(frames.absolute())}


def remember_front_end(encoder: Encoder) -> None:
    """Make an encoder store the output of its convolutions for each batch, and reuse it when the same batch returns.

    Convolutions are most of a shallow encoder's work, and their output is the same at every rate. Use it only for
    encoders whose weights no longer change.
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
