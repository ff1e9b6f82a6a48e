"""The machine under a measurement: who else uses it, how much memory a call takes, and what it is."""

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
# user, nice, system, irq, softirq and steal of the first line of /proc/stat
_BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class BusyMachineError(RuntimeError):
    """Other processes use the machine, so that a time would not be ours."""


class ForeignLoad:
    """CPU time that other processes have taken since this was made."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._others_s = _others_cpu_s()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def cpu_s(self) -> float:
        return _others_cpu_s() - self._others_s

    def too_much(self) -> bool:
        """Whether others took a twentieth of a core and more than /proc/stat's ticks can tell, besides idle cores."""
        idle_cores = max(0, (os.cpu_count() or 1) - torch.get_num_threads())
        return self.cpu_s() > 0.05 + (0.05 + idle_cores / 2) * self.elapsed_s()


def _others_cpu_s() -> float:
    columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(columns[i]) for i in _BUSY_COLUMNS) / _TICKS_PER_S - sum(os.times()[:4])


def wait_until_quiet(patience_s: float = 60.0) -> None:
    """Wait for the other processes to end.

    Raises:
        BusyMachineError: They do not within `patience_s`.
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
                "a time taken beside them would mean nothing: end them, and measure again"
            )


def undisturbed(work: Callable[[], T], attempts: int = 4) -> T:
    """The result of `work`, which is repeated when others used the machine meanwhile.

    Raises:
        BusyMachineError: They always did.
    """
    for _ in range(attempts):
        load = ForeignLoad()
        result = work()
        if not load.too_much():
            return result
        wait_until_quiet()
    raise BusyMachineError(f"other processes disturbed {attempts} attempts to measure: end them, and measure again")


def keep_freed_memory() -> None:
    """Let glibc keep up to 2 GB of freed memory for the next tensor, for the rest of the process.

    By itself it gives every tensor above 32 MB back to the system at once, and takes the same pages again with a page
    fault each: on some machines that takes longer than the work on them, and more so the more memory a work takes.

    Raises:
        RuntimeError: The C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    most = 2**31 - 1
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, most) and mallopt(_M_TRIM_THRESHOLD, most)):
        raise RuntimeError("--keep-freed-memory: only glibc can")


def with_peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds of a call, and the bytes that it took at its peak beyond what was held before it.

    On the CPU that is resident memory. The heap is given back to the system first, so that a call does not live on what
    another one left behind, and pages are counted when they are touched. Linux keeps the peak by counters that each
    processor brings up to date in batches, so it may lack some hundred kilobytes.
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
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = _status_bytes("VmRSS")
    seconds = seconds_of(call, device)
    return seconds, max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of one call on the CPU; on CUDA the time between two events around it."""
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
    del result  # freeing what a call returned is not part of it
    return seconds


def describe(device: torch.device) -> dict[str, Any]:
    """What a result has to say about where it comes from."""
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
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip()
