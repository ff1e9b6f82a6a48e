"""`fastssl probe`: how much a linear head can read from the frozen layers of an encoder.

A miniature of SUPERB's protocol (arXiv:2105.01051): the encoder is frozen, its layers are summed with learned weights,
and a linear head is all that is trained on them. It differs in this:

- the tasks are small, and their tables are the user's;
- every layer is standardised on the training part, so that a layer's weight does not depend on its scale, and for CTC
  its directions of large variance are brought down too (ZCA, shrunk), which spares a head most of its steps;
- CTC has a linear head on a window of 0.1 s on either side of a frame, where SUPERB has two LSTM layers;
- verification trains nothing and scores mean-pooled features, of the layer that does best on the development part,
  where SUPERB trains x-vectors;
- the learning rate is one of three, chosen on the development part for each encoder;
- log-mel and an untrained encoder are always in the table.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fastssl.eval.probe.features import (
    EncoderSource,
    Features,
    FeatureStore,
    LogMelSource,
    RandomSource,
    Source,
    Standard,
)
from fastssl.eval.probe.heads import Examples, Kind, Learner, Window
from fastssl.eval.probe.scores import equal_error_rate, pair_scores
from fastssl.eval.probe.tables import Symbols, Table, fold_values
from fastssl.models.speech_encoder import SpeechEncoder

logger = logging.getLogger(__name__)

Task = Literal["classification", "ctc", "verification"]

#: Targets that are strings of symbols; any other is a class, if no task is asked for.
CTC_TARGETS = ("digits", "phones", "phonemes", "text")
#: A window of many frames wants smaller steps than a mean. Verification has nothing to train.
LEARNING_RATES: dict[Task, tuple[float, ...]] = {
    "ctc": (4e-3, 8e-3, 16e-3),
    "classification": (3e-3, 1e-2, 3e-2),
    "verification": (),
}
LOG_MEL, RANDOM = "log-mel", "random initialisation"


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed, and how.

    Args:
        target: Column with the label. "phones" follows from "digits" where there is no such column.
        task: classification (a class per example), ctc (a string per recording; error rate of the likeliest path) or
            verification (equal error rate of pairs). None: ctc for digits, phones, phonemes and text, else
            classification.
        segment_s: Cut recordings into examples of this length, each encoded alone; the rest is dropped. None takes
            whole recordings; ctc does always.
        folds: Column whose values are held out in turn: trained on rows of the others, developed on rows of the others,
            tested on rows of the value. None: the parts as they are.
        fold_size: Values of a fold.
        seeds: Of the order of examples, each a run; per fold. Verification, where nothing is trained, has one.
        learning_rates: Of the head; the best on the development part is taken, for each encoder and run. None takes
            those of `LEARNING_RATES` for the task.
        steps: Of each head, on batches of `batch_s`.
        batch_s: Audio in a batch, seconds.
        context_s: What a frame's head sees on either side, seconds; ctc only.

    Raises:
        ValueError: A value is out of range.
    """

    target: str
    task: Task | None = None
    segment_s: float | None = None
    folds: str | None = None
    fold_size: int = 1
    seeds: int = 1
    learning_rates: tuple[float, ...] | None = None
    steps: int = 500
    batch_s: float = 50.0
    context_s: float = 0.1

    def __post_init__(self) -> None:
        if self.task not in (None, "classification", "ctc", "verification"):
            raise ValueError(f"task: must be classification, ctc or verification, got {self.task!r}")
        if self.resolved_task == "ctc" and self.segment_s is not None:
            raise ValueError("segment_s: ctc takes whole recordings, because a part has no label of its own")
        if self.segment_s is not None and not self.segment_s >= 0.1:
            raise ValueError(f"segment_s: must be at least 0.1, got {self.segment_s}")
        if self.learning_rates == () or any(not rate > 0 for rate in self.rates):
            raise ValueError(f"learning_rates: must be positive, got {self.learning_rates}")
        for name in ("fold_size", "seeds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not self.batch_s > 0 or not self.context_s >= 0:
            raise ValueError(f"batch_s and context_s: must be positive, got {self.batch_s} and {self.context_s}")

    @property
    def resolved_task(self) -> Task:
        """The task, with the rule for None applied."""
        if self.task is not None:
            return self.task
        return "ctc" if self.target in CTC_TARGETS else "classification"

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates, with the rule for None applied."""
        return LEARNING_RATES[self.resolved_task] if self.learning_rates is None else self.learning_rates


@dataclass(frozen=True)
class PartSize:
    """What of a part took part in a run.

    Args:
        recordings: Different ones.
        examples: Recordings or segments.
        hours: Of audio in them.
        infeasible: CTC targets that need more frames than there are; they are not learned from, but counted as errors.
    """

    recordings: int
    examples: int
    hours: float
    infeasible: int = 0


@dataclass(frozen=True)
class ProbeRun:
    """One fold and seed.

    Args:
        error: On the test part: share of wrong examples, edits per symbol, or equal error rate.
        loss: On the test part, nats per label, to which infeasible targets add none; None in verification.
        parts: Sizes of train, dev and test.
        held_out: Values of the fold.
        seed: Of the head.
        dev_errors: What was chosen from: by learning rate, or by layer in verification.
        chosen: The learning rate, or the layer.
        layer_weights: Of the weighted sum; empty in verification.
        trials: Pairs of the same and of different classes, in verification.
    """

    error: float
    loss: float | None
    parts: Mapping[str, PartSize]
    held_out: tuple[str, ...]
    seed: int
    dev_errors: Mapping[str, float]
    chosen: float
    layer_weights: tuple[float, ...] = ()
    trials: tuple[int, int] | None = None


@dataclass(frozen=True)
class ProbeResult:
    """An encoder's row.

    Args:
        encoder: Its name.
        runs: By fold and seed.
        problems: Recordings that could not be used, as "NAME REASON".
        too_short: Recordings without a whole segment.
        frame_period_ms: From one of its frames to the next, on average over the test part.
    """

    encoder: str
    runs: tuple[ProbeRun, ...]
    problems: tuple[str, ...] = ()
    too_short: int = 0
    frame_period_ms: float | None = None
    mean: float = field(init=False)
    std: float | None = field(init=False)

    def __post_init__(self) -> None:
        errors = [run.error for run in self.runs]
        object.__setattr__(self, "mean", statistics.fmean(errors))
        object.__setattr__(self, "std", statistics.stdev(errors) if len(errors) > 1 else None)


def run_probe(
    models: Mapping[str, SpeechEncoder],
    train: Table,
    dev: Table,
    test: Table,
    settings: ProbeSettings,
    *,
    features: FeatureStore | None = None,
    baselines: Sequence[str] = (LOG_MEL, RANDOM),
) -> list[ProbeResult]:
    """Probe encoders beside log-mel and random initialisation.

    Args:
        models: Encoders by name, on the device where to work; frozen.
        train: Heads learn from it, and features are standardised on it.
        dev: Learning rates (in verification: the layer) are chosen on it.
        test: Looked at once for each run.
        settings: The task.
        features: Keeps features for other tasks on the same tables; None forgets them.
        baselines: Add log-mel (`LOG_MEL`), and the first encoder's architecture with random weights (`RANDOM`).

    Returns:
        A result for each encoder in order, then the baselines.

    Raises:
        ValueError: A table does not serve the task, or a loss is not finite; names the file, or encoder and rate.
    """
    if not models:
        raise ValueError("models: there are none")
    first = next(iter(models.values()))
    device = next(first.parameters()).device
    sources: dict[str, Source] = {name: EncoderSource(model) for name, model in models.items()}
    if sources.keys() & {LOG_MEL, RANDOM}:
        raise ValueError(f"models: {LOG_MEL!r} and {RANDOM!r} are names of the baselines")
    for name in baselines:
        # Cosines, unlike heads, cannot leave dimensions aside.
        deltas = settings.resolved_task != "verification"
        sources[name] = LogMelSource(deltas=deltas) if name == LOG_MEL else RandomSource(first, seed=0)
    parts = {"train": train, "dev": dev, "test": test}
    targets = Targets(parts, settings)
    results = []
    for name, source in sources.items():
        # Without a store that is handed in, one encoder's features are in memory at a time.
        store = FeatureStore() if features is None else features
        result = _Probe(name, source, parts, targets, settings, store, device).result()
        logger.info("%s: %.2f %%", name, 100 * result.mean)
        results.append(result)
    return results


class Targets:
    """Labels of all rows as numbers, and which rows take part in which fold.

    Args:
        parts: Tables by name, with one named "train", whose labels the others must have too.
        settings: Say which label.

    Raises:
        ValueError: A table has no rows, or a label that the training part has not; names the file.
    """

    def __init__(self, parts: Mapping[str, Table], settings: ProbeSettings) -> None:
        task = settings.resolved_task
        columns = {part: table.column(settings.target) for part, table in parts.items()}
        for table in parts.values():
            if not table.rows:
                raise ValueError(f"{table.name}: has no rows")
        if task == "ctc":
            symbols = Symbols(columns["train"], separated=False if settings.target == "text" else None)
            self.outputs = len(symbols.names) + 1
        else:
            classes = sorted(set(columns["train"]))
            if task == "verification":
                classes = sorted(set().union(*columns.values()))
            self.outputs = len(classes)
        self.numbers: dict[str, list[tuple[int, ...]]] = {}
        for part, table in parts.items():
            self.numbers[part] = []
            for row, label in zip(table.rows, columns[part], strict=True):
                where = f"{table.name}: {row.path.name}"
                if task == "ctc":
                    self.numbers[part].append(tuple(symbols.encode(label, where=where)))
                elif label in classes:
                    self.numbers[part].append((classes.index(label),))
                else:
                    raise ValueError(f"{where} has {settings.target} {label!r}, which the training part has not")
        self.folds: list[tuple[str, ...]] = [()]
        if settings.folds is not None:
            self._values = {part: table.column(settings.folds) for part, table in parts.items()}
            self.folds = [tuple(group) for group in fold_values(self._values["train"], settings.fold_size)]

    def rows(self, part: str, fold: tuple[str, ...]) -> set[int]:
        """Rows of a part in a fold."""
        if not fold:
            return set(range(len(self.numbers[part])))
        return {row for row, value in enumerate(self._values[part]) if (value in fold) == (part == "test")}


class _Probe:
    """One encoder through all folds and seeds."""

    def __init__(
        self,
        name: str,
        source: Source,
        parts: Mapping[str, Table],
        targets: Targets,
        settings: ProbeSettings,
        store: FeatureStore,
        device: torch.device,
    ) -> None:
        self.name, self.source, self.parts, self.targets, self.settings = name, source, parts, targets, settings
        self.task, self.device = settings.resolved_task, device
        mean = self.task != "ctc"
        self.features = {
            part: store.get(source, table, name=name, segment_s=settings.segment_s, mean=mean)
            for part, table in parts.items()
        }
        self.window = Window(0, 1) if mean else Window.of_seconds(settings.context_s, self._frame_period_s("train"))

    def result(self) -> ProbeResult:
        runs = [run for fold in self.targets.folds for run in self._fold(fold)]
        problems = dict.fromkeys(str(problem) for part in self.features.values() for problem in part.problems)
        too_short = sum(part.too_short for part in self.features.values())
        period_ms = 1000 * self._frame_period_s("test")
        return ProbeResult(self.name, tuple(runs), tuple(problems), too_short, period_ms)

    def _frame_period_s(self, part: str) -> float:
        if self.source.frame_period_s is not None:
            return self.source.frame_period_s
        assert isinstance(self.source, EncoderSource)
        return self.features[part].mean_frame_period_s(self.source.encoder.config)

    def _fold(self, fold: tuple[str, ...]) -> list[ProbeRun]:
        examples = {part: self._examples(part, fold) for part in self.parts}
        train = examples["train"]
        standard = Standard.of(train.features, train.chosen, whiten=self.task == "ctc").to(self.device)
        if self.task == "verification":
            return [self._verify(examples, standard, fold)]
        return [self._train(examples, standard, fold, seed) for seed in range(self.settings.seeds)]

    def _examples(self, part: str, fold: tuple[str, ...]) -> Examples:
        features = self.features[part]
        rows = self.targets.rows(part, fold)
        chosen = tuple(example for example, row in enumerate(features.rows) if row in rows)
        if not chosen:
            without = f" with {self.settings.folds} {', '.join(fold)} {'alone' if part == 'test' else 'left out'}"
            raise ValueError(f"{self.parts[part].name}: nothing is left of it{without if fold else ''}")
        numbers = self.targets.numbers[part]
        return Examples(features, chosen, tuple(numbers[features.rows[example]] for example in chosen))

    def _train(
        self, examples: Mapping[str, Examples], standard: Standard, fold: tuple[str, ...], seed: int
    ) -> ProbeRun:
        settings = self.settings
        kind: Kind = "ctc" if self.task == "ctc" else "classification"
        learner = Learner(
            kind,
            self.targets.outputs,
            self.window,
            rates=settings.rates,
            standard=standard,
            name=self.name,
        )
        if kind == "classification":
            unknown = set(examples["test"].targets) - set(examples["train"].targets)
            if unknown:
                raise ValueError(
                    f"{self.settings.folds}: when {', '.join(fold)} is held out, {len(unknown)} of the "
                    f"{self.settings.target}s to be tested are not learned from; such folds are for verification"
                )
        usable = examples["train"].feasible(self.window) if kind == "ctc" else examples["train"]
        if not usable.chosen:
            raise ValueError(f"{self.parts['train'].name}: no target fits into the frames of {self.name}")
        learner.learn(usable, steps=settings.steps, batch_s=settings.batch_s, seed=seed)
        judged = learner.judge(examples["dev"], batch_s=settings.batch_s)
        best = min(range(len(judged)), key=lambda index: judged[index])
        head = learner.keep(best)
        (tested,) = learner.judge(examples["test"], batch_s=settings.batch_s)
        return ProbeRun(
            error=tested.error_rate,
            loss=tested.loss,
            parts={part: self._size(part, examples[part]) for part in examples},
            held_out=fold,
            seed=seed,
            dev_errors={f"{rate:g}": one.error_rate for rate, one in zip(settings.rates, judged, strict=True)},
            chosen=settings.rates[best],
            layer_weights=tuple(head.layer_weights.tolist()),
        )

    def _verify(self, examples: Mapping[str, Examples], standard: Standard, fold: tuple[str, ...]) -> ProbeRun:
        seen = {target for part in ("train", "dev") for target in examples[part].targets}
        if seen & set(examples["test"].targets):
            raise ValueError(
                f"{self.parts['test'].name}: some of its {self.settings.target}s are in the training or development "
                "part too, and verification is of unseen ones; hold some out with folds, two at a time"
            )
        dev_errors = [self._equal_errors(examples["dev"], standard, layer)[0] for layer in range(self.source.layers)]
        layer = min(range(self.source.layers), key=lambda index: dev_errors[index])
        error, trials = self._equal_errors(examples["test"], standard, layer)
        return ProbeRun(
            error=error,
            loss=None,
            parts={part: self._size(part, examples[part]) for part in examples},
            held_out=fold,
            seed=0,
            dev_errors={str(index): one for index, one in enumerate(dev_errors)},
            chosen=layer,
            trials=trials,
        )

    def _equal_errors(self, examples: Examples, standard: Standard, layer: int) -> tuple[float, tuple[int, int]]:
        """Equal error rate of a layer, and the number of pairs of either kind."""
        values, _ = examples.gather(standard, 0)
        rows = torch.tensor([examples.features.rows[example] for example in examples.chosen], device=self.device)
        classes = torch.tensor(examples.targets, device=self.device)[:, 0]
        same, different = pair_scores(values[layer], classes, rows)
        if not len(same) or not len(different):
            raise ValueError(
                f"{self.settings.target}: a part has {len(same)} pairs of the same and {len(different)} of different "
                "ones, between recordings; verification needs both (fold_size holds out several)"
            )
        return equal_error_rate(same, different), (len(same), len(different))

    def _size(self, part: str, examples: Examples) -> PartSize:
        features: Features = examples.features
        infeasible = len(examples.chosen) - len(examples.feasible(self.window).chosen) if self.task == "ctc" else 0
        return PartSize(
            recordings=len({features.rows[example] for example in examples.chosen}),
            examples=len(examples.chosen),
            hours=sum(features.seconds[example] for example in examples.chosen) / 3600,
            infeasible=infeasible,
        )
