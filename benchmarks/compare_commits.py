"""Compare the times of our own contenders with another commit's: `python -m benchmarks.compare_commits COMMIT`.

Each tree runs in its own process, with its own `fastssl` and its own benchmarks. For each row, both processes build the
same work. They then take turns to call it, one at a time: before, after, after, before, ... Two adjacent turns are a
pair, and give a ratio after / before. The program reports the median of these ratios and its 95 % interval, which
follows from the order of the ratios alone.

If the whole interval of a row lies above 1.03, the row is measured once more, with three times the pairs. Each third of
these pairs runs in new processes: two processes of the same code differ by up to three per cent in a step of 20 ms,
because their memory layouts differ. The exit status is 1 if the interval lies above 1.03 again.

Other processes disturb single turns, which the median tolerates. Under load, up to twice as many pairs are taken, if
`--seconds` allows it, and those with the least load are kept.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.bits.trees import ROOT, check_out
from benchmarks.machine import describe
from benchmarks.one_tree import MODULES
from benchmarks.turns import FEWEST_PAIRS, Comparison, Ratio, Result

ALLOWED = 1.03
_AGAIN = 3
_HEADER = (
    "row",
    "before, ms",
    "after, ms",
    "after / before",
    "processor time",
    "pairs (quiet)",
    "measured again",
    "processor",
    "",
)


def choose(before: Mapping[str, str], after: Mapping[str, str], patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the rows that both trees have, and a message for each row that one of them lacks.

    Args:
        before: Module of each row of the other commit.
        after: Module of each row of this checkout.
        patterns: Patterns of the rows to compare, in this order; empty means the rows of `benchmarks.all` and
            `bench_overhead`.

    Raises:
        ValueError: A pattern matches no row of either tree.
    """
    known = dict(after) | dict(before)
    for pattern in patterns:
        if not any(fnmatch(row, pattern) for row in known):
            raise ValueError(f"--only {pattern}: no row has this name; there are {', '.join(sorted(known))}")
    usual = [row for row, module in known.items() if module in MODULES[:2]]
    asked = [row for pattern in patterns for row in known if fnmatch(row, pattern)]
    chosen = list(dict.fromkeys(asked if patterns else usual))
    common = [row for row in chosen if row in before and row in after]
    lacking = [f"{row}: only {'before' if row in before else 'after'} has it" for row in chosen if row not in common]
    return common, lacking


def slower(result: Result) -> bool:
    """Return whether the whole interval lies above the limit."""
    return result.time.low > ALLOWED


def judge(first: Result, again: Result | None) -> str:
    """Return the verdict: "SLOWER", "not settled" if the interval contains the limit, otherwise ""."""
    last = again or first
    if slower(last):
        return "SLOWER"
    return "not settled" if last.time.high > ALLOWED else ""


def line(row: str, first: Result, again: Result | None) -> str:
    """Return a line of the table."""
    return _cells(
        [
            row,
            f"{first.before_s * 1e3:.4g}",
            f"{first.after_s * 1e3:.4g}",
            _words(first.time),
            _words(first.cpu_time),
            f"{first.pairs} ({first.quiet_pairs})",
            f"{_words(again.time)}, {again.pairs} ({again.quiet_pairs})" if again else "",
            (again or first).processor,
            judge(first, again),
        ]
    )


def _words(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    given, parser = _parse(arguments)
    torch.set_num_threads(given.threads)  # for the description
    with tempfile.TemporaryDirectory(prefix="compare-commits-") as name:
        folder = Path(name)
        checkout = Path(given.commit)
        try:
            if not (checkout / "fastssl").is_dir():
                checkout = folder / "checkout"
                check_out(given.commit, checkout, modules=given.modules)
                commit = _commit_of(given.commit, ROOT)
            else:
                commit = _commit_of("HEAD", checkout)
            comparison = Comparison(checkout.resolve(), ROOT, folder, given.threads)
            rows, lacking = choose(*comparison.rows(), given.only)
        except ValueError as error:
            parser.error(str(error))
        report: dict[str, Any] = describe(torch.device("cpu"))
        report |= {"before": commit, "allowed": ALLOWED, "rounds": given.rounds, "lacking": lacking, "rows": {}}
        print(f"before: {commit[:7]}, after: {report['commit'][:7]}")
        print("\n".join([*lacking, _cells(_HEADER), _cells(["---"] * len(_HEADER))]), flush=True)
        failed = False
        for row in rows:
            first = comparison.measure(row, rounds=given.rounds, budget_s=given.seconds)
            again = None
            if slower(first):
                again = comparison.measure(row, rounds=given.rounds, budget_s=given.seconds, starts=_AGAIN)
            failed |= again is not None and slower(again)
            print(line(row, first, again), flush=True)
            report["rows"][row] = {
                "first": asdict(first),
                "again": asdict(again) if again else None,
                "verdict": judge(first, again),
            }
            if given.output:
                given.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


def _commit_of(name: str, checkout: Path) -> str:
    """Return the full hash of a commit, or "" in a folder that git does not know."""
    command = ["git", "rev-parse", "--verify", "--quiet", name]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with: a commit, or the folder of another checkout")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="where the rows run (only cpu)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ROW",
        help="compare this row, or the rows that match a pattern such as 'wavlm-*'; may be repeated "
        "(default: the rows of benchmarks.all and bench_overhead)",
    )
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="pairs of turns of each row (default 40)")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="take fewer pairs of a row where they need longer (default 150)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--modules", type=Path, help="folder with compiled modules of COMMIT, instead of building them")
    parser.add_argument("--output", type=Path, help="JSON file, written after every row")
    given = parser.parse_args(arguments)
    if given.rounds < FEWEST_PAIRS:
        parser.error(f"--rounds: expected at least {FEWEST_PAIRS}, got {given.rounds}")
    return given, parser


if __name__ == "__main__":
    sys.exit(main())
