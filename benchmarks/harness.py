"""One comparison: gate, then interleaved times and peak memory, then the limits, in one process and one run.

A benchmark is a module with `ROWS`, a function for each of its rows that builds the contenders and calls `compare`, and
`if __name__ == "__main__": main(ROWS)`. `benchmarks/ops/bench_integrate_and_fire.py` is the shortest one.
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
#: What is timed, and what gives the outputs for the gate.
Entry = tuple[Callable[[], Any], Callable[[], Outputs]]
# A call of this many seconds shows nothing of a cold start, so that the first one counts.
_SLOW_S = 5.0
_MOST_ROUNDS = 40
_COPY = "copy"
_SHORT_S, _IN_A_ROW = 0.02, 5


class GateError(AssertionError):
    """A contender does not compute what the reference computes, so its time is not reported."""


class Contender(NamedTuple):
    """One implementation of the work.

    Args:
        name: As printed; ours begin with "fastssl".
        run: What is timed. Its result is dropped.
        check: Outputs and gradients for the gate; often `run` itself.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[], Outputs]

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastssl")


@dataclass
class Measurement:
    """Of one contender."""

    seconds: float  # median over rounds
    lowest_s: float
    highest_s: float
    rounds: int
    peak_bytes: int  # of one call, beyond what was held before it
    worst_error: float  # of the gate: largest deviation from the reference over the reference's largest value


@dataclass
class Row:
    """One line of the table: the same work by every contender, and its limits."""

    title: str
    tolerance: float
    measurements: dict[str, Measurement]
    skipped: dict[str, str]  # contender -> why it is not there
    limits: dict[str, float]  # name -> seconds; the first one is the ruler
    audio_s: float | None = None  # valid audio, where the work has audio
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> str:
        """The contender that users get, which is the first of ours."""
        return next(name for name in self.measurements if name.startswith("fastssl"))

    def fastest_rival(self, prefix: str = "") -> str | None:
        """Of those whose name begins with `prefix`."""
        names = [n for n in self.measurements if not n.startswith("fastssl") and n.startswith(prefix)]
        return min(names, key=lambda name: self.measurements[name].seconds, default=None)


def backends(op: str, device: torch.device) -> list[str]:
    """Backends of an op on a device, the preferred one first."""
    from fastssl.kernels.dispatch import BACKENDS

    return list(BACKENDS[op][device.type])


class Contenders:
    """Who takes part in a comparison, and why some do not."""

    def __init__(self) -> None:
        self.present: list[Contender] = []
        self.skipped: dict[str, str] = {}

    def add(self, name: str, run: Callable[[], Any], check: Callable[[], Outputs] | None = None) -> None:
        """A contender; `run` gives the outputs for the gate too where there is no `check`."""
        self.present.append(Contender(name, run, check or run))

    def invite(self, name: str, make: Callable[[], Entry]) -> None:
        """A contender that may not be installed: the reason then goes to the table."""
        try:
            self.add(name, *make())
        except (ImportError, NotImplementedError, OSError, RuntimeError) as error:
            self.skipped[name] = reason(error)


def reason(error: BaseException) -> str:
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
    """Check every contender, then time them in turns.

    Args:
        title: Of the row.
        contenders: Who takes part; the first of ours is the one that users get.
        reference: Outputs and gradients that every contender must give.
        tolerance: Allowed deviation of each tensor in max norm, as a share of the reference's largest value.
        device: Where the work runs.
        limits: Measures the limits, after the contenders.
        copy_limit: Takes its turn among the contenders.
        audio_s: Valid audio in the work.
        budget_s: For the timed rounds, of which there are at least two.
        notes: What a reader has to know.

    Raises:
        GateError: A contender is wrong.
        BusyMachineError: The machine is in use.
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
    """Compare the outputs of every contender with the reference; returns those that run, and their worst error.

    A rival that cannot run at all is noted in `skipped`, and so is a backend of ours that does not serve the case.
    """
    errors: dict[str, float] = {}
    running = []
    for contender in contenders:
        try:
            outputs = contender.check()
        except GateError:
            raise
        except Exception as error:  # whatever a rival dies of is a finding
            if contender.ours and not isinstance(error, ValueError):
                raise
            skipped[contender.name] = reason(error)
            continue
        errors[contender.name] = worst_error(contender.name, outputs, reference, tolerance)
        running.append(contender)
    if not any(contender.ours for contender in running):
        raise GateError(f"none of ours runs: {skipped}")
    return running, errors


def worst_error(name: str, outputs: Outputs, reference: Outputs, tolerance: float) -> float:
    """The largest deviation of any tensor over its largest value.

    Raises:
        GateError: A tensor is missing, has another shape, or deviates by more than `tolerance`.
    """
    if not reference or outputs.keys() != reference.keys():
        different = sorted(outputs.keys() ^ reference.keys())
        raise GateError(f"{name}: it and the reference do not give the same outputs: {different[:4]}")
    worst = 0.0
    for what, expected in reference.items():
        found = outputs[what].detach()
        if found.shape != expected.shape:
            raise GateError(f"{name}: {what} is {tuple(found.shape)}, expected {tuple(expected.shape)}")
        expected = expected.detach().to(torch.float64)
        scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        error = float((found.to(expected.device, torch.float64) - expected).abs().max() / scale)
        if not error <= tolerance:  # NaN too
            raise GateError(f"{name}: {what} is off by {error:.2g} of its largest value, allowed {tolerance:g}")
        worst = max(worst, error)
    return worst


def _measure(
    contenders: Sequence[Contender], device: torch.device, budget_s: float, skipped: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round, and peak bytes, of each contender; a rival that runs out of memory is noted."""
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
        seconds = {name: [] for name in runs}  # those calls found an empty heap
    else:
        rounds = max(1 if round_s > 10 else 2, int(budget_s / round_s))
    for times in _rounds(runs, device, rounds):
        for name, value in times.items():
            seconds[name].append(value)
    return seconds, peaks


def _rounds(runs: Mapping[str, Callable[[], Any]], device: torch.device, wanted: int) -> list[dict[str, float]]:
    """Every contender once per round, each time in another order."""
    kept: list[dict[str, float]] = []
    while len(kept) < wanted:
        kept += undisturbed(partial(_block, runs, device, first=len(kept), wanted=wanted))
    return kept


def _block(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, *, first: int, wanted: int
) -> list[dict[str, float]]:
    """Rounds for about a second: long enough to tell what others did meanwhile."""
    names = list(runs)
    block: list[dict[str, float]] = []
    began_s = time.perf_counter()
    while first + len(block) < wanted and time.perf_counter() - began_s < 1.0:
        turn = (first + len(block)) % len(names)
        block.append({name: _settled_seconds(runs[name], device) for name in names[turn:] + names[:turn]})
    return block


def _settled_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call; the median of several in a row where it is short.

    The first call after another contender finds caches swept, Python's own data included. That costs half a
    millisecond whatever the work is, and a training loop, which calls the same ops over and over, does not pay it.
    """
    first_s = seconds_of(call, device)
    if first_s > _SHORT_S:
        return first_s
    return statistics.median([first_s, *(seconds_of(call, device) for _ in range(_IN_A_ROW - 1))])
