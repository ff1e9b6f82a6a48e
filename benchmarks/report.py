"""The command line that all benchmarks share: measure rows, print tables and targets, write JSON."""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import rivals
from benchmarks.harness import Measurement, Row
from benchmarks.machine import describe, keep_freed_memory
from benchmarks.targets import TARGETS, Target

Rows = Mapping[str, Callable[[torch.device], Row]]


def print_row(key: str, row: Row, seconds: float) -> None:
    """Print a row: every contender with its ratio to ours, then limits, skipped contenders and notes."""
    audio = "" if row.audio_s is None else f", {row.audio_s:.1f} s of audio"
    print(f"\n{key}: {row.title}{audio}")
    print(
        f"  {'':44s} {'ms':>10s} {'ms, low to high':>21s} {'rounds':>6s} {'x ours':>7s} {'peak MB':>9s} {'x ours':>7s}"
    )
    ours = row.measurements[row.ours]
    for name, m in row.measurements.items():
        spread = f"{m.lowest_s * 1e3:.4g} to {m.highest_s * 1e3:.4g}"
        memory = f"{m.peak_bytes / max(1, ours.peak_bytes):7.2f}"
        print(
            f"  {name:44s} {m.seconds * 1e3:10.4g} {spread:>21s} {m.rounds:6d} {m.seconds / ours.seconds:7.2f} "
            f"{m.peak_bytes / 1e6:9.4g} {memory}   error {m.worst_error:.1g}"
        )
    for name, limit_s in row.limits.items():
        print(f"  limit: {name:37s} {limit_s * 1e3:10.4g}    ours / limit {ours.seconds / limit_s:.2f}")
    for name, why in row.skipped.items():
        print(f"  {name:44s} not measured: {why}")
    for note in row.notes:
        print(f"  {note}")
    print(
        f"  gate: outputs and gradients within {row.tolerance:g} of the reference. The row took {seconds:.0f} s.",
        flush=True,
    )


class Verdict(NamedTuple):
    """One line of the table of targets."""

    row: str
    work: str
    ours: str | None
    rival: str | None
    target: str
    measured: str
    met: bool | None  # None: part of the target was not measured


def verdict(target: Target, rows: Mapping[str, Row]) -> Verdict:
    """Judge whether the measured rows meet a target; a target for the limit refers to the first limit of its row."""
    row = rows[target.row]
    rival = row.fastest_rival(target.against)
    ours, theirs = row.measurements[row.ours], row.measurements.get(rival or "")
    limit_s = next(iter(row.limits.values()), None)
    whole = rows.get(target.share[0]) if target.share else None
    promised, measured, met = [], [], []

    def judge(promise: str, ratio: float | None, words: str, kept: Callable[[float], bool]) -> None:
        promised.append(promise)
        measured.append("nothing" if ratio is None else words.format(ratio))
        met.append(None if ratio is None else kept(ratio))

    if (speed := target.speed) is not None:
        ratio = theirs.seconds / ours.seconds if theirs else None
        judge(f"{speed:g}x", ratio, f"{{:.2f}}x ({rival})", lambda ratio: ratio >= speed)
    if (memory := target.memory) is not None:
        ratio = ours.peak_bytes / max(1, theirs.peak_bytes) if theirs else None
        judge(f"{memory:.2g} of its memory", ratio, "{:.2g} of its memory", lambda ratio: ratio <= memory)
    if (limit := target.limit) is not None:
        ratio = ours.seconds / limit_s if limit_s else None
        judge(f"{limit:g} of the limit", ratio, "{:.2f} of the limit", lambda ratio: ratio <= limit)
    if target.share is not None:
        name, share = target.share
        ratio = ours.seconds / whole.measurements[whole.ours].seconds if whole else None
        judge(f"{share:.0%} of {name}", ratio, f"{{:.1%}} of {name}", lambda ratio: ratio <= share)
    result = None if None in met else all(met)
    return Verdict(target.row, target.work, row.ours, rival, ", ".join(promised), ", ".join(measured), result)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print the table of targets: what was promised, what was measured, and whether the target is met."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    print(f"\n{'work':72s} {'target':44s} measured")
    for line in verdicts:
        print(f"{line.work:72s} {line.target:44s} {line.measured}: {words[line.met]}")


def _apart(measure: Callable[[torch.device], Row], device: torch.device) -> Row:
    """Measure a row in its own process, so that it does not inherit the heap of other rows.

    On a heap that earlier rows have grown, large tensors cause no page faults, which halves the time of some rivals. On
    a GPU the row is measured in this process, because the GPU's allocator is emptied between rows.
    """
    if device.type != "cpu":
        return measure(device)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def send() -> None:
        try:
            sender.send(measure(device))
        except BaseException as error:
            sender.send(error)

    process = multiprocessing.get_context("fork").Process(target=send)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that measured the row died with exit code {process.exitcode}; see its output above"
        ) from None
    process.join()
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, Row)
    return result


def main(
    rows: Rows,
    description: str,
    *,
    by_default: Mapping[str, Sequence[str]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    targets: Mapping[str, Sequence[Target]] = TARGETS,
) -> None:
    """Parse the command line, measure rows, print them with their targets, and write JSON.

    Args:
        rows: For each row's key, the function that measures the row on a given device.
        description: Text for `--help`.
        by_default: For each device, the rows to measure without `--only`; None means all rows.
        groups: Names of options, each of which measures its rows in place of those by default.
        targets: For each device, the targets to judge.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", metavar="ROW", help=f"one of {', '.join(rows)}; may be repeated")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--output", type=Path, help="JSON file for the results, written after every row")
    parser.add_argument(
        "--resume", action="store_true", help="skip rows that OUTPUT already contains; it must be from the same commit"
    )
    parser.add_argument("--compiled", action="store_true", help="include torch.compile in every row (takes long)")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="let glibc keep memory that tensors free, for all contenders"
    )
    for name, members in (groups or {}).items():
        parser.add_argument(
            f"--{name}",
            dest="only",
            action="store_const",
            const=list(members),
            help=f"measure {', '.join(members)} instead",
        )
    args = parser.parse_args()
    if unknown := set(args.only or ()) - rows.keys():
        parser.error(f"--only: unknown row {', '.join(sorted(unknown))}; choose from {', '.join(rows)}")
    torch.set_num_threads(args.threads)
    if args.compiled:
        rivals.compile_everywhere()
    if args.keep_freed_memory:
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # keep fp32 exact in the gates; timed work on a GPU is bf16
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")

    began_s = time.monotonic()
    measured = _rows_of(args.output, device) if args.resume and args.output and args.output.exists() else {}
    for key in args.only or (by_default[args.device] if by_default else rows):
        if key in measured:
            continue
        row_began_s = time.monotonic()
        measured[key] = _apart(rows[key], device)
        print_row(key, measured[key], time.monotonic() - row_began_s)
        if args.output:
            _write(args.output, device, measured, targets[args.device])
    verdicts = [verdict(target, measured) for target in targets[args.device] if target.row in measured]
    if verdicts:
        print_verdicts(verdicts)
    print(f"\n{time.monotonic() - began_s:.0f} s in all")


def _write(path: Path, device: torch.device, measured: Mapping[str, Row], targets: Sequence[Target]) -> None:
    result = describe(device) | {
        "device": device.type,
        "targets": [verdict(target, measured)._asdict() for target in targets if target.row in measured],
        "rows": {key: asdict(row) for key, row in measured.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def _rows_of(path: Path, device: torch.device) -> dict[str, Row]:
    """Read the rows that an interrupted run has measured.

    Raises:
        ValueError: The run was at another commit.
    """
    content = json.loads(path.read_text())
    commit = describe(device)["commit"]
    if content["commit"] != commit:
        raise ValueError(
            f"{path}: was measured at commit {content['commit'][:7]}, but this is commit {commit[:7]}; check out that "
            "commit, or choose another --output"
        )
    rows = {}
    for key, values in content["rows"].items():
        measurements = {name: Measurement(**m) for name, m in values["measurements"].items()}
        rows[key] = Row(**values | {"measurements": measurements})
    return rows
