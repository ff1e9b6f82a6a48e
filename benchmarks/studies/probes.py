"""What the studies ask of a finished run: `fastssl probe`'s tasks, each by corpus and label."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import fastssl
from fastssl.eval.probe.features import FeatureStore
from fastssl.eval.probe.run import ProbeSettings, Task, run_probe
from fastssl.eval.probe.tables import Table, read_table


class Probe(NamedTuple):
    """A task.

    Args:
        test: Folder of the corpus to test on, whose name ends in "test"; those to train and develop on are named alike.
        target: Column with the label.
        segment_s: Length of the segments; None for whole utterances.
        task: As in `ProbeSettings`.
        folds: Column whose values are held out in turn.
        fold_size: Values of a fold.
        batch_s: Audio for a step of a head.
        context_s: What a frame's head sees on either side; ctc only.
        learning_rates: To choose from; None for those of the task.
        share_of_steps: That its heads take of those that a study has for one.
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
        """To train, develop and test on."""
        prefix = self.test.removesuffix("test")
        names = [f"{prefix}{part}" for part in ("train", "dev", "test")]
        train, dev, test = (read_table(corpora / name / "utterances.tsv") for name in names)
        return train, dev, test

    def settings(self, *, steps: int, seeds: int) -> ProbeSettings:
        """Of `run_probe`."""
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
    """Errors of a run's encoder by probe, the mean over folds and seeds of the heads."""
    encoder = fastssl.load_encoder(run)
    features = FeatureStore()
    errors = {}
    for name, task in probes.items():
        settings = task.settings(steps=steps, seeds=seeds)
        (result,) = run_probe({run.name: encoder}, *task.tables(corpora), settings, features=features, baselines=())
        errors[name] = result.mean
    return errors
