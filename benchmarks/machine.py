"""Observe the machine: load from other processes, time and memory of a call, hardware and versions."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# columns user, nice, system, irq, softirq and steal in the first line of /proc/stat
_BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)

#: Instructions that decide how fast a processor multiplies matrices, as Linux names them.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants from glibc's malloc.h


class BusyMachineError(RuntimeError):
    """Other processes use the machine, so measured times would be wrong."""


class ForeignLoad:
    """CPU time that other processes have used since the object was created."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._others_s = _others_cpu_s()

    def elapsed_s(self) -> float:
        """Return the wall-clock seconds since the object was created."""
        return time.monotonic() - self._began_s

    def cpu_s(self) -> float:
        """Return the CPU seconds that other processes have used since the object was created, over all cores."""
        return _others_cpu_s() - self._others_s

    def too_much(self) -> bool:
        """Whether other processes used too much CPU time to trust a measurement.

        They may use a twentieth of a core, half of each core that torch leaves idle, and 0.05 s more, because the ticks
        of /proc/stat are coarse.
        """
        idle_cores = max(0, (os.cpu_count() or 1) - torch.get_num_threads())
        return self.cpu_s() > 0.05 + (0.05 + idle_cores / 2) * self.elapsed_s()


def _others_cpu_s() -> float:
    columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(columns[i]) for i in _BUSY_COLUMNS) / _TICKS_PER_S - sum(os.times()[:4])


def wait_until_quiet(patience_s: float = 60.0) -> None:
    """Wait until other processes leave the machine alone.

    Args:
        patience_s: Longest time to wait, in seconds.

    Raises:
        BusyMachineError: Other processes are still using the machine after `patience_s`.
    """
    began_s = time.monotonic()
    while True:
        load = ForeignLoad()
        time.sleep(0.5)
        if not load.too_much():
            return
        if time.monotonic() - began_s > patience_s:
            cores = load.cpu_s() / load.elapsed_s()
            raise BusyMachineError(
                f"other processes have been using the machine for {patience_s:.0f} s ({cores:.1f} cores just now); "
                "times measured meanwhile would be wrong: stop these processes and measure again"
            )


def undisturbed(work: Callable[[], T], attempts: int = 4) -> T:
    """Run `work` and return its result, repeating it if other processes used the machine meanwhile.

    Args:
        work: The measurement.
        attempts: Largest number of attempts.

    Raises:
        BusyMachineError: Other processes disturbed every attempt.
    """
    for _ in range(attempts):
        load = ForeignLoad()
        result = work()
        if not load.too_much():
            return result
        wait_until_quiet()
    raise BusyMachineError(
        f"other processes disturbed all {attempts} attempts to measure: stop these processes and measure again"
    )


def keep_freed_memory() -> None:
    """Make glibc keep up to 2 GB of freed memory for the next tensor, for the rest of the process.

    By default, glibc returns every tensor above 32 MB to the system at once, and later gets the same pages back with a
    page fault for each. On some machines this takes longer than the work itself, and it grows with the memory used.

    Raises:
        RuntimeError: The C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    most = 2**31 - 1
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, most) and mallopt(_M_TRIM_THRESHOLD, most)):
        raise RuntimeError(
            "--keep-freed-memory: needs glibc, but this system has another C library; leave the option out"
        )


def with_peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Return a call's time in seconds, and its peak memory in bytes less the memory in use before it.

    On the CPU this is resident memory. The free heap is first returned to the system, so that a call cannot reuse pages
    of an earlier one; a page counts as soon as it is touched. Linux updates its memory counters in batches per
    processor, so the peak may be a few hundred kilobytes too low.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = seconds_of(call, device)
        return seconds, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current value
    before = _status_bytes("VmRSS")
    seconds = seconds_of(call, device)
    return seconds, max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no line {name}; measuring memory needs Linux")


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call in seconds: wall time on the CPU, the time between two CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        seconds = float(start.elapsed_time(end)) / 1e3
    else:
        began_s = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began_s
    del result  # outside of the timed part: freeing the result does not count
    return seconds


def describe(device: torch.device) -> dict[str, Any]:
    """Describe where a result comes from: hardware, library versions, commit and command."""
    return {
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "triton", "transformers", "torchaudio", "flash_attn", "numpy")},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)]),
    }


def _processor() -> str:
    """Return name, family, model and instructions for products: the name alone does not identify the generation."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    if "cpu family" not in found:
        return found.get("model name", platform.machine())
    instructions = [name for name in _INSTRUCTIONS if name in found["flags"].split()]
    return f"{found['model name']}, family {found['cpu family']}, model {found['model']} ({', '.join(instructions)})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip()
