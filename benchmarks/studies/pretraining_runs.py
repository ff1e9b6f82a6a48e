"""Pre-training runs for the studies: each a process of its own, done once, resumed where it was interrupted."""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
import yaml

from benchmarks.machine import describe
from fastssl.data.batches import WaveformDataset, fixed_batches
from fastssl.data.corpus import open_corpus
from fastssl.eval.probe.features import SHRINKAGE
from fastssl.eval.probe.run import LEARNING_RATES
from fastssl.eval.quality.measure import MAX_FRAMES, first_minutes, measure_quality, quality_loader
from fastssl.models.pretraining import PretrainingModel
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.nn.random import utterance_keys
from fastssl.train.config import renamed
from fastssl.train.metrics_file import read_metrics
from fastssl.train.systems import SYSTEMS, build_model

#: How the corpora that the studies take are made; takes are divided before they are strung together.
CORPORA = """
CORPORA is a folder with six of connected digits, each with its `utterances.tsv` (path, speaker, voice, digits,
seconds): train, dev, test, and voices_train, voices_dev, voices_test, where each utterance is at one of five speeds and
through a channel of its own, so that thirty voices come of six speakers. Recordings are divided between train (takes 5
to 34), dev (35 to 39) and test (40 to 49) before they are strung together.
"""


@dataclass(frozen=True)
class Job:
    """A run.

    Args:
        name: Of its folder.
        audio: What it trains on.
        recipe: By which.
        options: As on the command line, without the dashes before them.
        seed: Of the run.
        command: `fastssl pretrain`, or distill.
    """

    name: str
    audio: Path
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    command: str = "pretrain"


@dataclass(frozen=True)
class Trained:
    """What a finished run took.

    Args:
        run: Its folder.
        updates: Optimiser updates.
        audio_hours: Audio that went through the model, every draw counted.
        training_s: Seconds in updates: no scoring, no checkpoint, no start.
        cpu_s: Processor seconds of the training process, all of it, which a machine's other work changes little.
        peak_mb: Resident memory of the training process at its highest, decoding workers apart; on a GPU of the host.
        mean_crop_s: Audio per utterance and draw.
    """

    run: Path
    updates: int
    audio_hours: float
    training_s: float
    cpu_s: float
    peak_mb: float
    mean_crop_s: float


class DivergedError(RuntimeError):
    """A run whose loss or gradient became NaN or infinite: a result of its settings, and no fault of the study."""


def train(job: Job, folder: Path) -> Trained:
    """Do a run, or what is left of it.

    Raises:
        DivergedError: Its loss or a gradient was not finite.
        RuntimeError: It failed otherwise; the message says where its log is.
        ValueError: There is a run of other settings in its folder.
    """
    run = folder / job.name
    _check_settings(job, run)
    done = run / "trained.json"
    if not done.is_file():
        with _locked(run) as lock:
            # Another study may have done it meanwhile.
            if not done.is_file():
                _write_json(done, _train(job, run, lock) | _account(run))
    return Trained(run, **json.loads(done.read_text()))


#: Settings of which the weights are no function.
_NO_MATTER = {
    f"trainer.{name}" for name in ("progress", "log_every", "val_check_interval", "checkpoint_every", "keep_every")
}


def _check_settings(job: Job, run: Path) -> None:
    """Refuse a finished or interrupted run that another study, or another size of this one, left in the folder."""
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
        # 48 and 48.0, "false" and False are the same setting; paths were relative to somewhere.
        texts = _as_text(value), _as_text(there)
        if yaml.safe_load(texts[0]) != yaml.safe_load(texts[1]) and len({os.path.realpath(text) for text in texts}) > 1:
            other.append(f"{name} is {there}, not {value}")
    if other:
        raise ValueError(f"--runs: {run} is a run of other settings: {', '.join(other)}; name another folder")


@contextmanager
def _locked(run: Path) -> Iterator[int]:
    """Wait for the lock of a run's folder, whose file descriptor this is."""
    run.parent.mkdir(parents=True, exist_ok=True)
    # The process inherits the lock and has it until it ends, also where the study is killed and begun anew meanwhile.
    with (run.parent / f"{run.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{run.name} is under way in a process of an earlier study, or of another; waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _train(job: Job, run: Path, lock: int) -> dict[str, float]:
    """Run `fastssl pretrain`; returns peak memory and processor time, of interrupted attempts too if they are known."""
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
        raise RuntimeError(f"{job.name} failed with status {ended.returncode}; see {log}")
    account: dict[str, float] = json.loads(used.read_text())
    return account


#: As `fastssl pretrain` says it.
_NOT_FINITE = re.compile(r"the (loss|gradient norm) is (nan|-?inf) in update \d+")
#: As `measure_quality` and `run_probe` say what an encoder with such weights does.
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


def quality_at(run: Path, update: int, audio: Path, *, minutes: float) -> dict[str, Any]:
    """A checkpoint's loss on held-out recordings, and the quality of each of its layers.

    Args:
        run: Folder of a finished run; not of HuBERT, which needs labels.
        update: The checkpoint's; it was kept, or is the last one.
        audio: Held-out recordings.
        minutes: Of these.
    """
    model = open_checkpoint(run, update)
    scores = held_out_scores(model, audio)
    layers = layer_quality(model.speech_encoder, audio, minutes=minutes)
    return {"held_out_loss": _finite(scores[model.score_names[0]]), "accuracy": scores["accuracy"], "layers": layers}


def layer_quality(
    encoder: SpeechEncoder, audio: Path, *, minutes: float, max_frames: int = MAX_FRAMES
) -> list[dict[str, Any]]:
    """The quality of each layer, on so many minutes of held-out recordings; clusters of at most so many frames."""
    cuts = first_minutes(open_corpus(audio, min_duration_s=1.0).cuts, minutes)
    batches = quality_loader(cuts, normalize=encoder.config.do_normalize)
    layers = measure_quality(encoder, (batch.waveforms for batch in batches), max_frames=max_frames)
    return [{name: _finite(value) for name, value in asdict(layer).items()} for layer in layers]


def _finite(value: Any) -> Any:
    # NaN is no JSON.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_checkpoint(run: Path, update: int | None = None) -> PretrainingModel:
    """The model of a checkpoint that was kept, or of the last one, in evaluation mode."""
    settings = renamed(yaml.safe_load((run / "config.yaml").read_text()))
    model = build_model(SYSTEMS[settings["system"]].config_class.from_dict(settings["model"])).eval()
    kept = run / "checkpoints" / f"{update or 0:07d}.ckpt"
    state = torch.load(kept if kept.is_file() else run / "checkpoints" / "last.ckpt", weights_only=True)
    if update is not None and state["global_step"] != update:
        raise ValueError(f"{run}: kept no checkpoint of update {update}")
    model.load_state_dict({key.removeprefix("model."): tensor for key, tensor in state["state_dict"].items()})
    return model


@torch.inference_mode()
def held_out_scores(
    model: PretrainingModel, audio: Path, *, crop_s: float | None = None, draws: int = 8
) -> dict[str, float]:
    """Loss and accuracy on the same audio, whatever the model was trained on.

    Spans are masked as the model's own settings say, the same for models of the same masking, whatever their seed.
    Where they are few, so are the frames that a loss is the mean of; hence several draws of them.

    Args:
        model: Of a run.
        audio: Held-out recordings.
        crop_s: Score a crop of this length of each; None scores them whole.
        draws: Of masks.
    """
    cuts = open_corpus(audio, min_duration_s=1.0, window_s=60.0).cuts
    dataset = WaveformDataset(normalize=model.config.do_normalize)
    extra = {}
    if isinstance(model, Wav2Vec2ForPreTraining):
        extra["gumbel_temperature"] = model.config.gumbel_temperature.end
    sums: dict[str, float] = {}
    frames = 0
    for spec in fixed_batches(cuts, max_duration_s=60.0, crop_s=crop_s, seed=0):
        batch = dataset[spec]
        for draw in range(draws):
            output = model(batch.waveforms, keys=utterance_keys(0, -1 - draw, batch.ids), **extra)
            frames += output.masked_frames
            for name, value in output.scores().items():
                sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / frames for name, value in sums.items()}


class StudyFile:
    """The JSON of a study: settings, machine, and a result per key, on the disk as soon as it is there.

    Args:
        path: Where; results in it are taken over if the settings are the same.
        settings: What decides the results.

    Raises:
        ValueError: The file is of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = Lock()
        plain = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {"settings": plain, "machine": describe(_device()), "results": {}}
        if path.is_file():
            there = json.loads(path.read_text())
            if there.get("settings") != plain:
                raise ValueError(f"--output: {path} is of other settings: {there.get('settings')}, not {plain}")
            self.content["results"] = there["results"]

    @property
    def results(self) -> dict[str, Any]:
        """By key."""
        results: dict[str, Any] = self.content["results"]
        return results

    def add(self, key: str, result: Any) -> None:
        """Keep a result; several threads may."""
        with self._lock:
            self.results[key] = result
            _write_json(self.path, self.content)

    def conclude(self, findings: Any) -> None:
        """Keep what follows from all of them."""
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
    """Do the runs whose results the study does not have yet, and evaluate each.

    A run that diverged, or whose frames are not finite or all zero, is no reason to stop: its result is
    `{"failed": why}`, which `finished` leaves out.

    Args:
        study: Takes the results.
        jobs: By key.
        folder: Of the runs.
        evaluate: Makes a result of a key and its finished run; in a process of its own, which must find it by name.
        parallel: Runs at a time, of which each is trained, then evaluated.

    Raises:
        RuntimeError: One failed otherwise; those that were under way are finished first.
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
    """In a process of its own: threads of one would share a core in turns, and what features took would not go back."""
    options: dict[str, Any] = {"initializer": _end_with, "initargs": (os.getpid(),)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **options) as pool:
        return pool.submit(evaluate, key, trained).result()


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which may have been killed; its result would go nowhere."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def finished(results: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The results of runs that did not diverge, and a line that names those that did, if any."""
    failed = [key for key, result in results.items() if "failed" in result]
    line = f"{len(failed)} of {len(results)} runs diverged, or collapsed, and are left out: {', '.join(failed)}"
    return {key: result for key, result in results.items() if key not in failed}, [line] if failed else []


def corpora_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that the studies share."""
    parser = argparse.ArgumentParser(
        description=description, epilog=CORPORA, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=Path, metavar="CORPORA", help="see below")
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder for the pre-training runs; kept, and gone on with"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="runs (compare_systems: systems) at a time; give each its share of the cores (OMP_NUM_THREADS), and "
        "expect no clean times",
    )
    parser.add_argument(
        "--precision",
        default="32-true",
        choices=("32-true", "bf16-mixed"),
        help="of all pre-training runs; bf16-mixed is faster on processors that multiply bf16 (AVX512-BF16, AMX)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="results; .csv and .png beside it"
    )
    return parser


def what_decides(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Of a study's settings those that are not the study's own: the corpora, and how heads learn.

    Raises:
        ValueError: A corpus is not there; told before hours of training.
    """
    digests = {}
    for name in names:
        path = folder / name / "utterances.tsv"
        if not path.is_file():
            raise ValueError(f"CORPORA: there is no {path}")
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
