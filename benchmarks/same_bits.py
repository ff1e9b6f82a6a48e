"""Check that this checkout computes the same bits as another commit: `python -m benchmarks.same_bits COMMIT`.

Both checkouts run the same programs on the CPU: every op with every available backend, our own encoders, other
libraries' models after `accelerate`, and short training runs. Some of these runs are begun by the other commit and
finished by this checkout. Exit status 1 means that a result differs. Results of accelerated models may differ by up to
4 eps of their largest element; they are counted separately. Dropout draws by the newest version of the randomness that
both know.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bits.compare import Group, compare, table
from benchmarks.bits.record import load
from benchmarks.bits.runs import compare_runs
from benchmarks.bits.trees import ROOT, Tree, check_out, finish

#: Largest difference allowed in each part, in eps of a tensor's largest element.
PARTS = {"ops": 0.0, "encoders": 0.0, "accelerated": 4.0, "runs": 0.0}


def compare_part(part: str, before: Tree, after: Tree, folder: Path, *, match: str, updates: int) -> dict[str, Group]:
    """Run the program of a part in both trees at the same time, and compare their records.

    Args:
        part: Name of the part, a key of `PARTS`.
        before: Tree of the other commit.
        after: Tree of this checkout.
        folder: Folder for records and logs.
        match: Compare only calls and runs whose name contains this text.
        updates: Length of a training run; even.

    Returns:
        Groups of results by name.
    """
    if part == "runs":
        return compare(*compare_runs(before, after, folder, match=match, updates=updates))
    files = {tree: folder / f"{part}-{tree.name}.pt" for tree in (before, after)}
    logs = {tree: file.with_suffix(".log") for tree, file in files.items()}
    running = {tree: tree.start(f"benchmarks.bits.{part}", file, match, log=logs[tree]) for tree, file in files.items()}
    try:
        for tree, process in running.items():
            finish(process, f"{part} of {tree.name}", logs[tree])
    finally:
        for process in running.values():
            process.kill()
    return compare(load(files[before]), load(files[after]), tolerance_eps=PARTS[part])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 if all results are equal, 1 if some differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="commit to compare with, or the folder of another checkout")
    parser.add_argument("--only", action="append", choices=PARTS, help="compare only this part; may be repeated")
    parser.add_argument("--match", default="", help="compare only calls and runs whose name contains this text")
    parser.add_argument("--updates", type=int, default=20, help="updates per training run; must be even (default: 20)")
    parser.add_argument("--modules", type=Path, help="folder with the compiled modules of COMMIT; skips building them")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        folder = Path(name)
        checkout = Path(given.commit)
        if not (checkout / "fastssl").is_dir():
            checkout = folder / "checkout"
            try:
                check_out(given.commit, checkout, modules=given.modules)
            except ValueError as error:
                parser.error(str(error))
        before, after = Tree("before", checkout, folder / "before"), Tree("after", ROOT, folder / "after")
        before.randomness = after.randomness = min(tree.newest_randomness() or 1 for tree in (before, after))
        failed = False
        for part in given.only or PARTS:
            began_s = time.monotonic()
            groups = compare_part(part, before, after, folder, match=given.match, updates=given.updates)
            print(f"\n{table(part, groups)}\n{time.monotonic() - began_s:.0f} s", flush=True)
            failed |= any(group.different for group in groups.values())
    print("\nDIFFERENT" if failed else "\nequal")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
