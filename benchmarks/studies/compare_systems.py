"""Compare the tiny recipes of all systems on one corpus, by quality without labels and by probes.

    python -m benchmarks.studies.compare_systems CORPORA --runs RUNS --output compare_systems.json

wav2vec2-tiny, hubert-tiny and best-rq-tiny are pre-trained on the corpus `train`. hubert-tiny has two iterations; the
second learns classes of the first one's third layer. The frozen encoders are compared with log-mel features, and with
both architectures at random weights, on these probes:

- digits and phones by CTC, on speakers that the head was trained on, and on held-out speakers in six folds;
- thirty voices in 1 s of audio;
- verification of two held-out speakers at a time, whose recordings played no part in choosing the layer.

With --curve, the checkpoints at each quarter of a run are also probed for digits on held-out speakers, to show the
effect of more updates.
"""

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastssl
from benchmarks.studies.checkpoint_scores import layer_quality, open_checkpoint
from benchmarks.studies.pretraining_runs import (
    Job,
    StudyFile,
    Trained,
    corpora_parser,
    train,
    what_decides,
)
from benchmarks.studies.probes import Probe
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.eval.probe.features import FeatureStore, RandomSource
from fastssl.eval.probe.run import LOG_MEL, ProbeResult, run_probe
from fastssl.models.speech_encoder import SpeechEncoder

PROBES = {
    "digit error": Probe("test", "digits"),
    "phone error": Probe("test", "phones"),
    "digit error, held-out speakers": Probe("test", "digits", folds="speaker"),
    "phone error, held-out speakers": Probe("test", "phones", folds="speaker"),
    "voice error, 1 s": Probe("voices_test", "voice", segment_s=1.0),
    "equal error rate, 1 s": Probe("test", "speaker", segment_s=1.0, task="verification", folds="speaker", fold_size=2),
}
#: Rows with random weights, by the system whose architecture they have; HuBERT shares that of wav2vec 2.0.
UNTRAINED = {"wav2vec 2.0": "untrained wav2vec 2.0 and HuBERT", "BEST-RQ": "untrained BEST-RQ"}
#: All rows, in the order of the tables.
NAMES = (
    "wav2vec 2.0",
    "HuBERT, iteration 1",
    "HuBERT, iteration 2",
    UNTRAINED["wav2vec 2.0"],
    "BEST-RQ",
    UNTRAINED["BEST-RQ"],
    LOG_MEL,
)
#: Task for the intermediate checkpoints of --curve.
CURVE = "digit error, held-out speakers"
#: Log-mel is probed only once, together with this system.
WITH_LOG_MEL = "wav2vec 2.0"
#: Number of frames for k-means, the same for every encoder. The encoder with the longest frames makes this many of 8
#: minutes. The number also determines the number of clusters.
QUALITY_FRAMES = 12_000
#: Layer of hubert-tiny whose classes the second iteration learns.
LABEL_LAYER = 3


def runs(corpora: Path, folder: Path, updates: int, *, precision: str) -> list[Iterator[tuple[str, Trained]]]:
    """Return groups of runs that do not depend on each other; each group yields names and runs, training on demand."""
    audio, options = corpora / "train", _options(corpora, updates, precision)

    def alone(name: str, job: Job) -> Iterator[tuple[str, Trained]]:
        yield name, train(job, folder)

    def hubert() -> Iterator[tuple[str, Trained]]:
        first_options = _options(corpora, max(1, updates // 3), precision)
        first = train(Job("hubert-1", audio, "hubert-tiny", first_options), folder)
        yield "HuBERT, iteration 1", first
        labels = folder / "hubert-labels"
        settings = LabelSettings(model=str(first.run.absolute()), layer=LABEL_LAYER, clusters=100)
        # Without worker processes: forking is not safe while other threads compute.
        label(audio, labels, settings, num_workers=0)
        given = options | {"data.labels": str(labels.absolute())}
        yield "HuBERT, iteration 2", train(Job("hubert-2", audio, "hubert-tiny", given), folder)

    return [
        alone("wav2vec 2.0", Job("wav2vec2", audio, "wav2vec2-tiny", options)),
        alone("BEST-RQ", Job("best-rq", audio, "best-rq-tiny", options)),
        hubert(),
    ]


def _options(corpora: Path, updates: int, precision: str) -> dict[str, Any]:
    return {
        "data.valid": str(corpora / "dev"),
        "trainer.max_steps": updates,
        "trainer.precision": precision,
        "trainer.val_check_interval": max(1, updates // 12),
        "trainer.checkpoint_every": max(1, updates // 4),
        "trainer.keep_every": max(1, updates // 4),
        "trainer.progress": "false",
    }


def main() -> None:
    """Do the missing runs and probes, write the tables and print them."""
    parser = corpora_parser(__doc__ or "")
    parser.add_argument("--updates", type=int, default=3000, help="updates per run (HuBERT's first iteration: a third)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per head in tasks without folds (with folds: one)")
    parser.add_argument("--probe_steps", type=int, default=600, help="number of optimiser steps of each probe head")
    parser.add_argument("--curve", action="store_true", help="also probe the checkpoints at each quarter of a run")
    arguments = parser.parse_args()
    decides = what_decides(arguments.corpora, ["train", "dev", "test", "voices_train", "voices_dev", "voices_test"])
    settings = {name: getattr(arguments, name) for name in ("updates", "probe_steps", "seeds", "precision")}
    study = StudyFile(arguments.output, {"study": "compare_systems", **settings, **decides})
    groups = runs(arguments.corpora, arguments.runs, arguments.updates, precision=arguments.precision)
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for done in [pool.submit(_assess, study, group, arguments) for group in groups]:
            done.result()
    study.conclude(list(table(study.results)))
    write_csv(study.results, arguments.output.with_suffix(".csv"))
    print("\n".join(study.content["findings"]))


def _assess(study: StudyFile, group: Iterator[tuple[str, Trained]], arguments: argparse.Namespace) -> None:
    """Measure and probe the encoders of these runs, and the untrained encoders of the same architecture."""
    for name, trained in group:
        models = {name: fastssl.load_encoder(trained.run)}
        if name in UNTRAINED:
            models[UNTRAINED[name]] = RandomSource(models[name], seed=0).encoder
        for encoder_name, encoder in models.items():
            if f"run/{encoder_name}" not in study.results:
                costs = {"updates": trained.updates, "audio_hours": trained.audio_hours} if encoder_name == name else {}
                quality = layer_quality(encoder, arguments.corpora / "dev", minutes=8.0, max_frames=QUALITY_FRAMES)
                study.add(f"run/{encoder_name}", {**costs, "width": encoder.config.hidden_size, "layers": quality})
        baselines = [LOG_MEL] if name == WITH_LOG_MEL else []
        _probe(study, models, baselines, arguments.corpora, steps=arguments.probe_steps, seeds=arguments.seeds)
        if arguments.curve:
            _probe_checkpoints(study, name, trained, arguments)


def _probe_checkpoints(study: StudyFile, name: str, trained: Trained, arguments: argparse.Namespace) -> None:
    """Probe the intermediate checkpoints of a run, for `CURVE` only."""
    task = PROBES[CURVE]
    settings = task.settings(steps=arguments.probe_steps, seeds=1)
    for update in sorted(int(kept.stem) for kept in (trained.run / "checkpoints").glob("[0-9]*.ckpt")):
        key = f"curve/{name}/{update}"
        if update < trained.updates and key not in study.results:
            encoder = open_checkpoint(trained.run, update).speech_encoder
            (result,) = run_probe({name: encoder}, *task.tables(arguments.corpora), settings, baselines=())
            study.add(key, _summary(result))


def _probe(
    study: StudyFile,
    models: Mapping[str, SpeechEncoder],
    baselines: Sequence[str],
    corpora: Path,
    *,
    steps: int,
    seeds: int,
) -> None:
    """Run the probes of encoders and baselines that the study does not have yet."""
    features = FeatureStore()
    for task_name, task in PROBES.items():
        left = {name: model for name, model in models.items() if f"probe/{name}/{task_name}" not in study.results}
        beside = [name for name in baselines if f"probe/{name}/{task_name}" not in study.results]
        if not left and not beside:
            continue
        settings = task.settings(steps=steps, seeds=seeds if task.folds is None else 1)
        # If only a baseline is left, still pass an encoder: `run_probe` takes the device from it.
        results = run_probe(left or models, *task.tables(corpora), settings, features=features, baselines=beside)
        for result in results:
            study.add(f"probe/{result.encoder}/{task_name}", _summary(result))


def _summary(result: ProbeResult) -> dict[str, Any]:
    return {
        "mean": result.mean,
        "std": result.std,
        "errors": [run.error for run in result.runs],
        "chosen": [run.chosen for run in result.runs],
        "dev_errors": [dict(run.dev_errors) for run in result.runs],
        "test_examples": [run.parts["test"].examples for run in result.runs],
        "infeasible": [run.parts["test"].infeasible for run in result.runs],
        "layer_weights": [list(run.layer_weights) for run in result.runs],
    }


def _encoders(results: Mapping[str, Any]) -> list[str]:
    return [name for name in NAMES if any(key.startswith(f"probe/{name}/") for key in results)]


def table(results: Mapping[str, Any]) -> list[str]:
    """Return Markdown tables: errors in % (mean and deviation over folds or seeds), quality, and the curve."""
    lines = ["| encoder | " + " | ".join(PROBES) + " |", "|" + "---|" * (len(PROBES) + 1)]
    for name in _encoders(results):
        cells = [_cell(results[f"probe/{name}/{task}"]) for task in PROBES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| last layer of | " + " | ".join(QUALITY) + " |", "|" + "---|" * (len(QUALITY) + 1)]
    for name in _encoders(results):
        if (run := results.get(f"run/{name}")) is not None:
            cells = [f"{value:.4g}" for value in _quality(run).values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    on_the_way = [key.split("/") for key in results if key.startswith("curve/")]
    if on_the_way:
        lines += ["", f"| {CURVE} | after updates |", "|---|---|"]
    for name in NAMES:
        updates = sorted(int(update) for _, other, update in on_the_way if other == name)
        if updates:
            cells = [f"{update}: {_cell(results[f'curve/{name}/{update}'])}" for update in updates]
            cells.append(f"{results[f'run/{name}']['updates']}: {_cell(results[f'probe/{name}/{CURVE}'])}")
            lines.append(f"| {name} | {', '.join(cells)} |")
    return lines


def _cell(result: Mapping[str, Any]) -> str:
    spread = "" if result["std"] is None else f" +- {100 * result['std']:.1f}"
    return f"{100 * result['mean']:.1f}{spread}"


#: Measures of a last layer; they can be compared between encoders only if the last three numbers agree.
QUALITY = {
    "effective rank": "effective_rank",
    "RankMe": "rankme",
    "log inertia per frame": "log_inertia_per_frame",
    "Davies-Bouldin": "davies_bouldin",
    "frames": "frames",
    "rows of RankMe": "rankme_rows",
    "clusters": "clusters",
}


def _quality(run: Mapping[str, Any]) -> dict[str, float]:
    return {title: run["layers"][-1][name] for title, name in QUALITY.items()}


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Write a CSV file with a row per encoder: errors, then the quality of its last layer."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        deviations = [f"{task}, deviation" for task in PROBES]
        writer.writerow(
            ["encoder", "updates", *PROBES, *deviations, "width", *(f"{name}, last layer" for name in QUALITY)]
        )
        for name in _encoders(results):
            found = [results[f"probe/{name}/{task}"] for task in PROBES]
            errors = [f"{result['mean']:.6g}" for result in found]
            spreads = ["" if result["std"] is None else f"{result['std']:.6g}" for result in found]
            run = results.get(f"run/{name}")
            quality: list[Any] = [""] * (1 + len(QUALITY))
            if run is not None:
                quality = [run["width"], *(f"{value:.6g}" for value in _quality(run).values())]
            writer.writerow([name, "" if run is None else run.get("updates", 0), *errors, *spreads, *quality])


if __name__ == "__main__":
    main()
