"""Dry runs of the benchmarks and of `fastssl check`: their commands with `--device cuda`, on the pretended GPU.

Times and errors are pretended, and batches have few utterances. Everything else is real: contenders are built and
called as on a GPU, shapes of outputs are compared, and tables and JSON are written. Where `torch.compile` would
compile, the function itself runs.
"""

import json
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from benchmarks import workloads
from benchmarks.targets import TARGETS
from fastssl.cli.check import command
from tests.emulation.fake_cuda.scenario import Scenario, Watch

T = TypeVar("T")
_MOST_UTTERANCES = 3
_middles = workloads._middles
#: Modules with rows; `benchmarks.all` runs the rows that have a target.
MODULES = (
    "bench_train_step",
    "bench_hubert_step",
    "bench_encoder",
    "bench_compression",
    "bench_drop_in",
    *(f"ops.{path.stem}" for path in sorted(Path(import_module("benchmarks.ops").__path__[0]).glob("bench_*.py"))),
)
_WORKER = "tests.emulation.fake_cuda.check_worker"


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for module in MODULES:
        for row in import_module(f"benchmarks.{module}").ROWS:
            yield f"benchmark/{module}/{row}", partial(_measure, module=f"benchmarks.{module}", rows=[row])
    promised = dict.fromkeys(target.row for target in TARGETS["cuda"])
    yield "benchmark/all", partial(_measure, module="benchmarks.all", rows=list(promised))
    for dtype in command._DTYPES["cuda"]:
        yield f"check/{dtype}", partial(_check, dtype=dtype)


def _measure(watch: Watch, *, module: str, rows: Sequence[str]) -> None:
    """Run a benchmark as its command does, and note which contenders were measured and which were not."""
    with tempfile.TemporaryDirectory() as folder, watch.unwatched(), _pretended_time():
        output = Path(folder) / "result.json"
        chosen = [] if module == "benchmarks.all" else [f"--only={row}" for row in rows]
        _run_module(module, ["--device=cuda", *chosen, f"--output={output}"])
        result = json.loads(output.read_text())
    assert list(result["rows"]) == list(rows), list(result["rows"])
    watch.found.notes["measured"] = {row: list(of["measurements"]) for row, of in result["rows"].items()}
    watch.found.notes["skipped"] = {
        f"{row}: {name}": why for row, of in result["rows"].items() for name, why in of["skipped"].items()
    }


def _run_module(module: str, arguments: Sequence[str]) -> None:
    """Run a module as `python -m` does; what it prints goes to standard error."""
    with mock.patch.object(sys, "argv", [module, *arguments]), mock.patch.object(sys, "stdout", sys.stderr):
        sys.modules.pop(module, None)  # runpy warns of a module that is run twice
        runpy.run_module(module, run_name="__main__")


@contextmanager
def _pretended_time() -> Iterator[None]:
    """Let the machine be quiet, and compile nothing."""
    replaced: dict[str, dict[str, Any]] = {
        "benchmarks.machine": {"wait_until_quiet": _do_nothing, "undisturbed": _call},
        "benchmarks.harness": {"wait_until_quiet": _do_nothing, "undisturbed": _call},
        "benchmarks.limits": {"undisturbed": _call},
        "benchmarks.workloads": {"_middles": _few},
    }
    with ExitStack() as stack:
        for module, functions in replaced.items():
            stack.enter_context(mock.patch.multiple(module, **functions))
        stack.enter_context(mock.patch.object(torch, "compile", _uncompiled))
        yield


def _do_nothing() -> None:
    pass


def _call(work: Callable[[], T]) -> T:
    return work()


def _few(count: int) -> list[float]:
    return _middles(min(count, _MOST_UTTERANCES))


def _uncompiled(function: Any, *, dynamic: bool) -> Any:
    return function


def _check(watch: Watch, *, dtype: str) -> None:
    """Run `fastssl check`, whose process pretends a GPU, too."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(command, "_WORKER", _WORKER):
        output = Path(folder) / "check.json"
        with mock.patch.object(sys, "stdout", sys.stderr):
            command.check(["--device", "cuda", "--dtype", dtype, "--output", str(output)])
        kernels = json.loads(output.read_text())["kernels"]
    watch.found.notes["checked"] = sorted({f"{kernel['op']}.{kernel['backend']}" for kernel in kernels})
