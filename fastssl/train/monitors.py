"""What a user sees of a run while it trains: progress bar, metrics.csv, TensorBoard and warnings."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastssl.data.batches import AudioBatch
from fastssl.data.corpus import Problem
from fastssl.train.account import Account
from fastssl.train.event_file import EventFile
from fastssl.train.metrics_file import MetricsFile
from fastssl.train.module import PretrainModule, TrainingError, code_usage
from fastssl.train.results import UpdateResult

logger = logging.getLogger(__name__)

#: Number of consecutive updates that must look collapsed before a warning is logged.
_COLLAPSED_UPDATES = 100
#: Columns for systems that report how often each code is the target.
_CODE_USAGE = ("code_perplexity", "code_utilisation")


def metric_columns(score_names: Sequence[str], *, counts_codes: bool, extra: Sequence[str] = ()) -> list[str]:
    """List the columns of metrics.csv.

    Args:
        score_names: `PretrainingModel.score_names` of the system.
        counts_codes: `PretrainingModel.counts_codes` of the system.
        extra: Columns of schedules and callbacks.
    """
    usage = _CODE_USAGE if counts_codes else ()
    scores = ["loss", *score_names, *usage]
    columns = [
        "update",
        "audio_hours",
        *scores,
        "grad_norm",
        "learning_rate",
        "temperature",
        "masked_frames",
        "utterances",
        "unusable",
        "audio_s_per_s",
        *(f"valid_{name}" for name in scores),
        *extra,
    ]
    return list(dict.fromkeys(columns))


class Monitor(Callback):
    """Lightning callback that reports what the module measured, and counts the recordings that cannot be used.

    The first process writes the reports. All processes keep the same count, so that all stop at the same update.

    Args:
        run: Folder of the run.
        account: Count of the recordings drawn; this callback updates it.
        score_names: `PretrainingModel.score_names` of the system.
        counts_codes: `PretrainingModel.counts_codes` of the system.
        columns: Further columns of metrics.csv: schedules, and those of callbacks that use `write`.
        log_every: Updates between two rows of metrics.csv.
        resume_at: Number of updates already finished by a run that is resumed; None for a new run.
    """

    def __init__(
        self,
        run: Path,
        account: Account,
        *,
        score_names: Sequence[str],
        counts_codes: bool = False,
        columns: Sequence[str] = (),
        log_every: int,
        resume_at: int | None,
    ) -> None:
        self.run = run
        self.account = account
        self.score_names, self.counts_codes = tuple(score_names), counts_codes
        self.columns = tuple(columns)
        self.log_every = log_every
        self.resume_at = resume_at
        self.audio_s = 0.0
        #: Values for the progress bar, from the last update and the last row of metrics.csv.
        self.shown: dict[str, float] = {}
        #: Latest scores of the held-out recordings by column, and the number of updates when they were measured.
        self.scores: dict[str, float] = {}
        self.scored_at = 0
        self._window: dict[str, float] = {}
        self._code_counts = torch.empty(0, dtype=torch.float64, device="cpu")
        self._named_held_out: set[str] = set()
        self._collapsed = 0
        self._clock = 0.0
        self._timed_audio_s = 0.0
        self._file: MetricsFile | None = None
        self._board: EventFile | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the audio seen, the last scores, the sums since the last row, and the count of collapsed updates."""
        return {
            "audio_s": self.audio_s,
            "scores": self.scores,
            "scored_at": self.scored_at,
            "window": dict(self._window),
            "code_counts": self._code_counts,
            "collapsed": self._collapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's state, as returned by `state_dict`."""
        self.audio_s = state_dict["audio_s"]
        self.scores, self.scored_at = state_dict.get("scores", {}), state_dict.get("scored_at", 0)
        self._window = dict(state_dict["window"])
        self._code_counts = state_dict.get("code_counts", self._code_counts)
        self._collapsed = state_dict["collapsed"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open metrics.csv and the TensorBoard file, on the first process."""
        if not trainer.is_global_zero or self._file is not None:
            return
        columns = metric_columns(self.score_names, counts_codes=self.counts_codes, extra=self.columns)
        self._file = MetricsFile(self.run / "metrics.csv", columns, resume_at=self.resume_at)
        self._board = EventFile(self.run / "logs", resume_at=self.resume_at)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring the throughput."""
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Report the updates whose results have been read."""
        assert isinstance(pl_module, PretrainModule)
        for result in pl_module.take_results():
            self._report(trainer, result)

    def _report(self, trainer: Trainer, result: UpdateResult) -> None:
        update, problems = result.values, result.problems
        # From the sums, every process knows whether any process has problems, so all agree whether to gather them.
        if update["unusable"] and trainer.world_size > 1:
            everywhere: list[list[Problem]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everywhere, problems)
            problems = [problem for part in everywhere for problem in part]
        self._report_problems(trainer, self.account.note(round(update["drawn"]), problems))
        if not update["masked_frames"] and trainer.is_global_zero:
            logger.warning("update %d has no masked frames: none of its recordings could be used", result.update)
        self.audio_s += update["audio_s"]
        self._timed_audio_s += update["audio_s"]
        for name in ("masked_frames", "utterances"):
            self._window[name] = self._window.get(name, 0.0) + update[name]
        for name in ("loss", *self.score_names):
            self._window[name] = self._window.get(name, 0.0) + update[name] * update["masked_frames"]
        if self._code_counts.shape != result.code_counts.shape:
            self._code_counts = torch.zeros_like(result.code_counts)
        self._code_counts = self._code_counts + result.code_counts
        self._watch_for_collapse(trainer, update)
        self.shown |= update
        if result.update % self.log_every == 0 or result.update == trainer.max_steps:
            self._close_window(trainer, update)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: AudioBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log each held-out recording that cannot be used, once. They do not count towards `data.max_bad_fraction`."""
        for problem in batch.problems:
            if problem.name not in self._named_held_out:
                logger.warning("unusable, held out: %s", problem)
            self._named_held_out.add(problem.name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager that excludes the time spent inside it from the throughput."""
        self._clock -= time.perf_counter()
        yield
        self._clock += time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the throughput clock while the held-out recordings are scored."""
        self._clock -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the scores of the held-out recordings, and restart the throughput clock."""
        assert isinstance(pl_module, PretrainModule)
        self._clock += time.perf_counter()
        scores = {f"valid_{name}": value for name, value in pl_module.last_validation.items()}
        columns = metric_columns(self.score_names, counts_codes=self.counts_codes)
        scores = {name: value for name, value in scores.items() if name in columns}
        self.shown |= scores
        self.scores, self.scored_at = scores, trainer.global_step
        self.write(trainer, scores)
        if trainer.is_global_zero:
            held_out = {name.removeprefix("valid_"): value for name, value in scores.items()}
            described = ", ".join(_describe_scores(held_out, loss=self.score_names[0]))
            logger.info("held-out recordings after %d updates: %s", trainer.global_step, described)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log why training stops, on the first process only, because the reason is the same on all processes."""
        if isinstance(exception, TrainingError) and trainer.is_global_zero:
            logger.error("%s", exception)

    def _close_window(self, trainer: Trainer, update: dict[str, float]) -> None:
        """Write a row with the averages over the updates since the last row."""
        now = time.perf_counter()
        frames = max(1.0, self._window["masked_frames"])
        rates = ("learning_rate", "grad_norm", *self.columns)
        row: dict[str, float] = {name: update[name] for name in rates if name in update}
        row |= {name: self._window[name] / frames for name in ("loss", *self.score_names)}
        row |= {name: self._window[name] for name in ("masked_frames", "utterances")}
        row |= code_usage(self._code_counts)
        row["unusable"] = len(self.account.unusable) + len(self.account.unusable_noise)
        row["audio_hours"] = self.audio_s / 3600
        row["audio_s_per_s"] = self._timed_audio_s / max(1e-9, now - self._clock)
        self.shown |= row
        self._clock, self._timed_audio_s = now, 0.0
        self._window.clear()
        self._code_counts = torch.zeros_like(self._code_counts)
        self.write(trainer, row)

    def write(self, trainer: Trainer, row: dict[str, float]) -> None:
        """Write values to metrics.csv and TensorBoard, as those of the current update.

        Processes other than the first do nothing.

        Args:
            trainer: Lightning's trainer, which counts the updates.
            row: Values by column of metrics.csv.
        """
        if self._file is None or self._board is None:
            return
        # A checkpoint from just before the scores was resumed, but their row had already been written.
        if self._file.has(row, trainer.global_step):
            return
        self._file.append({"update": trainer.global_step, "audio_hours": self.audio_s / 3600, **row})
        self._board.add(row, trainer.global_step)

    def _report_problems(self, trainer: Trainer, problems: list[Problem]) -> None:
        if trainer.is_global_zero:
            for problem in problems:
                logger.warning("unusable: %s", problem)

    def _watch_for_collapse(self, trainer: Trainer, update: dict[str, float]) -> None:
        """Warn once if, for many updates in a row, nearly all frames had the same code and accuracy was at chance."""
        perplexities = [value for name, value in update.items() if name.startswith("code_perplexity_")]
        if not perplexities:  # systems with given targets cannot collapse
            return
        perplexity = max(perplexities)
        collapsed = update["masked_frames"] > 0 and perplexity < 2 and update["accuracy"] < update["chance"] + 0.02
        self._collapsed = self._collapsed + 1 if collapsed else 0
        if self._collapsed == _COLLAPSED_UPDATES and trainer.is_global_zero:
            logger.warning(
                "the codes have collapsed: for %d updates, nearly all frames had the same code (perplexity %.2f) and "
                "the accuracy was no better than guessing (%.1f %%). More training rarely helps. Try a lower "
                "optimizer.lr, more audio per update, or a higher model.gumbel_temperature.end or "
                "model.diversity_loss_weight",
                self._collapsed,
                perplexity,
                100 * update["accuracy"],
            )


class _TwoLines(Progress):
    """A progress bar with the numbers below it, because an 80-column terminal has no room for both on one line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.description)


class RunProgress(Callback):
    """Lightning callback that shows a progress bar on a terminal; elsewhere, it logs a line per row of metrics.csv.

    Args:
        monitor: Callback with the values to show; it must come before this one.
        enabled: Show a progress bar on a terminal; false logs lines on a terminal too.
    """

    def __init__(self, monitor: Monitor, *, enabled: bool) -> None:
        self.monitor = monitor
        self.enabled = enabled
        self._progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the progress bar if it is enabled and the output is a terminal."""
        if not (trainer.is_global_zero and self.enabled and get_console().is_terminal):
            return
        columns = (TextColumn("update"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._progress = _TwoLines(*columns, console=get_console())
        self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Advance the bar after each update, or log a line for each row of metrics.csv."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not trainer.is_global_zero:
            return
        shown = self.monitor.shown
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(
                task, completed=trainer.global_step, description=_describe(shown, loss=self.monitor.score_names[0])
            )
        elif trainer.global_step % self.monitor.log_every == 0 or trainer.global_step == trainer.max_steps:
            logger.info(
                "update %d of %d: %s",
                trainer.global_step,
                trainer.max_steps,
                _describe(shown, loss=self.monitor.score_names[0]),
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the progress bar, which restores the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the progress bar; after an exception, Lightning calls no `teardown`."""
        self.teardown(trainer, pl_module, "fit")


def _describe(shown: dict[str, float], *, loss: str) -> str:
    codes = " ".join(f"{value:.1f}" for name, value in sorted(shown.items()) if name.startswith("code_perplexity"))
    parts = _describe_scores(shown, loss=loss)
    if codes:
        parts.append(f"perplexity {codes}")
    if "audio_s_per_s" in shown:
        parts += [f"{shown['audio_s_per_s']:.0f} s/s", f"{shown['audio_hours']:.2f} h"]
    return ", ".join(parts)


def _describe_scores(scores: dict[str, float], *, loss: str) -> list[str]:
    parts = [f"loss {scores[loss]:.3f}"]
    if "accuracy" in scores:
        parts.append(f"accuracy {100 * scores['accuracy']:.1f} % (chance {100 * scores['chance']:.1f} %)")
    if "cosine_similarity" in scores:
        parts.append(f"cosine {scores['cosine_similarity']:.3f}")
    if "frame_period_ms" in scores:
        parts.append(f"a frame every {scores['frame_period_ms']:.0f} ms")
    return parts
