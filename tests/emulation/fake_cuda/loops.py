"""Scenarios of the commands that run an encoder over recordings: extract, label and quality."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.recipes import recipe_model
from fastssl.eval.extract import extract
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.eval.quality.command import quality
from fastssl.train.systems import SYSTEMS, system_of
from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.tiny import write_recording

_RECIPES = {"wav2vec2": "wav2vec2-tiny", "wav2vec2 compressed": "wav2vec2-tiny-ofa", "best-rq": "best-rq-tiny"}
Loop = Callable[[Path, Path, Path], object]


def _extract(model: Path, audio: Path, output: Path) -> object:
    return extract(model, audio, output)


def _label(model: Path, audio: Path, output: Path) -> object:
    return label(audio, output, LabelSettings(model=str(model), layer=2, clusters=5), num_workers=0)


def _quality(model: Path, audio: Path, output: Path) -> object:
    return quality(model, audio, output / "quality.json")


LOOPS: dict[str, Loop] = {"extract": _extract, "label": _label, "quality": _quality}


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for name, loop in LOOPS.items():
        for encoder, recipe in _RECIPES.items():
            yield f"loop/{name}/{encoder}", partial(_run, loop=loop, recipe=recipe)


def _run(watch: Watch, *, loop: Loop, recipe: str) -> None:
    config = recipe_model(recipe)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        SYSTEMS[system_of(config)](config).speech_encoder.save_pretrained(folder / "model")
        for index in range(3):
            write_recording(folder / "audio" / f"{index}.wav", 2.0 + index, seed=index)
        with watch.phase("loop"):
            loop(folder / "model", folder / "audio", folder / "output")
