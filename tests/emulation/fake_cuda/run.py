"""Run scenarios in a process with a pretended GPU, and print or store what they found.

python -m tests.emulation.fake_cuda.run "train/wav2vec2/*"
python -m tests.emulation.fake_cuda.run "train/*" --record
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.emulation.fake_cuda import budgets, shims


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of scenarios; * stands for any text")
    parser.add_argument("--json", action="store_true", help="print everything that was found, by scenario")
    parser.add_argument(
        "--record", action="store_true", help="write launches and waits to tests/emulation/budgets.json"
    )
    options = parser.parse_args(arguments)
    if shims.FOLDER not in os.environ:
        why = shims.why_not()
        sys.exit(f"a GPU cannot be pretended here: {why}" if why else _in_prepared_process(sys.argv[1:]))
    found = dict(_run(options.patterns))
    if options.record:
        budgets.record({name: of for name, of in found.items() if not name.startswith("fault/")})
    if options.json:
        print(json.dumps(found))


def _in_prepared_process(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.emulation.fake_cuda.run", *arguments]
        return subprocess.run(command, env=shims.environment(Path(folder)), check=False).returncode


def found_by(*patterns: str) -> dict[str, Any]:
    """Run scenarios in a process of their own, and return what they found, by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.emulation.fake_cuda.run", *patterns, "--json"]
        process = subprocess.run(
            command, env=shims.environment(Path(folder)), check=False, capture_output=True, text=True
        )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def _run(patterns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from tests.emulation.fake_cuda import pretend

    pretend.pretend()
    pretend.check_kernels()
    from tests.emulation.fake_cuda import catalogue
    from tests.emulation.fake_cuda.scenario import run

    known = dict(catalogue.scenarios())
    for pattern in patterns:
        names = fnmatch.filter(known, pattern)
        if not names:
            sys.exit(f"no scenario matches {pattern!r}")
        for name in names:
            found = run(known[name])
            print(_shown(name, found.as_json()), file=sys.stderr, flush=True)
            yield name, found.as_json()


def _shown(name: str, found: dict[str, Any]) -> str:
    lines = [f"{name}: {found['launches']}, {found['variants']} variants {found['notes'] or ''}"]
    for kind in ("waits", "pageable", "problems"):
        lines += [f"  {kind}: {count} x {what}" for what, count in found[kind].items()]
    lines += [f"  new variant: {variant}" for variant in found["new_variants"]]
    return "\n".join([*lines, *(f"  {line}" for line in found["error"].splitlines()[-8:])])


if __name__ == "__main__":
    _main()
