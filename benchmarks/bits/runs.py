"""Train briefly with each tree's command line, and let one tree also finish what the other began."""

import csv
import json
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.bits.record import Record, Results
from benchmarks.bits.trees import Tree

#: Options of every run: short crops of few recordings, no worker processes.
_OPTIONS = (
    *("--trainer.log_every", "1", "--trainer.accelerator", "cpu", "--trainer.progress", "false"),
    *("--data.max_duration_s", "9", "--data.crop_s", "3", "--data.valid", "0.1", "--data.num_workers", "0"),
)
#: Options that shrink the student of a large recipe to the size of the teacher in `teacher.py`.
_TINY_STUDENT = (
    *("--model.hidden_size", "192", "--model.num_hidden_layers", "6", "--model.num_attention_heads", "4"),
    *("--model.intermediate_size", "768", "--model.conv_dim", "[128,128,128,128,128,128,128]"),
    *("--model.num_conv_pos_embeddings", "32", "--model.num_conv_pos_embedding_groups", "8"),
)
#: Columns of the metrics that depend on the clock.
_TIMED_COLUMNS = {"audio_s_per_s"}


class Run(NamedTuple):
    """A training run.

    Args:
        recipe: Name of a recipe in the package.
        options: Further options; CORPUS, TEACHER, LABELS and SEGMENTS stand for the respective folders.
    """

    recipe: str
    options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """Name of the fastssl command that runs the recipe."""
        return "distill" if self.recipe.startswith("distil") else "pretrain"


#: Further runs, in addition to every tiny recipe; they are not resumed.
VARIATIONS = {
    "hubert-tiny, labels and segments": Run(
        "hubert-tiny",
        ("--data.labels", "LABELS", "--data.segments", "SEGMENTS", "--model.compressor", "integrate-and-fire"),
    ),
    "wav2vec2-tiny-ofa, segments": Run("wav2vec2-tiny-ofa", ("--data.segments", "SEGMENTS")),
    "best-rq-tiny, average": Run("best-rq-tiny", ("--model.compressor", "average", "--model.compressor_factor", "2")),
    "wav2vec2-tiny, accumulation and layer drop": Run(
        "wav2vec2-tiny", ("--trainer.accumulation", "2", "--model.layerdrop", "0.3", "--data.max_duration_s", "6")
    ),
    "distil-tiny, fixed crops kept": Run(
        "distil-tiny", ("--data.fixed_crops", "true", "--data.teacher_cache", "OUTPUT-cache")
    ),
    "distil-12l-half": Run("distil-12l-half", _TINY_STUDENT),
}


def runs_of(recipes: Path, match: str) -> dict[str, Run]:
    """Return the runs by name: the tiny recipes in a folder and `VARIATIONS`, if their name contains `match`."""
    tiny = {path.stem: Run(path.stem) for path in sorted(recipes.glob("*-tiny*.yaml"))}
    return {name: run for name, run in (tiny | VARIATIONS).items() if match in name}


def compare_runs(before: Tree, after: Tree, folder: Path, *, match: str, updates: int) -> tuple[Results, Results]:
    """Run everything in both trees, and let `after` finish copies of half-finished runs of `before`.

    Args:
        before: Tree that serves as the reference.
        after: The other tree.
        folder: Folder for all files.
        match: Skip runs whose name does not contain this text.
        updates: Number of updates per run; even.

    Returns:
        Results of `before` and of `after`.

    Raises:
        RuntimeError: A run of `before` fails. A failure of `after` is recorded as a result instead.
    """
    places = {name: folder / name.lower() for name in ("CORPUS", "TEACHER", "LABELS", "SEGMENTS")}
    spoken = ("--minutes", "2", "--seed", "0", "--speakers", "4")
    before.run("fastssl.data.synthetic", places["CORPUS"], *spoken, log=folder / "corpus.log")
    before.run("benchmarks.bits.teacher", places["TEACHER"], log=folder / "teacher.log")
    records = {tree: Record() for tree in (before, after)}

    def evaluate(tree: Tree) -> None:
        with nullcontext() if tree is before else _failure_is_a_result(records[after], "evaluation"):
            _evaluate(tree, places, folder, records[tree])

    work = runs_of(before.folder / "fastssl" / "recipes", match)
    with ThreadPoolExecutor(max_workers=2) as threads:
        if not match or any({"LABELS", "SEGMENTS"} & set(run.options) for run in work.values()):
            list(threads.map(evaluate, (before, after)))
            # Both trees read the labels of `before`, so that a difference in labels is reported once.
            for name in ("LABELS", "SEGMENTS"):
                (folder / f"before-{name.lower()}").replace(places[name])
        list(
            threads.map(
                lambda name: _run_in_both(name, work[name], updates, before, after, places, folder, records), work
            )
        )
    return records[before].results, records[after].results


def _evaluate(tree: Tree, places: dict[str, Path], folder: Path, record: Record) -> None:
    """Record labels from MFCC (for HuBERT), segments from a teacher's layer (for compressors), features and quality."""
    teacher, corpus = places["TEACHER"], places["CORPUS"]
    device = ("--device", "cpu")
    segments = ("--model", teacher, "--layer", "3", "--segment_ms", "90", "--clusters", "20")
    for name, more in (("labels", ("--clusters", "100")), ("segments", segments)):
        output = folder / f"{tree.name}-{name}"
        tree.run("fastssl", "label", corpus, "--output", output, *more, *device, log=_log(output))
        record.add(f"fastssl label/{name}", (output / "labels.jsonl").read_text())
        record.add(f"fastssl label/{name} centres", load_file(output / "kmeans.safetensors"))
    output = folder / f"{tree.name}-features"
    tree.run("fastssl", "extract", teacher, corpus, "--output", output, "--layer", "3", *device, log=_log(output))
    for path in sorted(output.rglob("*.safetensors")):
        record.add(f"fastssl extract/{path.name}", load_file(path))
    output = folder / f"{tree.name}-quality.json"
    tree.run("fastssl", "quality", teacher, corpus, "--output", output, "--minutes", "1", *device, log=_log(output))
    quality = json.loads(output.read_text())
    del quality["versions"]  # contains the commit, which differs
    record.add("fastssl quality/numbers", quality)


def _run_in_both(
    name: str,
    run: Run,
    updates: int,
    before: Tree,
    after: Tree,
    places: dict[str, Path],
    folder: Path,
    records: dict[Tree, Record],
) -> None:
    outputs = {tree: folder / f"{tree.name}-{name.replace(', ', '-').replace(' ', '-')}" for tree in (before, after)}
    _train(before, run, updates, outputs[before], places)
    expected = results_of(outputs[before])
    records[before].add(f"{name}/unbroken", expected)
    with _failure_is_a_result(records[after], f"{name}/unbroken"):
        _train(after, run, updates, outputs[after], places)
        records[after].add(f"{name}/unbroken", results_of(outputs[after]))
    if name in VARIATIONS:
        return
    records[before].add(f"{name}/resumed", expected)
    resumed = outputs[before].with_name(f"{outputs[before].name}-resumed")
    rewind(outputs[before], resumed, updates)
    with _failure_is_a_result(records[after], f"{name}/resumed"):
        after.run("fastssl", run.command, "--output", resumed, "--resume", log=_log(resumed))
        records[after].add(f"{name}/resumed", results_of(resumed))


def _train(tree: Tree, run: Run, updates: int, output: Path, places: dict[str, Path]) -> None:
    given = {"OUTPUT-cache": f"{output}-cache", **{name: str(place) for name, place in places.items()}}
    options = [*_OPTIONS, *(given.get(word, word) for word in run.options)]
    if run.command == "distill":
        options += ["--teacher", str(places["TEACHER"])]
    half = str(updates // 2)
    options += ["--recipe", run.recipe, "--trainer.max_steps", str(updates), "--trainer.val_check_interval", half]
    options += ["--trainer.checkpoint_every", half, "--trainer.keep_every", half]
    if tree.randomness is not None and tree.newest_randomness() is not None:
        options += ["--randomness", str(tree.randomness)]
    began_s = time.monotonic()
    tree.run("fastssl", run.command, places["CORPUS"], "--output", output, *options, log=_log(output))
    print(f"{tree.name}: {output.name}, {time.monotonic() - began_s:.0f} s", flush=True)


def _log(output: Path) -> Path:
    return output.with_name(f"{output.name}.log")


@contextmanager
def _failure_is_a_result(record: Record, name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        record.add(f"{name}.failure", f"fails: {error}")


def rewind(run: Path, copy: Path, updates: int) -> None:
    """Copy a finished run, and set the copy back to half of its updates, so that it continues from there.

    Args:
        run: Folder of the finished run, with checkpoints of updates `updates // 2` and `updates`.
        copy: Folder to create.
        updates: Number of updates of the run.
    """
    shutil.copytree(run, copy)
    checkpoints = copy / "checkpoints"
    (checkpoints / f"{updates // 2:07d}.ckpt").replace(checkpoints / "last.ckpt")
    (checkpoints / f"{updates:07d}.ckpt").unlink()


def results_of(run: Path) -> dict[str, object]:
    """Read the results of a run that do not depend on the clock: weights, optimiser, metrics, exported encoder."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name not in _TIMED_COLUMNS]
    metrics = {
        name: torch.tensor([float(row[name]) if row[name] else math.nan for row in rows], dtype=torch.float64)
        for name in columns
    }
    return {
        "update": checkpoint["global_step"],
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "metrics": metrics,
        "encoder": load_file(run / "encoder" / "model.safetensors"),
        "encoder config": json.loads((run / "encoder" / "config.json").read_text()),
    }
