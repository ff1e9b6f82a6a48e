"""`fastssl check`: the command, which starts the process that runs the kernels, and prints what it reports."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastssl.files import write_json

_DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32", "bfloat16")}
#: Seconds after which a kernel without a result is stopped; compiling it may take a minute or two.
_LIMIT_S = 600.0
_WORKER = "fastssl.cli.check.worker"
#: Runs a module as `python -m` does, but not from a clone of this project in the current folder, which may have no
#: compiled kernels.
_RUN = (
    "import runpy, sys; sys.path[:] = filter(None, sys.path); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


@dataclass
class Checked:
    """What is known of one kernel.

    Attributes:
        op: Name of the op.
        case: What distinguishes the case from others of the op.
        backend: Name of the backend.
        error: Largest error relative to what is allowed; at most 1 is right. None if a result is not finite, or there
            is none.
        worst: Name of the output or gradient with that error.
        ms: Milliseconds of forward and backward.
        plain_ms: Milliseconds of the same work in padded PyTorch.
        failure: Why the kernel gave no result; "" if it gave one.
    """

    op: str
    case: str
    backend: str
    error: float | None = None
    worst: str = ""
    ms: float | None = None
    plain_ms: float | None = None
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the kernel gave results, and their errors are those of its dtype."""
        return self.error is not None and self.error <= 1


def check(arguments: Sequence[str]) -> None:
    """Run every kernel on a device; only the core dependencies are needed.

    Args:
        arguments: The command's arguments, as typed.

    Raises:
        ValueError: A kernel fails, or an argument is wrong.
        WriteError: The system refused to write the JSON file.
    """
    options = _parser().parse_args(list(arguments))
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; `fastssl info` shows what it is built for")
    dtype = options.dtype or _default_dtype(device)
    if dtype not in _DTYPES[device]:
        raise ValueError(f"--dtype {dtype}: on {device}, expected one of {', '.join(_DTYPES[device])}")
    machine = _machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"forward and backward in {dtype}; error 1.00 is what rounding allows; PyTorch computes on a padded batch\n")
    print(f"{'op':24}{'case':26}{'kernel':10}{'error':>8}{'ms':>10}{'PyTorch':>10}{'ratio':>8}")
    checked = []
    for one in _checked(device, dtype):
        checked.append(one)
        print(_line(one), flush=True)
    if options.output is not None:
        kernels = [asdict(one) for one in checked]
        write_json(Path(options.output), {"machine": machine, "dtype": dtype, "kernels": kernels})
    wrong = dict.fromkeys(f"{one.op}.{one.backend}" for one in checked if not one.is_right)
    if wrong:
        names = ",".join(wrong)
        raise ValueError(
            f"wrong: {', '.join(wrong)}; set FASTSSL_EXCLUDE={names} to run without, and please report the table"
        )


def _default_dtype(device: str) -> str:
    import torch

    first, *others = _DTYPES[device]
    is_old = device == "cuda" and torch.cuda.get_device_capability() < (8, 0)  # without arithmetic in bfloat16
    return others[0] if is_old else first


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastssl check",
        description="Run every kernel on this machine's own device: compare it with the reference, and time it beside "
        "PyTorch.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=tuple(_DTYPES), help="by default cuda if there is one")
    dtypes = dict.fromkeys(dtype for several in _DTYPES.values() for dtype in several)
    parser.add_argument(
        "--dtype",
        choices=tuple(dtypes),
        help="by default bfloat16 on cuda (float16 below compute capability 8.0) and float32 on cpu",
    )
    parser.add_argument("--output", metavar="FILE", help="write the table to a JSON file")
    return parser


def _machine(device: str) -> dict[str, Any]:
    import torch

    import fastssl
    from fastssl.cli.info import cpu_name, version

    machine = {name: version(name) for name in ("torch", "triton")}
    machine = {"fastssl": fastssl.__version__, "python": platform.python_version(), **machine}
    if device == "cpu":
        return {**machine, "CPU": cpu_name(), "threads": torch.get_num_threads()}
    capability = ".".join(str(part) for part in torch.cuda.get_device_capability())
    return {**machine, "GPU": torch.cuda.get_device_name(), "capability": capability, "CUDA": torch.version.cuda}


def _checked(device: str, dtype: str) -> Iterator[Checked]:
    """Yield the result of each kernel; after a crash, another process continues with the next kernel."""
    first: int | None = 0
    while first is not None:
        first = yield from _checked_by_one_process(device, dtype, first)


def _checked_by_one_process(device: str, dtype: str, first: int) -> Generator[Checked, None, int | None]:
    """Yield results from kernel number `first` on; return the number to continue with, None after the last."""
    command = [sys.executable, "-c", _RUN, _WORKER, device, dtype, str(first)]
    running: Checked | None = None
    number, failed = first, False
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        clock = _Clock(process)
        for line in process.stdout:
            clock.restart()
            values = json.loads(line)
            number = values.pop("number")
            if running is None:
                running = Checked(**values)
                continue
            if "left_out" in values:
                running = None
                continue
            for name, value in values.items():
                setattr(running, name, value)
            failed = bool(running.failure)
            yield running
            running = None
        clock.stop()
    if running is not None:
        stopped = f"no result after {_LIMIT_S:.0f} s"
        running.failure = stopped if clock.is_over else f"the process ended with {_status(process.returncode)}"
        yield running
    elif process.returncode == 0 and not failed:
        return None
    elif not failed:
        raise RuntimeError(
            f"{_WORKER} {device} {dtype} {first} ended with status {process.returncode} between two kernels"
        )
    return number + 1


def _environment() -> dict[str, str]:
    """Return an environment in which Python finds the package of this process first."""
    own, others = str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (own, others)))}


class _Clock:
    """Kills a process that has reported nothing for `_LIMIT_S`: a kernel may wait for something that never happens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.is_over = False
        self._process = process
        self._timer: threading.Timer | None = None
        self.restart()

    def restart(self) -> None:
        """Begin to count again."""
        self.stop()
        self._timer = threading.Timer(_LIMIT_S, self._end)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Count no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.is_over = True
        self._process.kill()


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _line(one: Checked) -> str:
    begin = f"{one.op:24}{one.case:26}{one.backend:10}"
    if one.failure or one.ms is None or one.plain_ms is None:
        return f"{begin}  FAILS: {one.failure}"
    error = "inf/NaN" if one.error is None else f"{one.error:.2f}"
    end = "" if one.is_right else f"  WRONG: {one.worst}"
    return f"{begin}{error:>8}{one.ms:10.2f}{one.plain_ms:10.2f}{one.plain_ms / one.ms:8.1f}{end}"
