"""Students of the studies on distillation: what their runs share."""

from pathlib import Path
from typing import Any

import yaml


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
