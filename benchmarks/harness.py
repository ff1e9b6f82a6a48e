"""Compare implementations of the same work: check their outputs, then measure times, peak memory and limits.

A comparison runs in one process, and the contenders take turns. A benchmark is a module with `ROWS`, which maps a name
to a function that builds the contenders and calls `compare`, and `if __name__ == "__main__": main(ROWS, __doc__)`. The
shortest example is `benchmarks/ops/bench_integrate_and_fire.py`.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.limits import CopyLimit
from benchmarks.machine import seconds_of, undisturbed, wait_until_quiet, with_peak_memory

Outputs = Mapping[str, Tensor]
#: The call to time, and the call that returns the outputs for the gate.
Entry = tuple[Callable[[], Any], Callable[[], Outputs]]
# A cold start is negligible in a call of at least this many seconds, so even the first call counts.
_SLOW_S = 5.0
_MOST_ROUNDS = 40
_COPY = "copy"
_SHORT_S, _IN_A_ROW = 0.02, 5


class GateError(AssertionError):
    """A contender's outputs differ from the reference, so its time must not be reported."""


class Contender(NamedTuple):
    """One implementation of the work.

    Args:
        name: Name in the table; the names of our own contenders begin with "fastssl".
        run: The call to time; its result is dropped.
        check: Returns outputs and gradients for the gate; often `run` itself.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[], Outputs]

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastssl")


@dataclass
class Measurement:
    """Time, memory and accuracy of one contender."""

    seconds: float  # median over rounds
    lowest_s: float
    highest_s: float
    rounds: int
    peak_bytes: int  # peak memory of one call, less the memory in use before it
    worst_error: float  # largest deviation from the reference, relative to the reference's largest value


@dataclass
class Row:
    """One row of a benchmark: the same work done by every contender, and lower limits on its time."""

    title: str
    tolerance: float
    measurements: dict[str, Measurement]
    skipped: dict[str, str]  # contender -> reason why it was not measured
    limits: dict[str, float]  # name -> seconds; targets refer to the first one
    audio_s: float | None = None  # seconds of valid audio, if the work has audio
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> str:
        """Our contender that users get by default: the first whose name begins with "fastssl"."""
        return next(name for name in self.measurements if name.startswith("fastssl"))

    def fastest_rival(self, prefix: str = "") -> str | None:
        """Return the fastest contender that is not ours and whose name begins with `prefix`; None if none is left."""
        names = [n for n in self.measurements if not n.startswith("fastssl") and n.startswith(prefix)]
        return min(names, key=lambda name: self.measurements[name].seconds, default=None)


def backends(op: str, device: torch.device) -> list[str]:
    """Return the names of an op's backends on a device, the preferred one first."""
    from fastssl.kernels.dispatch import BACKENDS

    return list(BACKENDS[op][device.type])


class Contenders:
    """The contenders of a comparison, and the reasons why others were skipped."""

    def __init__(self) -> None:
        self.present: list[Contender] = []
        self.skipped: dict[str, str] = {}

    def add(self, name: str, run: Callable[[], Any], check: Callable[[], Outputs] | None = None) -> None:
        """Add a contender.

        Args:
            name: Name in the table.
            run: The call to time.
            check: Returns the outputs for the gate; None uses `run`.
        """
        self.present.append(Contender(name, run, check or run))

    def invite(self, name: str, make: Callable[[], Entry]) -> None:
        """Add a contender that may not be installed; if `make` fails, note the reason for the table instead."""
        try:
            self.add(name, *make())
        except (ImportError, NotImplementedError, OSError, RuntimeError) as error:
            self.skipped[name] = reason(error)


def reason(error: BaseException) -> str:
    """Return type and message of an error on one line, with at most 200 characters of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def compare(
    title: str,
    contenders: Contenders,
    *,
    reference: Callable[[], Outputs],
    tolerance: float,
    device: torch.device,
    limits: Callable[[], dict[str, float]] = dict,
    copy_limit: CopyLimit | None = None,
    audio_s: float | None = None,
    budget_s: float = 12.0,
    notes: Sequence[str] = (),
) -> Row:
    """Check the outputs of every contender, then time the contenders, which take turns.

    Args:
        title: Title of the row.
        contenders: Contenders to compare; the first whose name begins with "fastssl" is what users get by default.
        reference: Computes the outputs and gradients that every contender must match.
        tolerance: Largest deviation allowed in any element of a tensor, relative to the reference's largest value.
        device: Device that the work runs on.
        limits: Measures the limits and returns them in seconds by name; called after the contenders are timed.
        copy_limit: Limit set by memory bandwidth; its copy takes turns with the contenders.
        audio_s: Seconds of valid audio in the work.
        budget_s: Time for the timed rounds, in seconds; slow work may take longer, because at least one round is timed.
        notes: Lines to print below the row.

    Raises:
        GateError: A contender's outputs deviate from the reference, or no fastssl contender runs.
        BusyMachineError: Other processes keep the machine busy.
    """
    skipped = dict(contenders.skipped)
    running, errors = gate(contenders.present, reference(), tolerance, skipped)
    wait_until_quiet()
    if copy_limit is not None:
        running.append(Contender(_COPY, copy_limit.run, dict))
    seconds, peaks = _measure(running, device, budget_s, skipped)
    found = limits()
    if copy_limit is not None:
        found |= [copy_limit.named_seconds(statistics.median(seconds.pop(_COPY)))]
    measurements = {
        name: Measurement(statistics.median(s), min(s), max(s), len(s), peaks[name], errors[name])
        for name, s in seconds.items()
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Row(title, tolerance, measurements, skipped, found, audio_s, list(notes))


def gate(
    contenders: Sequence[Contender], reference: Outputs, tolerance: float, skipped: dict[str, str]
) -> tuple[list[Contender], dict[str, float]]:
    """Compare the outputs of every contender with the reference.

    A rival that fails is noted in `skipped`, as is a fastssl backend that rejects the case with a ValueError.

    Returns:
        The contenders that run, and the worst error of each.

    Raises:
        GateError: A contender's outputs deviate from the reference, or no fastssl contender runs.
    """
    errors: dict[str, float] = {}
    running = []
    for contender in contenders:
        try:
            outputs = contender.check()
        except GateError:
            raise
        except Exception as error:  # any failure of a rival is a result to report
            if contender.ours and not isinstance(error, ValueError):
                raise
            skipped[contender.name] = reason(error)
            continue
        errors[contender.name] = worst_error(contender.name, outputs, reference, tolerance)
        running.append(contender)
    if not any(contender.ours for contender in running):
        raise GateError(f"no fastssl contender could run, so nothing can be compared; reasons by contender: {skipped}")
    return running, errors


def worst_error(name: str, outputs: Outputs, reference: Outputs, tolerance: float) -> float:
    """Return the largest deviation of any tensor from its reference, relative to the reference's largest value.

    Raises:
        GateError: A tensor is missing, has another shape, or deviates by more than `tolerance`.
    """
    if not reference or outputs.keys() != reference.keys():
        different = sorted(outputs.keys() ^ reference.keys())
        raise GateError(f"{name}: must return the same outputs as the reference; only one of them has {different[:4]}")
    worst = 0.0
    for what, expected in reference.items():
        found = outputs[what].detach()
        if found.shape != expected.shape:
            raise GateError(f"{name}: {what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        expected = expected.detach().to(torch.float64)
        scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        error = float((found.to(expected.device, torch.float64) - expected).abs().max() / scale)
        if not error <= tolerance:  # also true for NaN
            raise GateError(f"{name}: {what} is off by {error:.2g} of its largest value; allowed: {tolerance:g}")
        worst = max(worst, error)
    return worst


def _measure(
    contenders: Sequence[Contender], device: torch.device, budget_s: float, skipped: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Measure each contender's time (s) in every round, and its peak memory (bytes).

    A rival that runs out of memory is noted in `skipped`.
    """
    runs: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for name, run, _ in contenders:
        try:
            call_s, peaks[name] = undisturbed(partial(with_peak_memory, run, device))
            if call_s < _SLOW_S:
                call_s, peaks[name] = undisturbed(partial(with_peak_memory, run, device))
        except torch.OutOfMemoryError as error:
            if name.startswith("fastssl"):
                raise
            skipped[name] = reason(error)
            continue
        runs[name], seconds[name] = run, [call_s]
    round_s = sum(values[0] for values in seconds.values())
    if round_s < _SLOW_S:
        rounds = int(min(_MOST_ROUNDS, max(3, budget_s / round_s)))
        seconds = {name: [] for name in runs}  # drop the first calls: they began with an empty heap
    else:
        rounds = max(1 if round_s > 10 else 2, int(budget_s / round_s))
    for times in _rounds(runs, device, rounds):
        for name, value in times.items():
            seconds[name].append(value)
    return seconds, peaks


def _rounds(runs: Mapping[str, Callable[[], Any]], device: torch.device, wanted: int) -> list[dict[str, float]]:
    """Time every contender once per round, in a different order each round."""
    kept: list[dict[str, float]] = []
    while len(kept) < wanted:
        kept += undisturbed(partial(_block, runs, device, first=len(kept), wanted=wanted))
    return kept


def _block(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, *, first: int, wanted: int
) -> list[dict[str, float]]:
    """Time rounds for about a second: long enough to detect other processes' use of the CPU."""
    names = list(runs)
    block: list[dict[str, float]] = []
    began_s = time.perf_counter()
    while first + len(block) < wanted and time.perf_counter() - began_s < 1.0:
        turn = (first + len(block)) % len(names)
        block.append({name: _settled_seconds(runs[name], device) for name in names[turn:] + names[:turn]})
    return block


def _settled_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call in seconds; for a short call, the median of five in a row.

    The first call after another contender finds the caches cold, even for Python's own data. That costs about half a
    millisecond whatever the work is; a training loop, which repeats the same ops, does not pay it.
    """
    first_s = seconds_of(call, device)
    if first_s > _SHORT_S:
        return first_s
    return statistics.median([first_s, *(seconds_of(call, device) for _ in range(_IN_A_ROW - 1))])
