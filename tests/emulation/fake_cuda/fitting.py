"""Scenarios of whole runs: `fastssl pretrain` through Lightning, with checkpoints, on one pretended GPU."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from benchmarks.recipes import recipe_model
from fastssl.train.config import DataConfig, OptimizerConfig, PretrainConfig, QualityConfig, TrainerConfig
from fastssl.train.pretrain import pretrain
from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.tiny import write_recording

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for system, recipe in (("wav2vec2", "wav2vec2-tiny"), ("best-rq", "best-rq-tiny")):
        for precision in PRECISIONS:
            yield f"fit/{system}/{precision}", partial(_fit, system=system, recipe=recipe, precision=precision)


def _fit(watch: Watch, *, system: str, recipe: str, precision: str) -> None:
    """Make two updates, and score the held-out recordings after the second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(6):
            write_recording(folder / "audio" / f"{index}.wav", 1.5 + 0.3 * index, seed=index)
        config = PretrainConfig(
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
            quality=QualityConfig(),
        )
        with watch.phase("run"):
            pretrain(config)
