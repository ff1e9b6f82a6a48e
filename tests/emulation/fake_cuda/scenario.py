"""Scenarios: code to run on the pretended GPU, by name, and what one run of it found."""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.emulation.fake_cuda.mode import FakeCuda
from tests.emulation.fake_cuda.record import Record


@dataclass
class Found:
    """What one scenario found.

    Attributes:
        launches: Launches of each phase, by name.
        waits: Number of waits, by place and reason.
        pageable: Copies from memory that is not page-locked, by place.
        problems: Errors, each with its place and the number of times.
        variants: Number of variants of Triton kernels that the first batch needs.
        new_variants: Variants that a later batch of other lengths adds, as text.
        kernels: Launches of all phases, by operator or kernel.
        notes: Anything else, such as dtypes of outputs, by name.
        error: Traceback of the exception that ended the scenario, or "".
    """

    launches: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    pageable: dict[str, int] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)
    variants: int = 0
    new_variants: list[str] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Watch:
    """The mode of a scenario, and the results of its phases.

    Attributes:
        mode: Enter it to run code on the pretended GPU.
        found: Results so far.
    """

    def __init__(self) -> None:
        self.mode = FakeCuda()
        self.found = Found()
        self._variants: set[tuple[str, ...]] = set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a phase of the scenario in the mode; its launches and waits count."""
        self.mode.record = record = Record()
        try:
            with self.mode:
                yield
        finally:
            self._add(name, record)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Run code in the mode whose launches and waits do not count, such as making a model; problems do."""
        self.mode.record = record = Record()
        try:
            with self.mode:
                yield
        finally:
            self._variants |= record.variants
            self._add_problems(record)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run code in the mode of which nothing counts, such as that of another library."""
        self.mode.record = Record()
        with self.mode:
            yield

    @contextmanager
    def no_new_variants(self) -> Iterator[None]:
        """Within this context, only variants of kernels may be launched that were launched before."""
        self.found.variants = len(self._variants)
        before = set(self._variants)
        with self.unwatched():
            yield
        self.found.new_variants += sorted(_difference(new, before) for new in self._variants - before)

    def _add(self, name: str, record: Record) -> None:
        found = self.found
        found.launches[name] = found.launches.get(name, 0) + sum(record.launches.values())
        found.waits = _sum(found.waits, record.waits)
        found.pageable = _sum(found.pageable, record.pageable)
        found.kernels = _sum(found.kernels, record.launches)
        self._variants |= record.variants
        self._add_problems(record)

    def _add_problems(self, record: Record) -> None:
        self.found.problems = _sum(self.found.problems, record.problems)


def _sum(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(first) + Counter(second)).items()))


def _difference(new: tuple[str, ...], before: set[tuple[str, ...]]) -> str:
    """Describe a variant by what differs from the variant of the same kernel that is most like it."""
    others = [set(old) for old in before if old[0] == new[0]]
    nearest = min(others, key=lambda old: len(set(new) - old), default=set())
    return f"{new[0]}: {', '.join(part for part in new[1:] if part not in nearest)}"


Scenario = Callable[[Watch], None]


def run(scenario: Scenario) -> Found:
    """Run a scenario to its end or to its first exception."""
    watch = Watch()
    try:
        scenario(watch)
    except (Exception, SystemExit):
        watch.found.error = traceback.format_exc()
    return watch.found
