"""Scenarios of the commands that run an encoder over recordings: extract, label, quality and probe."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.recipes import recipe_model
from fastssl.eval.extract import extract
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.eval.probe.command import probe
from fastssl.eval.probe.settings import ProbeSettings
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


def _probe(
    model: Path, audio: Path, output: Path, *, target: str, task: str, rate_price: float | None = None
) -> object:
    """Probe with two recordings of one speaker and one of another; verification has to hear other speakers."""
    tables = []
    for part in ("train", "test"):
        rows = [f"audio/{index}.wav\t{index} {index + 1}\t{part}{index % 2}" for index in range(3)]
        tables.append(audio.parent / f"{part if task == 'verification' else 'train'}.tsv")
        tables[-1].write_text("\n".join(["path\tdigits\tspeaker", *rows]) + "\n")
    train, test = tables
    settings = ProbeSettings(target, task=task, steps=3, seeds=1)
    return probe(str(model), train, settings, dev=train, test=test, output=output / "probe.json", rate_price=rate_price)


LOOPS: dict[str, Loop] = {"extract": _extract, "label": _label, "quality": _quality}
LOOPS |= {
    "probe ctc": partial(_probe, target="digits", task="ctc"),
    "probe classification": partial(_probe, target="speaker", task="classification"),
    "probe verification": partial(_probe, target="speaker", task="verification"),
    "probe learned rate": partial(_probe, target="digits", task="ctc", rate_price=1.0),
}


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for name, loop in LOOPS.items():
        compressed = [encoder for encoder in _RECIPES if "compressed" in encoder]
        for encoder in compressed if name == "probe learned rate" else _RECIPES:
            recipe = _RECIPES[encoder]
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
