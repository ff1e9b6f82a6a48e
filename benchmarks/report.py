"""Tables, targets, JSON, and the command line that all benchmarks share."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Row
from benchmarks.machine import describe
from benchmarks.targets import TARGETS, Target

Rows = Mapping[str, Callable[[torch.device], Row]]


def print_row(key: str, row: Row, seconds: float) -> None:
    """The contenders beside ours, then the limits."""
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
        f"  gate: outputs and gradients within {row.tolerance:g} of the reference. This took {seconds:.0f} s.",
        flush=True,
    )


def verdict(target: Target, rows: Mapping[str, Row]) -> dict[str, str | bool | None]:
    """A line of the target table: what was promised, what was measured, and whether it is met (None: not measured)."""
    promised, measured, met = [], [], []
    row = rows.get(target.row)
    rivals = row.rivals(target.against) if row else []
    rival = min(rivals, key=lambda name: row.measurements[name].seconds) if row and rivals else None
    ours = row.measurements[row.ours] if row else None
    if target.speed is not None:
        promised.append(f"{target.speed:g}x")
        if row and ours and rival:
            ratio = row.measurements[rival].seconds / ours.seconds
            measured.append(f"{ratio:.2f}x ({rival})")
            met.append(ratio >= target.speed)
    if target.memory is not None:
        promised.append(f"{target.memory:.2g} of the memory")
        if row and ours and rival:
            ratio = ours.peak_bytes / max(1, row.measurements[rival].peak_bytes)
            measured.append(f"{ratio:.2g} of the memory")
            met.append(ratio <= target.memory)
    if target.limit is not None:
        promised.append(f"{target.limit:g} of the limit")
        if row and ours and row.limits:
            ratios = [ours.seconds / limit_s for limit_s in row.limits.values()]
            measured.append(" and ".join(f"{ratio:.2f}" for ratio in ratios) + " of the limit")
            met.append(ratios[0] <= target.limit)
    if target.share is not None:
        whole = rows.get(target.share[0])
        promised.append(f"{target.share[1]:.0%} of {target.share[0]}")
        if ours and whole:
            ratio = ours.seconds / whole.measurements[whole.ours].seconds
            measured.append(f"{ratio:.1%} of {target.share[0]}")
            met.append(ratio <= target.share[1])
    complete = len(met) == len(promised)
    return {
        "row": target.row,
        "work": target.work,
        "target": ", ".join(promised),
        "measured": ", ".join(measured),
        "met": all(met) if complete else None,
    }


def print_verdicts(verdicts: list[dict[str, str | bool | None]]) -> None:
    print(f"\n{'work':72s} {'target':40s} measured")
    for line in verdicts:
        word = {True: "met", False: "MISSED", None: "not measured"}[line["met"]]  # type: ignore[index]
        print(f"{line['work']:72s} {line['target']:40s} {line['measured']}: {word}")


def main(rows: Rows, description: str, *, by_default: Mapping[str, Sequence[str]] | None = None) -> None:
    """Measure rows, print them and the targets they have, and write JSON.

    Args:
        rows: Key -> function of a device that measures the row.
        description: For `--help`.
        by_default: Device -> the rows that are measured without `--only`; None means all of them.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", metavar="ROW", help=f"one of {', '.join(rows)}; may be repeated")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - rows.keys():
        parser.error(f"--only: there is no row {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")

    began_s = time.monotonic()
    measured: dict[str, Row] = {}
    for key in args.only or (by_default[args.device] if by_default else rows):
        row_began_s = time.monotonic()
        measured[key] = rows[key](device)
        print_row(key, measured[key], time.monotonic() - row_began_s)
    verdicts = [verdict(target, measured) for target in TARGETS[args.device] if target.row in measured]
    if verdicts:
        print_verdicts(verdicts)
    print(f"\n{time.monotonic() - began_s:.0f} s in all")
    if args.output:
        result = describe(device) | {
            "device": args.device,
            "targets": verdicts,
            "rows": {key: row.as_dict() for key, row in measured.items()},
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
