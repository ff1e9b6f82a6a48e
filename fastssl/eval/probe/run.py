"""`fastssl probe`: measure how much a linear head can read from the frozen layers of an encoder.

This is a small version of SUPERB's protocol (arXiv:2105.01051): the encoder is frozen, its layers are summed with
learned weights, and a linear head is trained on the sum. It differs from SUPERB in these points:

- the tasks are small, and the user supplies their tables;
- every layer is standardised on the training part, so that a layer's weight does not depend on its scale; for CTC,
  directions of large variance are scaled down too (ZCA with shrinkage), so that a head needs far fewer steps;
- CTC uses a linear head on a window of 0.1 s on either side of a frame, whereas SUPERB uses two LSTM layers;
- verification trains nothing: it scores mean-pooled features of the layer that is best on the development part, whereas
  SUPERB trains x-vectors;
- the learning rate is one of three, chosen on the development part for each encoder;
- the table always includes log-mel features and an untrained encoder.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from fastssl.eval.probe.settings import ProbeSettings
from fastssl.eval.probe.tables import Symbols, Table, fold_values
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.names import shown

logger = logging.getLogger(__name__)

LOG_MEL, RANDOM = "log-mel", "random initialisation"


@dataclass(frozen=True)
class PartSize:
    """Size of the training, development or test part in one run.

    Args:
        recordings: Number of different recordings.
        examples: Number of examples: recordings, or segments of them.
        hours: Total duration of the examples, in hours.
        infeasible: Number of examples whose CTC target needs more outputs than there are. Training skips them; errors
            include them.
    """

    recordings: int
    examples: int
    hours: float
    infeasible: int = 0


@dataclass(frozen=True)
class ProbeRun:
    """Results of one encoder on one fold with one seed.

    Args:
        error: Error on the test part, as a share: of examples classified wrongly, of edits per symbol (may exceed 1),
            or the equal error rate.
        loss: Loss on the test part in nats per label, with 0 for infeasible targets; None in verification.
        parts: Sizes of the parts "train", "dev" and "test".
        held_out: Values of the fold column that were held out; empty without folds.
        seed: Seed of the order of training examples.
        dev_errors: Error on the development part for each learning rate, or in verification for each layer.
        chosen: The learning rate, or in verification the layer, with the lowest of these errors.
        layer_weights: Weights of the L layers in the weighted sum; empty in verification.
        trials: Numbers of pairs of the same class and of different classes in the test part; None without verification.
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
    """Results of one encoder over all folds and seeds.

    `mean` and `std` are mean and sample standard deviation of the runs' errors; `std` is None for a single run.

    Args:
        encoder: Name of the encoder.
        runs: One run for each fold and seed.
        problems: Recordings that could not be used, as "NAME REASON".
        too_short: Number of recordings shorter than one segment.
        frame_period_ms: Mean frame period over the test part, in milliseconds.
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
    """Probe encoders, and compare them with log-mel features and a randomly initialised encoder.

    Args:
        models: Encoders by name, on the device to work on; their weights are not changed.
        train: Table of the training part; heads are trained and features standardised on it.
        dev: Table of the development part, used to choose the learning rate (in verification, the layer).
        test: Table of the test part; each run evaluates it once, with the chosen head.
        settings: Task and hyperparameters.
        features: Store that keeps features for other tasks on the same tables; with None, they are not kept.
        baselines: Baselines to add: log-mel features (`LOG_MEL`), and the first encoder's architecture with random
            weights (`RANDOM`).

    Returns:
        A result for each encoder in the given order, then for each baseline.

    Raises:
        ValueError: There is no encoder, an encoder has the name of a baseline, a table does not fit the task, or a loss
            is not finite. The message names the table, or the encoder and the learning rate.
    """
    if not models:
        raise ValueError("models: must contain at least one encoder, got none")
    first = next(iter(models.values()))
    device = next(first.parameters()).device
    sources: dict[str, Source] = {name: EncoderSource(model) for name, model in models.items()}
    if sources.keys() & {LOG_MEL, RANDOM}:
        raise ValueError(f"models: {LOG_MEL!r} and {RANDOM!r} are names of baselines; give the encoder another name")
    for name in baselines:
        # Verification uses no deltas: cosines, unlike heads, cannot ignore dimensions.
        deltas = settings.resolved_task != "verification"
        sources[name] = LogMelSource(deltas=deltas) if name == LOG_MEL else RandomSource(first, seed=0)
    parts = {"train": train, "dev": dev, "test": test}
    targets = Targets(parts, settings)
    results = []
    for name, source in sources.items():
        # If the caller gave no store, keep the features of only one encoder in memory at a time.
        store = FeatureStore() if features is None else features
        result = _Probe(name, source, parts, targets, settings, store, device).result()
        logger.info("%s: %.2f %%", name, 100 * result.mean)
        results.append(result)
    return results


class Targets:
    """Labels of all rows as numbers, and the rows of each fold.

    Args:
        parts: Tables by the name of the part; one is named "train". Every label of the others must occur in it, except
            in verification.
        settings: Settings with the target column, the task and the folds.

    Raises:
        ValueError: A table has no rows or lacks a column, or a label does not occur in the training part. The message
            names the table.
    """

    def __init__(self, parts: Mapping[str, Table], settings: ProbeSettings) -> None:
        task = settings.resolved_task
        columns = {part: table.column(settings.target) for part, table in parts.items()}
        for table in parts.values():
            if not table.rows:
                raise ValueError(f"{table.name}: has no rows; every part needs some")
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
                where = f"{table.name}: {shown(row.path.name)}"
                if task == "ctc":
                    self.numbers[part].append(tuple(symbols.encode(label, where=where)))
                elif label in classes:
                    self.numbers[part].append((classes.index(label),))
                else:
                    raise ValueError(
                        f"{where} has {settings.target} {label!r}, which does not occur in the training part"
                    )
        self.folds: list[tuple[str, ...]] = [()]
        if settings.folds is not None:
            self._values = {part: table.column(settings.folds) for part, table in parts.items()}
            self.folds = [tuple(group) for group in fold_values(self._values["train"], settings.fold_size)]

    def rows(self, part: str, fold: tuple[str, ...]) -> set[int]:
        """Return the numbers of a part's rows that are used in a fold.

        Args:
            part: Name of the part.
            fold: Values held out: the part "test" uses only rows with these values, all others only rows without. Empty
                for all rows.
        """
        if not fold:
            return set(range(len(self.numbers[part])))
        return {row for row, value in enumerate(self._values[part]) if (value in fold) == (part == "test")}


class _Probe:
    """Runs one encoder through all folds and seeds."""

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
        return [self._train(examples, standard, fold, seed) for seed in range(self.settings.resolved_seeds)]

    def _examples(self, part: str, fold: tuple[str, ...]) -> Examples:
        features = self.features[part]
        rows = self.targets.rows(part, fold)
        chosen = tuple(example for example, row in enumerate(features.rows) if row in rows)
        if not chosen:
            without = f" {'with' if part == 'test' else 'without'} {self.settings.folds} {', '.join(fold)}"
            raise ValueError(f"{self.parts[part].name}: has no usable examples{without if fold else ''}")
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
                    f"{self.settings.folds}: with {', '.join(fold)} held out, {len(unknown)} values of "
                    f"{self.settings.target} in the test part do not occur in the training part; choose another column "
                    "for folds, or use verification"
                )
        usable = examples["train"].feasible(self.window) if kind == "ctc" else examples["train"]
        if not usable.chosen:
            raise ValueError(f"{self.parts['train'].name}: every target needs more outputs than {self.name} has frames")
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
                "part too, but verification needs unseen ones; hold them out with folds and a fold_size of at least 2"
            )
        dev_errors = [self._equal_errors(examples, "dev", standard, layer)[0] for layer in range(self.source.layers)]
        layer = min(range(self.source.layers), key=lambda index: dev_errors[index])
        error, trials = self._equal_errors(examples, "test", standard, layer)
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

    def _equal_errors(
        self, parts: Mapping[str, Examples], part: str, standard: Standard, layer: int
    ) -> tuple[float, tuple[int, int]]:
        """Return a layer's equal error rate on a part, and the numbers of same-class and different-class pairs."""
        examples = parts[part]
        values, _ = examples.gather(standard, 0)
        rows = torch.tensor([examples.features.rows[example] for example in examples.chosen], device=self.device)
        classes = torch.tensor(examples.targets, device=self.device)[:, 0]
        same, different = pair_scores(values[layer], classes, rows)
        if not len(same) or not len(different):
            raise ValueError(
                f"{self.parts[part].name}: verification needs pairs of recordings with the same {self.settings.target} "
                f"and pairs with different ones, got {len(same)} pairs with the same and {len(different)} with "
                "different ones; raise fold_size or add recordings"
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
