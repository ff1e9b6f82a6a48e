"""Task and hyperparameters of a probe."""

from dataclasses import dataclass
from typing import Literal

Task = Literal["classification", "ctc", "verification"]

#: Target columns whose default task is ctc; the default of all other columns is classification.
CTC_TARGETS = ("digits", "phones", "phonemes", "text")
#: Default learning rates. CTC heads see a window of many frames and need smaller steps than classification heads, which
#: see a mean. Verification trains nothing.
LEARNING_RATES: dict[Task, tuple[float, ...]] = {
    "ctc": (4e-3, 8e-3, 16e-3),
    "classification": (3e-3, 1e-2, 3e-2),
    "verification": (),
}


@dataclass(frozen=True)
class ProbeSettings:
    """Task and hyperparameters of a probe.

    Args:
        target: Column that contains the labels; phones are derived from digits if the table has no such column.
        task: classification (one class per example), ctc (a string per recording; symbol error rate of the likeliest
            path) or verification (equal error rate over pairs of recordings). By default ctc for digits, phones,
            phonemes and text, classification for all others. For ctc, labels are split into symbols at spaces if any
            label contains a space, and into characters otherwise; text is always split into characters.
        segment_s: Length of an example, in seconds: recordings are cut into such segments, each is encoded alone, and a
            shorter remainder is dropped. By default each recording is one example, which ctc requires.
        folds: Column for cross-validation: its values are held out in turn. The training and development parts lose the
            rows with these values, and the test part keeps only those rows. By default the parts stay as they are.
        fold_size: Number of values held out together; verification needs at least two.
        seeds: Number of runs, each with a different order of the examples; by default 3, or 1 for each fold.
            Verification trains nothing and always runs once.
        learning_rates: Learning rates of the head to try; each encoder and run uses the one with the lowest error on
            the development part. By default 0.004, 0.008 and 0.016 for ctc, 0.003, 0.01 and 0.03 for classification.
        steps: Number of training steps of each head; the head that learns a compressor's rate takes three times as
            many.
        batch_s: Audio per batch, in seconds.
        context_s: Audio that the head sees on either side of a frame, in seconds; used by ctc only.

    Raises:
        ValueError: A value is out of range.
    """

    target: str
    task: str | None = None  # a Task
    segment_s: float | None = None
    folds: str | None = None
    fold_size: int = 1
    seeds: int | None = None
    learning_rates: tuple[float, ...] | None = None
    steps: int = 500
    batch_s: float = 50.0
    context_s: float = 0.1

    def __post_init__(self) -> None:
        if self.task not in (None, *LEARNING_RATES):
            raise ValueError(f"task: must be classification, ctc or verification, got {self.task!r}")
        if self.resolved_task == "ctc" and self.segment_s is not None:
            raise ValueError("segment_s: ctc needs whole recordings, because labels are not aligned; leave it out")
        if self.segment_s is not None and not self.segment_s >= 0.1:
            raise ValueError(f"segment_s: must be at least 0.1 seconds, got {self.segment_s}")
        if self.learning_rates == () or any(not rate > 0 for rate in self.rates):
            raise ValueError(f"learning_rates: must be positive, got {self.learning_rates}")
        for name, value in {"fold_size": self.fold_size, "seeds": self.resolved_seeds, "steps": self.steps}.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if not self.batch_s > 0 or not self.context_s >= 0:
            raise ValueError(
                "batch_s must be positive and context_s must not be negative, "
                f"got batch_s: {self.batch_s} and context_s: {self.context_s}"
            )

    @property
    def resolved_task(self) -> Task:
        """`task`, or the default task of `target` if it is None."""
        for task in LEARNING_RATES:
            if task == self.task:
                return task
        return "ctc" if self.target in CTC_TARGETS else "classification"

    @property
    def resolved_seeds(self) -> int:
        """`seeds`; if it is None, 3 without folds and 1 with folds."""
        if self.seeds is not None:
            return self.seeds
        return 3 if self.folds is None else 1

    @property
    def rates(self) -> tuple[float, ...]:
        """`learning_rates`, or the `LEARNING_RATES` of the task if it is None; empty for verification."""
        return LEARNING_RATES[self.resolved_task] if self.learning_rates is None else self.learning_rates
