"""Probes of finished runs in the studies: tasks of `fastssl probe`, each with its corpus and label."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import fastssl
from fastssl.eval.probe.features import FeatureStore
from fastssl.eval.probe.run import run_probe
from fastssl.eval.probe.settings import ProbeSettings, Task
from fastssl.eval.probe.tables import Table, read_table


class Probe(NamedTuple):
    """A probing task on a corpus.

    Args:
        test: Folder of the test corpus. Its name ends in "test". With "train" or "dev" in place of "test", it is the
            name of the folder of the training or development corpus.
        target: Column with the label.
        segment_s: Length of the segments in seconds; None for whole utterances.
        task: Kind of task, as in `ProbeSettings`; None chooses it by the target.
        folds: Column whose values are held out in turn; None for no folds.
        fold_size: Number of values that are held out together.
        batch_s: Audio per step of a head, in seconds.
        context_s: Audio that the head of a frame sees on either side, in seconds; ctc only.
        learning_rates: Learning rates to choose from; None for the defaults of the task.
        share_of_steps: Number of steps of a head, as a multiple of the study's number of steps.
    """

    test: str
    target: str
    segment_s: float | None = None
    task: Task | None = None
    folds: str | None = None
    fold_size: int = 1
    batch_s: float = 50.0
    context_s: float = 0.1
    learning_rates: tuple[float, ...] | None = None
    share_of_steps: float = 1.0

    def tables(self, corpora: Path) -> tuple[Table, Table, Table]:
        """Read the tables of the training, development and test corpus in a folder of corpora."""
        prefix = self.test.removesuffix("test")
        names = [f"{prefix}{part}" for part in ("train", "dev", "test")]
        train, dev, test = (read_table(corpora / name / "utterances.tsv") for name in names)
        return train, dev, test

    def settings(self, *, steps: int, seeds: int) -> ProbeSettings:
        """Return the settings for `run_probe`, with the study's number of steps and of seeds per fold."""
        return ProbeSettings(
            self.target,
            task=self.task,
            segment_s=self.segment_s,
            folds=self.folds,
            fold_size=self.fold_size,
            seeds=seeds,
            learning_rates=self.learning_rates,
            steps=round(self.share_of_steps * steps),
            batch_s=self.batch_s,
            context_s=self.context_s,
        )


def probe(run: Path, corpora: Path, probes: Mapping[str, Probe], *, steps: int, seeds: int = 1) -> dict[str, float]:
    """Probe the encoder of a run.

    Args:
        run: Folder of the run.
        corpora: Folder of the corpora.
        probes: Tasks by name.
        steps: Number of steps of each head, before multiplying by the task's `share_of_steps`.
        seeds: Number of heads per fold.

    Returns:
        For each task, the mean error over folds and seeds, as a share.
    """
    encoder = fastssl.load_encoder(run)
    features = FeatureStore()
    errors = {}
    for name, task in probes.items():
        settings = task.settings(steps=steps, seeds=seeds)
        (result,) = run_probe({run.name: encoder}, *task.tables(corpora), settings, features=features, baselines=())
        errors[name] = result.mean
    return errors
