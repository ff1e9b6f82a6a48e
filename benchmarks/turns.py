"""Time the same call alternately in the processes of two trees, and compute the ratio of the times."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bits.trees import ROOT
from benchmarks.machine import ForeignLoad

#: An interval at 95 % needs this many pairs.
FEWEST_PAIRS = 6
# This many pairs are taken however long they take. The interval then leaves out the lowest and the highest ratio.
_FEWEST_ROUNDS = 9
_TURN_S = 0.15
#: Share of a core that others may take during a pair; the system counts in ticks of 10 ms.
_QUIET, _TICK_S = 0.05, 0.01


@dataclass(frozen=True)
class Pair:
    """One turn of each tree: median time per call, total processor time, and the load of other processes."""

    before_s: float
    after_s: float
    before_cpu_s: float
    after_cpu_s: float
    others: float  # cores

    @property
    def quiet(self) -> bool:
        return self.others <= _QUIET


@dataclass(frozen=True)
class Ratio:
    """The ratio after / before: its median over the pairs, and the 95 % interval of that median."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """The result of one row; times are medians over the pairs that were kept."""

    contender: str
    processor: str
    before_s: float
    after_s: float
    time: Ratio
    cpu_time: Ratio
    pairs: int
    quiet_pairs: int
    calls_per_turn: int


def ratio(values: Sequence[float]) -> Ratio:
    """Return the median, and the order statistics that enclose the true median with at least 95 % probability.

    Raises:
        ValueError: There are fewer than six values.
    """
    count = len(values)
    if count < FEWEST_PAIRS:
        raise ValueError(f"an interval at 95 % needs at least {FEWEST_PAIRS} ratios, got {count}")
    # Find how many values may lie outside on each side. The number of values below the true median is binomial.
    outside, below = 0, 2.0**-count
    while (more := below + math.comb(count, outside + 1) * 2.0**-count) <= 0.025:
        outside, below = outside + 1, more
    ordered = sorted(values)
    return Ratio(statistics.median(values), ordered[outside], ordered[-1 - outside])


def quietest(pairs: Sequence[Pair], wanted: int) -> list[Pair]:
    """Return the `wanted` pairs with the least load from other processes; earlier pairs win ties."""
    return sorted(pairs, key=lambda pair: pair.others)[:wanted]


Turn = Callable[[int], tuple[float, float, float]]


def take_pairs(before: Turn, after: Turn, *, calls: int, wanted: int, most: int) -> list[Pair]:
    """Measure pairs until `wanted` of them were quiet, or `most` were taken; return the `wanted` quietest."""
    pairs: list[Pair] = []
    while len(pairs) < most and sum(pair.quiet for pair in pairs) < wanted:
        order = (before, after) if len(pairs) % 2 == 0 else (after, before)
        turns = {side: side(calls) for side in order}
        (before_s, before_cpu_s, one), (after_s, after_cpu_s, other) = turns[before], turns[after]
        pairs.append(Pair(before_s, after_s, before_cpu_s, after_cpu_s, max(one, other)))
    return quietest(pairs, wanted)


class Side:
    """The process of one tree.

    Args:
        name: Name of the tree in messages.
        tree: Checkout from which the process imports `fastssl` and `benchmarks`.
        log: File for the output of the process.
        threads: Number of CPU threads.
    """

    def __init__(self, name: str, tree: Path, log: Path, threads: int) -> None:
        self.name, self._log = name, log
        worker = ROOT / "benchmarks" / "one_tree.py"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(worker), str(tree), str(threads)],
                cwd=tree,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def say(self, message: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `hear` says why it has ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Read the next answer of the process.

        Raises:
            RuntimeError: The process has ended; the message contains the end of its output.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"{self.name}: exit status {status}\n{self._log.read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def turn(self, calls: int) -> tuple[float, float, float]:
        """Time calls: return median seconds, total processor seconds, and cores used by other processes."""
        load = ForeignLoad()
        self.say(calls)
        answer = self.hear()
        others_s = load.cpu_s() - answer["cpu_s"] - _TICK_S
        return answer["wall_s"], answer["cpu_s"], max(0.0, others_s) / load.elapsed_s()

    def warm_up(self) -> float:
        """Warm up the work that the process has built, and return the time of one call in seconds."""
        self.say(None)
        seconds: float = self.hear()["call_s"]
        return seconds

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


class Comparison:
    """Compare two trees, each in its own process.

    Args:
        before: Checkout of the other commit.
        after: Checkout to compare with it.
        folder: Folder for the output of the processes.
        threads: CPU threads of each process; the processes never run at the same time.
    """

    def __init__(self, before: Path, after: Path, folder: Path, threads: int) -> None:
        self._trees, self._folder, self._threads = {"before": before, "after": after}, folder, threads

    def rows(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the module of each row, for both trees."""
        sides = self._start()
        try:
            before, after = (side.hear()["rows"] for side in sides)
            return before, after
        finally:
            for side in sides:
                side.end()

    def measure(self, row: str, *, rounds: int, budget_s: float, starts: int = 1) -> Result:
        """Time one row in new processes.

        Args:
            row: Key of the row.
            rounds: Number of pairs to keep from each start.
            budget_s: Time limit in seconds; a slow row gets fewer pairs, but at least nine.
            starts: Number of times that the processes are started; each start has another memory layout.
        """
        hellos: list[dict[str, Any]] = []
        pairs: list[Pair] = []
        for _ in range(starts):
            with ExitStack() as stack:
                sides = self._start()
                for side in sides:
                    stack.callback(side.end)
                hellos += [side.hear() for side in sides]
                for side in sides:
                    side.say(row)
                hellos += [side.hear() for side in sides]
                call_s = max(side.warm_up() for side in sides)
                calls = max(1, round(_TURN_S / call_s))
                fitting = max(_FEWEST_ROUNDS, int(budget_s / (2 * calls * call_s)))
                wanted, most = min(rounds, fitting), min(2 * rounds, fitting)
                pairs += take_pairs(sides[0].turn, sides[1].turn, calls=calls, wanted=wanted, most=most)
        said = {key: list(dict.fromkeys(h[key] for h in hellos if key in h)) for key in ("contender", "processor")}
        return Result(
            contender=" / ".join(said["contender"]),
            processor=" / ".join(said["processor"]),
            before_s=statistics.median(pair.before_s for pair in pairs),
            after_s=statistics.median(pair.after_s for pair in pairs),
            time=ratio([pair.after_s / pair.before_s for pair in pairs]),
            cpu_time=ratio([pair.after_cpu_s / pair.before_cpu_s for pair in pairs]),
            pairs=len(pairs),
            quiet_pairs=sum(pair.quiet for pair in pairs),
            calls_per_turn=calls,
        )

    def _start(self) -> list[Side]:
        return [Side(name, tree, self._folder / f"{name}.log", self._threads) for name, tree in self._trees.items()]
