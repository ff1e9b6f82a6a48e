"""One tree's side of `benchmarks.compare_commits`: builds the work of a row, and times it when it is told to.

This file runs by its path, in a process that imports `fastssl` and `benchmarks` from the tree that its first argument
names. That tree may be an older one, so nothing of this checkout is imported, and few names of the other are used:
the `ROWS` of its benchmarks, `benchmarks.harness.compare`, which is replaced, and four of `bench_overhead`.

It reads a JSON value per line and answers each with one:

    (at the start)          {"rows": {row: module}, "processor": ...}
    "encoder-one"           {"contender": "fastssl"}: its work is built
    null                    {"call_s": 0.31}: it is warm
    5                       {"wall_s": 0.312, "cpu_s": 3.11}: the median call, and the processor time of all 5
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

#: Where rows are looked for; those of the first two are compared unless others are asked for.
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
    """Row -> its module, and what builds its work: the name of our contender, and the call that is timed."""
    harness: Any = importlib.import_module("benchmarks.harness")
    harness.compare = capture  # before the modules take it from there
    rows: dict[str, tuple[str, Build]] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise
            continue  # the other tree has its rows, which are then named as missing here
        found = _overhead(module) if name == OVERHEAD else {k: partial(run, _CPU) for k, run in module.ROWS.items()}
        for key, build in found.items():
            rows.setdefault(key, (name, build))
    return rows


def capture(_title: str, contenders: Any, **_given: Any) -> tuple[str, Callable[[], Any]]:
    """Takes the place of `compare`: the first of our contenders, which users get, and what is timed of it."""
    return next((name, run) for name, run, _ in contenders.present if name.startswith("fastssl"))


def _overhead(module: Any) -> dict[str, Build]:
    """The narrow steps of `bench_overhead`, nearly all of which is Python, dispatch and autograd."""
    steps: dict[str, Callable[[], Callable[[], Any]]] = {}
    for count in (4, 16):
        steps[f"overhead-encoder-{count}"] = partial(module.encoder_step, module.NARROW, [0.1] * count)
        steps[f"overhead-positional-{count}"] = partial(module.positional_step, [1] * count, 16, 2, 4)
    return {row: partial(_ours, step) for row, step in steps.items()}


def _ours(step: Callable[[], Callable[[], Any]]) -> tuple[str, Callable[[], Any]]:
    return "fastssl", step()


def warm_up(call: Callable[[], Any]) -> float:
    """Call until it is warm; seconds of the last call."""
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
    """Files of `fastssl` and `benchmarks` that this process has loaded and that are not of the tree."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("fastssl", "benchmarks")]
    files = {file for name in names if (file := getattr(sys.modules[name], "__file__", None))}
    maps = [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
    files |= {path for path in maps if path.endswith(".so") and "/fastssl/" in path}
    return [file for file in sorted(files) if not Path(file).resolve().is_relative_to(tree)]


def processor() -> str:
    """Name, family and model: the name alone does not tell the generation."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    if "cpu family" not in found:
        return found.get("model name", "unknown")
    return f"{found['model name']}, family {found['cpu family']}, model {found['model']}"


def main(folder: str, threads: str) -> None:
    """Answer one comparison's questions about one row."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a row prints is not an answer

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
        gc.collect()  # the rivals, whose memory goes back to the system
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
