"""Write the README's tables from the newest committed results: `python -m benchmarks.readme_table [--check]`.

A block from `<!-- all cpu -->` to `<!-- end -->` is replaced by the table of the newest file
`benchmarks/results/*-all-cpu.json`. In both names, `drop-in` may replace `all`, and `cuda` may replace `cpu`. With
`--check`, nothing is written, and the command fails if a table is not up to date.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- (all|drop-in) (cpu|cuda) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def updated(text: str, results: Path) -> str:
    """Return the text with its blocks filled from the newest results in a folder."""
    tables = {"all": table, "drop-in": drop_in_table}

    def fill(found: re.Match[str]) -> str:
        result = newest(results, found[2], found[3])
        return found[1] + ("Not measured yet.\n" if result is None else tables[found[2]](*result)) + found[5]

    return _BLOCK.sub(fill, text)


def newest(results: Path, kind: str, device: str) -> tuple[str, dict[str, Any]] | None:
    """Return the name and content of the newest result of a kind and device; file names begin with their date."""
    files = sorted(results.glob(f"*-{kind}-{device}.json"))
    return (files[-1].name, json.loads(files[-1].read_text())) if files else None


def table(name: str, content: dict[str, Any]) -> str:
    """Return a table with a line per target: times, peak memory, ratios to the rival and the limits, and verdict."""
    lines = [
        f"{_provenance(name, content)} Limits: the GEMMs of the valid audio by `aten::mm` and, in fp32 on a CPU, by "
        "the fastest GEMM there is; a copy for integrate-and-fire.",
        "",
        "| work | fastssl | fastest rival | rival / ours | peak memory | ours / limits | target |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(target, content["rows"][target["row"]]) for target in content["targets"]]
    return "\n".join(lines) + "\n"


def drop_in_table(name: str, content: dict[str, Any]) -> str:
    """Return a table with a line per architecture: time and memory before and after `accelerate`, by kind of work."""
    works = list(dict.fromkeys(row["title"].partition(", ")[2] for row in content["rows"].values()))
    rows = {row["title"]: row for row in content["rows"].values()}
    lines = [
        f"{_provenance(name, content)} Seconds, ours and the original's; their ratio; and the ratio of peak memory.",
        "",
        f"| architecture | {' | '.join(works)} |",
        "|---" * (len(works) + 1) + "|",
    ]
    for architecture in dict.fromkeys(title.partition(", ")[0] for title in rows):
        cells = [_before_and_after(rows.get(f"{architecture}, {work}")) for work in works]
        lines.append(f"| {architecture} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _before_and_after(row: dict[str, Any] | None) -> str:
    if row is None or not {"fastssl", "original"} <= row["measurements"].keys():
        return ""
    ours, original = (row["measurements"][name] for name in ("fastssl", "original"))
    memory = original["peak_bytes"] / max(1, ours["peak_bytes"])
    ratio = original["seconds"] / ours["seconds"]
    return f"{ours['seconds']:.3g}, {original['seconds']:.3g}: **{ratio:.1f}**; {memory:.1f}"


def _provenance(name: str, content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    threads = f", {machine['threads']} threads" if content["device"] == "cpu" else ""
    return (
        f"{machine['device']}{threads}, torch {versions['torch']}, transformers {versions['transformers']}, commit "
        f"{content['commit'][:7]} (`benchmarks/results/{name}`)."
    )


def _line(target: dict[str, Any], row: dict[str, Any]) -> str:
    measurements = row["measurements"]
    ours = measurements[target["ours"]]
    rival = measurements.get(target["rival"])
    cells = [target["work"], _time(ours["seconds"])]
    if rival:
        memory = f"{_bytes(ours['peak_bytes'])} / {_bytes(rival['peak_bytes'])}"
        ratio = f"{rival['seconds'] / ours['seconds']:.2f}"
        cells += [f"{_time(rival['seconds'])} ({target['rival']})", ratio, memory]
    else:
        cells += ["", "", _bytes(ours["peak_bytes"])]
    cells.append(", ".join(f"{ours['seconds'] / limit_s:.2f}" for limit_s in row["limits"].values()))
    word = {True: "met", False: "missed", None: "not measured"}[target["met"]]
    return f"| {' | '.join(cells)} | {target['target']}: {word} |"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is not up to date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = updated(text, ROOT / "benchmarks" / "results")
    if args.check and new != text:
        raise SystemExit(
            "README.md: the tables do not match the newest results; run `python -m benchmarks.readme_table`"
        )
    if not args.check:
        readme.write_text(new)


if __name__ == "__main__":
    main()
