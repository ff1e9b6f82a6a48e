"""Scenarios of whole runs: `fastssl pretrain` through Lightning, with checkpoints, on one pretended GPU."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from benchmarks.recipes import recipe_model
from fastssl.train.config import DataConfig, OptimizerConfig, PretrainConfig, QualityConfig, TrainerConfig
from fastssl.train.pretrain import pretrain
from fastssl.train.systems import SYSTEMS
from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.tiny import write_recording

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for system, recipe in (("wav2vec2", "wav2vec2-tiny"), ("best-rq", "best-rq-tiny")):
        for precision in PRECISIONS:
            yield f"fit/{system}/{precision}", partial(_fit, system=system, recipe=recipe, precision=precision)
    for precision in PRECISIONS:
        yield f"fit/resumed/{precision}", partial(_resume, precision=precision)
    reduced = partial(_fit, precision="bf16-mixed")
    yield "fit/quality/bf16-mixed", partial(reduced, system="wav2vec2", recipe="wav2vec2-tiny", every=2)
    yield "fit/hubert/bf16-mixed", partial(reduced, system="hubert", recipe="hubert-tiny")  # labels by MFCC first
    for cached in (False, True):
        yield f"fit/distillation{', cached' * cached}/bf16-mixed", partial(_distil, cached=cached)


def _fit(watch: Watch, *, system: str, recipe: str, precision: str, every: int | None = None) -> None:
    """Make two updates, and score the held-out recordings after the second."""
    with tempfile.TemporaryDirectory() as name:
        config = _config(Path(name), system=system, recipe=recipe, precision=precision)
        with watch.phase("run"):
            pretrain(replace(config, quality=QualityConfig(every=every)))


def _resume(watch: Watch, *, precision: str) -> None:
    """Make four updates, two of them in a run that continues, and read only every fourth at once."""
    with tempfile.TemporaryDirectory() as name:
        config = _config(Path(name), system="wav2vec2", recipe="wav2vec2-tiny", precision=precision)
        seldom = replace(config.trainer, log_every=4, val_check_interval=4, checkpoint_every=2)
        with watch.phase("first"):
            pretrain(replace(config, trainer=seldom))
        with watch.phase("second"):
            pretrain(replace(config, trainer=replace(seldom, max_steps=4)), resume=True)


def _distil(watch: Watch, *, cached: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _config(folder, system="distillation", recipe="distil-tiny", precision="bf16-mixed")
        teacher = recipe_model("wav2vec2-tiny")
        SYSTEMS["wav2vec2"](teacher).speech_encoder.save_pretrained(folder / "teacher")
        data = replace(config.data, fixed_crops=True, teacher_cache=str(folder / "cache")) if cached else config.data
        with watch.phase("run"):
            pretrain(replace(config, teacher=str(folder / "teacher"), data=data))


def _config(folder: Path, *, system: str, recipe: str, precision: str) -> PretrainConfig:
    for index in range(6):
        write_recording(folder / "audio" / f"{index}.wav", 1.5 + 0.3 * index, seed=index)
    return PretrainConfig(
        audio=str(folder / "audio"),
        output=str(folder / "run"),
        system=system,
        model=recipe_model(recipe),
        data=DataConfig(max_duration_s=6, crop_s=2, min_duration_s=1, valid=0.2, num_workers=0),
        optimizer=OptimizerConfig(lr=1e-3, warmup_updates=2, clip_norm=10.0),
        trainer=TrainerConfig(
            max_steps=2,
            log_every=1,
            val_check_interval=2,
            accelerator="gpu",
            precision=cast(Any, precision),
            progress=False,
        ),
    )
