"""Runs of the studies: each is trained once in its own process, and resumed if it was interrupted."""

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
import yaml

from benchmarks.machine import describe
from fastssl.eval.probe.features import SHRINKAGE
from fastssl.eval.probe.settings import LEARNING_RATES
from fastssl.train.metrics_file import read_metrics

#: Description of the corpora that the studies need, shown by --help.
CORPORA = """
CORPORA is a folder with six corpora of connected digits, each with a table `utterances.tsv` (path, speaker, voice,
digits, seconds): train, dev, test, voices_train, voices_dev and voices_test. In the last three, each utterance is
played at one of five speeds and through its own channel, which makes thirty voices from six speakers. The recordings of
single digits are divided between train (takes 5 to 34), dev (35 to 39) and test (40 to 49) before they are joined into
utterances.
"""


@dataclass(frozen=True)
class Job:
    """A run to train.

    Args:
        name: Name of its folder.
        audio: Recordings to train on.
        recipe: Recipe to train with.
        options: Command-line options, without the leading dashes.
        seed: Seed of the run.
        command: Command of fastssl: "pretrain" or "distill".
    """

    name: str
    audio: Path
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    command: str = "pretrain"


@dataclass(frozen=True)
class Trained:
    """Costs of a finished run.

    Args:
        run: Folder of the run.
        updates: Number of optimiser updates.
        audio_hours: Hours of audio that the model has seen, counting repetitions.
        training_s: Seconds spent in updates, without start, scoring and checkpoints.
        cpu_s: Processor seconds of the whole training process, which depend little on other load of the machine.
        peak_mb: Peak resident memory of the training process in MiB, without decoding workers and without GPU memory.
        mean_crop_s: Mean seconds of audio per utterance of a batch.
    """

    run: Path
    updates: int
    audio_hours: float
    training_s: float
    cpu_s: float
    peak_mb: float
    mean_crop_s: float


class DivergedError(RuntimeError):
    """The loss or gradient of a run became NaN or infinite, which is a result of its settings, not an error."""


def train(job: Job, folder: Path) -> Trained:
    """Train a run, or resume or reuse the run that is in its folder.

    Args:
        job: The run.
        folder: Folder that contains the folders of all runs.

    Raises:
        DivergedError: The loss or a gradient became NaN or infinite.
        RuntimeError: The run failed otherwise; the message names its log.
        ValueError: The folder contains a run with other settings.
    """
    run = folder / job.name
    _check_settings(job, run)
    done = run / "trained.json"
    if not done.is_file():
        with _locked(run) as lock:
            # Check again: another study may have finished the run while this one waited for the lock.
            if not done.is_file():
                _write_json(done, _train(job, run, lock) | _account(run))
    return Trained(run, **json.loads(done.read_text()))


#: Settings that do not influence the weights.
_NO_MATTER = {
    f"trainer.{name}"
    for name in (
        *("progress", "log_every", "val_check_interval", "checkpoint_every", "checkpoint_minutes", "keep_every"),
        "timeout_minutes",
    )
}


def _check_settings(job: Job, run: Path) -> None:
    """Refuse a folder that contains a run with other settings, from another study or another scale of this one.

    Raises:
        ValueError: A setting differs.
    """
    if not (run / "config.yaml").is_file():
        return
    settings = yaml.safe_load((run / "config.yaml").read_text())
    wanted = {"audio": job.audio, "seed": job.seed, "recipe": job.recipe, **job.options}
    wanted = {name: value for name, value in wanted.items() if name not in _NO_MATTER}
    other = []
    for name, value in wanted.items():
        there: Any = settings
        for part in name.split("."):
            there = there.get(part) if isinstance(there, dict) else None
        # Treat 48 and 48.0, "false" and False as equal; compare paths after resolving them.
        texts = _as_text(value), _as_text(there)
        if yaml.safe_load(texts[0]) != yaml.safe_load(texts[1]) and len({os.path.realpath(text) for text in texts}) > 1:
            other.append(f"{name} is {there}, not {value}")
    if other:
        raise ValueError(f"--runs: {run} is a run with other settings: {', '.join(other)}; choose another folder")


@contextmanager
def _locked(run: Path) -> Iterator[int]:
    """Wait for the lock of a run's folder, hold it, and yield its file descriptor."""
    run.parent.mkdir(parents=True, exist_ok=True)
    # The training process inherits the lock and holds it until it ends, even if the study is killed and restarted.
    with (run.parent / f"{run.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{run.name} is being trained by another or an earlier study; waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _train(job: Job, run: Path, lock: int) -> dict[str, float]:
    """Run `fastssl pretrain` or `distill`; return peak memory and processor time, including interrupted attempts."""
    options = [f"--{name}={_as_text(value)}" for name, value in job.options.items()]
    log, used = run.parent / f"{run.name}.log", run.parent / f"{run.name}.used.json"
    command = [sys.executable, "-m", "benchmarks.studies.accounted", str(used)]
    command += [sys.executable, "-m", "fastssl", job.command, str(job.audio), "--output", str(run)]
    if (run / "config.yaml").is_file():
        command.append("--resume")
    else:
        command += ["--recipe", job.recipe, f"--seed={job.seed}", *options]
    print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
    with log.open("a") as file:
        before_it = file.tell()
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock,), check=False)
    if ended.returncode != 0:
        if found := _NOT_FINITE.search(log.read_bytes()[before_it:].decode(errors="replace")):
            raise DivergedError(f"{job.name} diverged: {found[0]}")
        raise RuntimeError(f"{job.name} failed with status {ended.returncode}; see its output in {log}")
    account: dict[str, float] = json.loads(used.read_text())
    return account


#: The message of `fastssl pretrain` for a run that diverged.
_NOT_FINITE = re.compile(r"the (loss|gradient norm) is (nan|-?inf) in update \d+")
#: Messages of `measure_quality` and `run_probe` for an encoder with unusable weights.
_OF_BAD_WEIGHTS = re.compile(r"not finite|NaN or infinite|all are 0|the loss at learning rate \S+ is (nan|-?inf)")


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value)


def _account(run: Path) -> dict[str, float]:
    rows = [row for row in read_metrics(run / "metrics.csv") if "audio_s_per_s" in row]
    hours, seconds, utterances = 0.0, 0.0, 0.0
    for row in rows:
        seconds += 3600 * (row["audio_hours"] - hours) / row["audio_s_per_s"]
        utterances += row["utterances"]
        hours = row["audio_hours"]
    return {
        "updates": round(rows[-1]["update"]),
        "audio_hours": hours,
        "training_s": seconds,
        "mean_crop_s": 3600 * hours / utterances,
    }


class StudyFile:
    """JSON file of a study, with settings, machine and results by key; each result is written as soon as it is known.

    Args:
        path: Path of the file; if it exists with the same settings, its results are kept.
        settings: Settings that determine the results.

    Raises:
        ValueError: The file exists with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = Lock()
        plain = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {"settings": plain, "machine": describe(_device()), "results": {}}
        if path.is_file():
            there = json.loads(path.read_text())
            if there.get("settings") != plain:
                raise ValueError(
                    f"--output: {path} has other settings: {there.get('settings')}, not {plain}; choose another file"
                )
            self.content["results"] = there["results"]

    @property
    def results(self) -> dict[str, Any]:
        """Results by key."""
        results: dict[str, Any] = self.content["results"]
        return results

    def add(self, key: str, result: Any) -> None:
        """Add a result and write the file; safe to call from several threads."""
        with self._lock:
            self.results[key] = result
            _write_json(self.path, self.content)

    def conclude(self, findings: Any) -> None:
        """Store the findings that follow from all results, and write the file."""
        self.content["findings"] = findings
        _write_json(self.path, self.content)


def do_all(
    study: StudyFile,
    jobs: Mapping[str, Job],
    folder: Path,
    evaluate: Callable[[str, Trained], Any],
    *,
    parallel: int,
) -> None:
    """Train and evaluate all runs whose results the study does not have yet.

    A run may diverge, or its frames may be NaN, infinite or all zero. This does not stop the study: the result of such
    a run is `{"failed": reason}`, which `finished` leaves out.

    Args:
        study: File to add the results to.
        jobs: Runs by key.
        folder: Folder that contains the folders of all runs.
        evaluate: Computes the result of a key and its finished run. It is called in a new process, so it must be a
            module-level function, or a partial of one.
        parallel: Number of runs to train and evaluate at the same time.

    Raises:
        RuntimeError: A run failed for another reason; runs in progress are finished first.
    """

    def do(key: str) -> None:
        try:
            result = _apart(evaluate, key, train(jobs[key], folder))
        except DivergedError as error:
            result = {"failed": str(error)}
        except ValueError as error:
            if not _OF_BAD_WEIGHTS.search(str(error)):
                raise
            result = {"failed": str(error)}
        study.add(key, result)

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(do, key) for key in jobs if key not in study.results]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _apart(evaluate: Callable[[str, Trained], Any], key: str, trained: Trained) -> Any:
    """Evaluate a run in a new process, because threads would share one core and not free the features' memory."""
    options: dict[str, Any] = {"initializer": _end_with, "initargs": (os.getpid(),)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **options) as pool:
        return pool.submit(evaluate, key, trained).result()


def _end_with(parent: int) -> None:
    """End this process soon after its parent, even if the parent is killed, because nobody would receive the result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def finished(results: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the results of runs that did not fail, and a line of text that names those that did, if any."""
    failed = [key for key, result in results.items() if "failed" in result]
    line = f"{len(failed)} of {len(results)} runs diverged or collapsed and are left out: {', '.join(failed)}"
    return {key: result for key, result in results.items() if key not in failed}, [line] if failed else []


def corpora_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all studies share."""
    parser = argparse.ArgumentParser(
        description=description, epilog=CORPORA, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=Path, metavar="CORPORA", help="folder of the corpora; see below")
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder for the runs; an interrupted study continues from it"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="how many runs (compare_systems: systems) to do at the same time; give each its share of the cores with "
        "OMP_NUM_THREADS, and do not trust measured times",
    )
    parser.add_argument(
        "--precision",
        default="32-true",
        choices=("32-true", "bf16-mixed"),
        help="precision of all runs; bf16-mixed is faster on processors that multiply bf16 (AVX512-BF16, AMX)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="file for results; a .csv and a .png file are written beside it",
    )
    return parser


def what_decides(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings shared by all studies: hashes of the corpora's tables, and how probe heads learn.

    Args:
        folder: Folder of the corpora.
        names: Names of the corpora that the study needs.

    Raises:
        ValueError: A corpus does not exist; better to fail here than after hours of training.
    """
    digests = {}
    for name in names:
        path = folder / name / "utterances.tsv"
        if not path.is_file():
            raise ValueError(f"CORPORA: {path} does not exist; --help describes the corpora that the study needs")
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    rates = {task: rates for task, rates in LEARNING_RATES.items() if rates}
    return {"tables": digests, "heads": {"learning_rates": rates, "shrinkage": SHRINKAGE}}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
