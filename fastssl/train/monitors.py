"""What a user sees of a run while it trains: progress bar, metrics.csv, TensorBoard, and warnings in words."""

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
from torch.utils.tensorboard import SummaryWriter

from fastssl.data.batches import AudioBatch
from fastssl.data.corpus import Problem
from fastssl.train.data import Account
from fastssl.train.metrics_file import MetricsFile
from fastssl.train.module import PretrainModule, TrainingError, code_usage

logger = logging.getLogger(__name__)

#: Updates in a row that look collapsed before it is said.
_COLLAPSED_UPDATES = 100
#: Where a system reports how often each code is the target.
_CODE_USAGE = ("code_perplexity", "code_utilisation")


def metric_columns(score_names: Sequence[str], *, extra: Sequence[str] = ()) -> list[str]:
    """Columns of metrics.csv for a system with such scores.

    Args:
        score_names: `PretrainingModel.score_names`.
        extra: Of schedules and callbacks.
    """
    usage = list(_CODE_USAGE) if "prediction_loss" in score_names else []
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
    """Reports what the module measured, on the first process; keeps the account of unusable recordings, on all.

    Args:
        run: Folder of the run.
        account: Of the recordings drawn.
        score_names: What the system reports, `PretrainingModel.score_names`.
        columns: Of `PretrainingModel.schedules`, and of callbacks that `write` too.
        log_every: Updates between two rows.
        resume_at: The update that a resumed run continues behind; None for a new run.
    """

    def __init__(
        self,
        run: Path,
        account: Account,
        *,
        score_names: Sequence[str],
        columns: Sequence[str] = (),
        log_every: int,
        resume_at: int | None,
    ) -> None:
        self.run = run
        self.account = account
        self.score_names = tuple(score_names)
        self.columns = tuple(columns)
        self.log_every = log_every
        self.resume_at = resume_at
        self.audio_s = 0.0
        #: What the progress bar shows: of the last update, and of the last row.
        self.shown: dict[str, float] = {}
        #: The last scores of the held-out recordings, by column, and the update after which they were measured.
        self.scores: dict[str, float] = {}
        self.scored_at = 0
        self._window: dict[str, float] = {}
        self._code_counts = torch.empty(0, dtype=torch.float64)
        self._problems: list[Problem] = []
        self._named_held_out: set[str] = set()
        self._collapsed = 0
        self._clock = 0.0
        self._timed_audio_s = 0.0
        self._file: MetricsFile | None = None
        self._board: SummaryWriter | None = None

    def state_dict(self) -> dict[str, Any]:
        """Audio seen, the last scores, the open interval, and how long the codes look collapsed."""
        return {
            "audio_s": self.audio_s,
            "scores": self.scores,
            "scored_at": self.scored_at,
            "window": dict(self._window),
            "code_counts": self._code_counts,
            "collapsed": self._collapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.audio_s = state_dict["audio_s"]
        self.scores, self.scored_at = state_dict.get("scores", {}), state_dict.get("scored_at", 0)
        self._window = dict(state_dict["window"])
        self._code_counts = state_dict.get("code_counts", self._code_counts)
        self._collapsed = state_dict["collapsed"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the files."""
        if not trainer.is_global_zero or self._file is not None:
            return
        self._file = MetricsFile(
            self.run / "metrics.csv", metric_columns(self.score_names, extra=self.columns), resume_at=self.resume_at
        )
        purge = None if self.resume_at is None else self.resume_at + 1
        self._board = SummaryWriter(self.run / "logs", purge_step=purge)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the throughput."""
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Take in a batch, and after the last one of an update, the update."""
        assert isinstance(pl_module, PretrainModule)
        self._problems += batch.problems
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        update = pl_module.last_update
        problems, self._problems = self._problems, []
        # All processes know from the sums whether any of them has something to tell.
        if update["unusable"] and trainer.world_size > 1:
            everywhere: list[list[Problem]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everywhere, problems)
            problems = [problem for part in everywhere for problem in part]
        self._report_problems(trainer, self.account.note(round(update["drawn"]), problems))
        if not update["masked_frames"] and trainer.is_global_zero:
            logger.warning("update %d has no masked frame: nothing of its batch could be used", trainer.global_step)
        self.audio_s += update["audio_s"]
        self._timed_audio_s += update["audio_s"]
        for name in ("masked_frames", "utterances"):
            self._window[name] = self._window.get(name, 0.0) + update[name]
        for name in ("loss", *self.score_names):
            self._window[name] = self._window.get(name, 0.0) + update[name] * update["masked_frames"]
        if len(self._code_counts) == 0:
            self._code_counts = torch.zeros_like(pl_module.last_code_counts)
        self._code_counts = self._code_counts + pl_module.last_code_counts
        self._watch_for_collapse(trainer, update)
        self.shown |= update
        if trainer.global_step % self.log_every == 0 or trainer.global_step == trainer.max_steps:
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
        """Name held-out recordings that cannot be used; they do not count against the limit."""
        for problem in batch.problems:
            if problem.name not in self._named_held_out:
                logger.warning("unusable, held out: %s", problem)
            self._named_held_out.add(problem.name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done here is not counted in the throughput."""
        self._clock -= time.perf_counter()
        yield
        self._clock += time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scoring is not counted in the throughput."""
        self._clock -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the scores."""
        assert isinstance(pl_module, PretrainModule)
        self._clock += time.perf_counter()
        scores = {f"valid_{name}": value for name, value in pl_module.last_validation.items()}
        scores = {name: value for name, value in scores.items() if name in metric_columns(self.score_names)}
        self.shown |= scores
        self.scores, self.scored_at = scores, trainer.global_step
        self.write(trainer, scores)
        if trainer.is_global_zero:
            held_out = {name.removeprefix("valid_"): value for name, value in scores.items()}
            described = ", ".join(_describe_scores(held_out, loss=self.score_names[0]))
            logger.info("held-out recordings after %d updates: %s", trainer.global_step, described)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log why training cannot go on, before anything is torn down: all processes have the same reason."""
        if not trainer.is_global_zero:
            return
        if isinstance(exception, TrainingError):
            logger.error("%s", exception)
        elif isinstance(exception, (KeyboardInterrupt, SystemExit)):
            logger.info("stopped after %d updates; --resume continues behind the last checkpoint", trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _close_window(self, trainer: Trainer, update: dict[str, float]) -> None:
        """Write the averages over the updates since the last row."""
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
        """Write what was found after the update that has just ended, to metrics.csv and TensorBoard.

        Args:
            trainer: Knows the update.
            row: Values by column.
        """
        if self._file is None or self._board is None:
            return
        self._file.append({"update": trainer.global_step, "audio_hours": self.audio_s / 3600, **row})
        for name, value in row.items():
            self._board.add_scalar(name, value, trainer.global_step)

    def _report_problems(self, trainer: Trainer, problems: list[Problem]) -> None:
        if trainer.is_global_zero:
            for problem in problems:
                logger.warning("unusable: %s", problem)

    def _watch_for_collapse(self, trainer: Trainer, update: dict[str, float]) -> None:
        """Say it once when all codes have become one and the model guesses."""
        perplexities = [value for name, value in update.items() if name.startswith("code_perplexity_")]
        if not perplexities:  # targets that are given do not collapse
            return
        perplexity = max(perplexities)
        collapsed = update["masked_frames"] > 0 and perplexity < 2 and update["accuracy"] < update["chance"] + 0.02
        self._collapsed = self._collapsed + 1 if collapsed else 0
        if self._collapsed == _COLLAPSED_UPDATES and trainer.is_global_zero:
            logger.warning(
                "the codes have collapsed: for %d updates nearly all frames had the same code (perplexity %.2f) and "
                "the accuracy was that of guessing (%.1f %%). More training rarely mends this; a lower optimizer.lr, "
                "more audio per update, a higher model.gumbel_temperature.end or model.diversity_loss_weight may",
                self._collapsed,
                perplexity,
                100 * update["accuracy"],
            )


class _TwoLines(Progress):
    """The bar, and below it the numbers, for which a terminal of 80 columns has no room beside it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.description)


class RunProgress(Callback):
    """A progress bar on a terminal; one line per row of metrics.csv elsewhere.

    Args:
        monitor: Has the numbers.
        enabled: Whether to show a bar on a terminal.
    """

    def __init__(self, monitor: Monitor, *, enabled: bool) -> None:
        self.monitor = monitor
        self.enabled = enabled
        self._progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        if not (trainer.is_global_zero and self.enabled and get_console().is_terminal):
            return
        columns = (TextColumn("update"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._progress = _TwoLines(*columns, console=get_console())
        self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Move the bar after each update, or log a line with each row."""
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
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


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
