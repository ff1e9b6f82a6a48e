"""Test the harness: it does not time contenders with wrong results, and it measures the right calls."""

import ctypes
import os
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness, machine, rivals
from benchmarks.harness import Contenders, GateError, Row, compare
from benchmarks.limits import CopyLimit
from benchmarks.machine import (
    BusyMachineError,
    ForeignLoad,
    keep_freed_memory,
    undisturbed,
    wait_until_quiet,
    with_peak_memory,
)

CPU = torch.device("cpu")
RIGHT = {"out": torch.arange(4.0), "grad": torch.ones(2)}


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the machine is quiet, because other processes may run beside these tests."""
    monkeypatch.setattr(ForeignLoad, "too_much", lambda self: False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def compared(
    ours: Callable[[], dict[str, Tensor]] = lambda: RIGHT,
    rival: Callable[[], dict[str, Tensor]] = lambda: RIGHT,
    timed: Callable[[], object] = lambda: None,
) -> Row:
    contenders = Contenders()
    contenders.add("fastssl", timed, ours)
    contenders.add("rival", timed, rival)
    return compare(
        "work", contenders, reference=lambda: RIGHT, tolerance=1e-3, device=CPU, limits=lambda: {"GEMMs": 1e-9}
    )


def test_right_results_are_timed() -> None:
    row = compared()
    assert row.ours == "fastssl"
    assert row.fastest_rival() == "rival"
    for measurement in row.measurements.values():
        assert measurement.rounds >= 3
        assert 0 < measurement.lowest_s <= measurement.seconds <= measurement.highest_s
        assert measurement.worst_error == 0
    assert row.limits == {"GEMMs": 1e-9}


@pytest.mark.parametrize(
    "wrong",
    [
        {"out": RIGHT["out"] + 0.01, "grad": RIGHT["grad"]},
        {"out": RIGHT["out"], "grad": torch.tensor([1.0, torch.nan])},
        {"out": RIGHT["out"][:3], "grad": RIGHT["grad"]},
        {"out": RIGHT["out"]},
        {},
    ],
    ids=["value", "nan", "shape", "missing", "nothing"],
)
@pytest.mark.parametrize("who", ["ours", "rival"])
def test_wrong_results_are_not_timed(wrong: dict[str, Tensor], who: str) -> None:
    calls: list[int] = []
    with pytest.raises(GateError):
        compared(**{who: lambda: wrong, "timed": lambda: calls.append(1)})  # type: ignore[arg-type]
    assert not calls


def test_a_small_deviation_passes_and_is_reported() -> None:
    row = compared(rival=lambda: {"out": RIGHT["out"] + 3e-4, "grad": RIGHT["grad"]})
    assert row.measurements["rival"].worst_error == pytest.approx(1e-4, rel=0.01)


def test_a_rival_that_cannot_run_is_noted_and_ours_must_run() -> None:
    def fail() -> dict[str, Tensor]:
        raise RuntimeError("no kernel")

    row = compared(rival=fail)
    assert row.skipped == {"rival": "RuntimeError: no kernel"}
    assert row.fastest_rival() is None
    with pytest.raises(RuntimeError, match="no kernel"):
        compared(ours=fail)


def test_a_backend_that_does_not_serve_the_case_is_noted_and_one_must() -> None:
    def fail() -> dict[str, Tensor]:
        raise ValueError("backend='torch': not available")

    contenders = Contenders()
    contenders.add("fastssl, torch", fail)
    contenders.add("fastssl, reference", lambda: RIGHT)
    row = compare("work", contenders, reference=lambda: RIGHT, tolerance=0, device=CPU)
    assert row.ours == "fastssl, reference"
    assert "fastssl, torch" in row.skipped
    with pytest.raises(GateError, match="no fastssl contender could run"):
        compared(ours=fail)


def test_what_is_not_installed_is_noted() -> None:
    def make() -> harness.Entry:
        raise ImportError("no such library")

    contenders = Contenders()
    contenders.invite("rival", make)
    assert contenders.skipped == {"rival": "ImportError: no such library"}


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = Contenders()
    for name in ("fastssl", "a", "b"):
        contenders.add(name, lambda name=name: order.append(name), lambda: RIGHT)  # type: ignore[misc]
    row = compare("work", contenders, reference=lambda: RIGHT, tolerance=0, device=CPU)
    calls = order[6:]  # the first six: each contender is called once to warm up and once to measure memory
    assert all(calls[i : i + 5] == calls[i : i + 1] * 5 for i in range(0, len(calls), 5))  # five short calls in a row
    turns = calls[::5]
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == row.measurements["fastssl"].rounds
    assert all(sorted(turn) == ["a", "b", "fastssl"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "fastssl"}


def test_the_limit_of_a_copy_takes_its_turn() -> None:
    copies: list[None] = []
    contenders = Contenders()
    contenders.add("fastssl", lambda: None, lambda: RIGHT)
    limit = CopyLimit(lambda: copies.append(None), moved_bytes=8, footprint_bytes=8)
    row = compare("work", contenders, reference=lambda: RIGHT, tolerance=0, device=CPU, copy_limit=limit)
    assert len(copies) == 2 + 5 * row.measurements["fastssl"].rounds
    assert list(row.measurements) == ["fastssl"]
    assert len(row.limits) == 1


def test_peak_memory_is_that_of_the_call() -> None:
    size = 64 << 20
    held = torch.ones(size // 4)
    del held  # memory freed earlier must not hide what the call allocates
    pieces = [torch.ones(1 << 18) for _ in range(64)]
    del pieces

    def call() -> None:
        for _ in range(3):
            torch.ones(size // 4).sum()

    _, peak = with_peak_memory(call, CPU)
    # Linux updates its memory counters in batches: 32 pages per processor and kind of page.
    granularity = 2 * 32 * 4096 * (os.cpu_count() or 1)
    assert size - granularity <= peak < 1.3 * size
    assert with_peak_memory(lambda: None, CPU)[1] < size / 10


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForeignLoad, "too_much", lambda self: True)
    with pytest.raises(BusyMachineError, match="other processes"):
        wait_until_quiet(patience_s=0)
    monkeypatch.setattr(machine, "wait_until_quiet", lambda: None)
    attempts: list[int] = []
    with pytest.raises(BusyMachineError):
        undisturbed(lambda: attempts.append(1), attempts=3)
    assert len(attempts) == 3


def test_load_is_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    taken_s = iter([10.0, 10.0, 10.9])
    monkeypatch.setattr(machine, "_others_cpu_s", lambda: next(taken_s))
    load = ForeignLoad()
    assert not load.too_much()
    monkeypatch.setattr(os, "cpu_count", torch.get_num_threads)  # no core is idle
    assert load.too_much()


def test_proc_stat_counts_at_least_ourselves() -> None:
    sum(range(3_000_000))
    # /proc/stat counts this process too, so only rounding can make the difference negative.
    assert machine._others_cpu_s() > -1


@pytest.mark.parametrize("accepts", [True, False])
def test_freed_memory_is_kept_or_the_user_is_told(monkeypatch: pytest.MonkeyPatch, accepts: bool) -> None:
    settings: dict[int, int] = {}

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            settings[parameter] = value
            return int(accepts)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    if accepts:
        keep_freed_memory()
        assert settings == {-1: 2**31 - 1, -3: 2**31 - 1}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    else:
        with pytest.raises(RuntimeError, match="glibc"):
            keep_freed_memory()


def test_the_compiled_rival_is_named_where_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (lambda: None, lambda: RIGHT)
    left_out, quick, asked_for = Contenders(), Contenders(), Contenders()
    rivals.add_compiled(left_out, CPU, lambda: entry, quick=False)
    assert not left_out.present
    assert "--compiled" in left_out.skipped["Transformers, torch.compile"]
    rivals.add_compiled(quick, CPU, lambda: entry, quick=True)
    monkeypatch.setattr(rivals, "_compiles_everywhere", False)  # restored after the test
    rivals.compile_everywhere()
    rivals.add_compiled(asked_for, CPU, lambda: entry, quick=False)
    for contenders in (quick, asked_for):
        assert [contender.name for contender in contenders.present] == ["Transformers, torch.compile"]
