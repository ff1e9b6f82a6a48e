"""What `validate` found: a table of how far an accelerated model is from the original, and the error with it."""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Comparison(NamedTuple):
    """One state, or the gradients of one layer. All numbers are relative to its norm, the largest absolute value.

    Attributes:
        name: What is compared, such as "output of encoder.layers.3" or "gradients of encoder.layers.3". In a model
            with several encoders, the encoder's name is in front.
        difference: Largest difference from the original, each utterance alone.
        in_a_batch: The same of all utterances in one padded batch, from the original's of each utterance alone; None
            if no batch was compared.
        rounding: The original's own rounding error: its largest difference from its result in a wider dtype.
        allowed: Largest difference that is allowed.
        worst: Of gradients, the parameter that is nearest to what is allowed, or furthest beyond it; "" of a state.
    """

    name: str
    difference: float
    in_a_batch: float | None
    rounding: float
    allowed: float
    worst: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the differences are finite and within what is allowed."""
        return all(math.isfinite(one) and one <= self.allowed for one in (self.difference, self.in_a_batch or 0.0))


@dataclass(frozen=True)
class ValidationReport:
    """How an accelerated model compares with the original; `str(report)` is a table.

    Attributes:
        device: Device that both ran on.
        dtype: Dtype that they computed in: that of autocast if it was active, otherwise of the parameters.
        exact_dtype: Wider dtype, in which the original ran once more to measure its rounding.
        seconds: Lengths of the utterances.
        notes: What was compared and what was left out, one sentence each.
        comparisons: States in the order in which they are computed, then gradients from the last layer to the first.
    """

    device: str
    dtype: str
    exact_dtype: str
    seconds: tuple[float, ...]
    notes: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def wrong(self) -> tuple[Comparison, ...]:
        """The comparisons outside their band; the first is where the error begins."""
        return tuple(one for one in self.comparisons if not one.is_right)

    def __str__(self) -> str:
        """Return the table, below lines that say what was compared."""
        width = max(len(one.name) for one in self.comparisons) + 2
        lengths = ", ".join(f"{length:g}" for length in self.seconds)
        lines = [
            f"on {self.device} in {self.dtype}, utterances of {lengths} s; rounding: the original in {self.dtype} "
            f"against {self.exact_dtype}",
            *self.notes,
            "",
            f"{'':{width}}{'alone':>10}{'in a batch':>12}{'rounding':>10}{'allowed':>10}  verdict",
        ]
        for one in self.comparisons:
            batch = "-" if one.in_a_batch is None else f"{one.in_a_batch:.1e}"
            verdict = "agrees" if one.is_right else "DIFFERS"
            where = f" ({one.worst})" if one.worst and not one.is_right else ""
            numbers = f"{one.difference:>10.1e}{batch:>12}{one.rounding:>10.1e}{one.allowed:>10.1e}"
            lines.append(f"{one.name:{width}}{numbers}  {verdict}{where}")
        return "\n".join(lines)


class ValidationError(RuntimeError):
    """Raised by `validate` if an accelerated model leaves the band around the original.

    Attributes:
        report: All comparisons.
    """

    def __init__(self, report: ValidationReport) -> None:
        first, *others = report.wrong
        # A NaN compares as no larger, so it is looked for first.
        found = max((first.difference, first.in_a_batch or 0.0), key=lambda one: (math.isnan(one), one))
        where = f" ({first.worst})" if first.worst else ""
        cure = (
            "`fastssl check` finds the kernel, FASTSSL_EXCLUDE leaves it out, `fastssl.restore(model)` runs the "
            "original"
            if math.isfinite(first.allowed)
            else "The original itself is not finite there, so nothing can be compared: look for NaN or infinite "
            "weights, or for values too large for the dtype"
        )
        super().__init__(
            f"the accelerated model differs from the original first in the {first.name}{where}: by {found:.2g} of its "
            f"norm, {first.allowed:.2g} is allowed; {len(others)} later comparisons differ too. {cure}\n{report}"
        )
        self.report = report

    def __reduce__(self) -> tuple[type["ValidationError"], tuple[ValidationReport]]:
        """Pickle the report, from which the message follows."""
        return ValidationError, (self.report,)
