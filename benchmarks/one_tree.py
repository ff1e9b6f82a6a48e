"""Time the rows of one tree, as requested on stdin: one of the two processes of `benchmarks.compare_commits`.

The script is run by its path, in a process that imports `fastssl` and `benchmarks` from the tree named by its first
argument. That tree may be older, so this script imports nothing from its own checkout. It relies on few names of the
tree: the `ROWS` of its benchmarks, `benchmarks.harness.compare`, which it replaces, and four names of `bench_overhead`.

The protocol: each line on stdin is a JSON value, and each is answered with one line of JSON.

    (at the start)          {"rows": {row: module}, "processor": ...}
    "encoder-one"           {"contender": "fastssl"}: the row's work has been built
    null                    {"call_s": 0.31}: the call has been warmed up
    5                       {"wall_s": 0.312, "cpu_s": 3.11}: median time of 5 calls, and their total processor time
"""

import ctypes
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

#: Modules with rows. The rows of the first two are compared by default.
OVERHEAD = "benchmarks.bench_overhead"
MODULES = (
    "benchmarks.all",
    OVERHEAD,
    "benchmarks.ops.bench_bias_gelu_dropout",
    "benchmarks.ops.bench_dropout_add_layer_norm",
    "benchmarks.bench_hubert_step",
    "benchmarks.bench_drop_in",
)
_CPU = torch.device("cpu")
_WARM_UP_S, _WARM_UP_CALLS = 1.0, 2
Build = Callable[[], tuple[str, Callable[[], Any]]]


def find_rows(modules: tuple[str, ...] = MODULES) -> dict[str, tuple[str, Build]]:
    """Return for each row its module and a function that builds its work: contender name and the call to time."""
    harness: Any = importlib.import_module("benchmarks.harness")
    harness.compare = capture  # before the modules import it
    rows: dict[str, tuple[str, Build]] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise
            continue  # only the other tree has this module; the comparison reports its rows as missing here
        found = _overhead(module) if name == OVERHEAD else {k: partial(run, _CPU) for k, run in module.ROWS.items()}
        for key, build in found.items():
            rows.setdefault(key, (name, build))
    return rows


def capture(_title: str, contenders: Any, **_given: Any) -> tuple[str, Callable[[], Any]]:
    """Replace `compare`: return name and timed call of the first fastssl contender, the one that users get."""
    return next((name, run) for name, run, _ in contenders.present if name.startswith("fastssl"))


def _overhead(module: Any) -> dict[str, Build]:
    """Return the narrow steps of `bench_overhead`, which spend nearly all time in Python, dispatch and autograd."""
    steps: dict[str, Callable[[], Callable[[], Any]]] = {}
    for count in (4, 16):
        steps[f"overhead-encoder-{count}"] = partial(module.encoder_step, module.NARROW, [0.1] * count)
        steps[f"overhead-positional-{count}"] = partial(module.positional_step, [1] * count, 16, 2, 4)
    return {row: partial(_ours, step) for row, step in steps.items()}


def _ours(step: Callable[[], Callable[[], Any]]) -> tuple[str, Callable[[], Any]]:
    return "fastssl", step()


def warm_up(call: Callable[[], Any]) -> float:
    """Call repeatedly until caches and threads are warm, and return the time of the last call in seconds."""
    began_s, calls = time.perf_counter(), 0
    while calls < _WARM_UP_CALLS or time.perf_counter() - began_s < _WARM_UP_S:
        call_s, calls = _seconds(call), calls + 1
    return call_s


def _seconds(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began_s
    del result  # freeing it is not part of the work
    return seconds


def foreign_files(tree: Path) -> list[str]:
    """Return the loaded files of `fastssl` and `benchmarks` that lie outside the tree."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("fastssl", "benchmarks")]
    files = {file for name in names if (file := getattr(sys.modules[name], "__file__", None))}
    maps = [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
    files |= {path for path in maps if path.endswith(".so") and "/fastssl/" in path}
    return [file for file in sorted(files) if not Path(file).resolve().is_relative_to(tree)]


def processor() -> str:
    """Return name, family and model of the processor; the name alone does not identify its generation."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    if "cpu family" not in found:
        return found.get("model name", "unknown")
    return f"{found['model name']}, family {found['cpu family']}, model {found['model']}"


def main(folder: str, threads: str) -> None:
    """Build one row's work and time it, as requested on stdin; the module docstring describes the protocol."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that a row prints must not be taken for an answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    tree = Path(folder).resolve()
    sys.path[0] = str(tree)  # instead of the folder of this file
    torch.set_num_threads(int(threads))
    rows = find_rows()
    say({"rows": {key: module for key, (module, _) in rows.items()}, "processor": processor()})
    for line in sys.stdin:
        torch.manual_seed(0)
        name, call = rows[json.loads(line)][1]()
        # Free the rivals, and return their memory to the system.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        say({"contender": name})
        next(sys.stdin)
        call_s = warm_up(call)
        if strangers := foreign_files(tree):
            raise RuntimeError(f"{tree}: these files are not part of this tree: {', '.join(strangers)}")
        say({"call_s": call_s})
        for line in sys.stdin:
            began_s = time.process_time()
            wall_s = statistics.median(_seconds(call) for _ in range(json.loads(line)))
            say({"wall_s": wall_s, "cpu_s": time.process_time() - began_s})


if __name__ == "__main__":
    main(*sys.argv[1:])
