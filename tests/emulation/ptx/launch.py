"""Replace Triton's launcher: compile each launch to PTX for sm_80, and run it on tensors in the host's memory."""

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastssl.kernels import dispatch
from fastssl.kernels.precision import fp32_precision
from tests.emulation.ptx.lanes import Grid
from tests.emulation.ptx.machine import Program
from tests.emulation.ptx.memory import GlobalMemory
from tests.emulation.ptx.parser import Kernel, parse
from tests.emulation.ptx.values import UNSIGNED, Array
from tests.ops.ahead_of_time import Compiled, Launch, Prepared, figures, prepare

ARCHITECTURE = 80


@dataclass
class Emulator:
    """Runs launches, and notes them.

    Attributes:
        launches: The launches, in order.
        seconds: Time spent on compilation and on execution.
        programs_of: Chooses the numbers of the programs to run of a grid; None runs all.
    """

    launches: list[Launch] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"compile": 0.0, "run": 0.0})
    programs_of: Callable[[Grid], Sequence[int]] | None = None
    _programs: dict[tuple[str, str], tuple[Program, int]] = field(default_factory=dict)

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Do what Triton's `JITFunction.run` does."""
        started = time.perf_counter()
        launch = Launch(kernel, args, options)
        prepared = prepare(launch, ARCHITECTURE)
        program, shared_size = self._compiled(prepared)
        compiled = time.perf_counter()
        self.launches.append(launch)
        x, y, z = (*(grid(prepared.bound) if callable(grid) else grid), 1, 1)[:3]
        whole: Grid = x, y, z
        memory = GlobalMemory()
        parameters = _parameters(program.kernel, prepared, memory)
        chosen = None if self.programs_of is None else self.programs_of(whole)
        program.run(parameters, memory, whole, shared_size, programs=chosen)
        self.seconds["compile"] += compiled - started
        self.seconds["run"] += time.perf_counter() - compiled

    def _compiled(self, prepared: Prepared) -> tuple[Program, int]:
        """Return the program and its bytes of shared memory; equal launches are compiled once."""
        if prepared.key not in self._programs:
            binary = prepared.compile()
            self._programs[prepared.key] = Program(parse(binary.asm["ptx"])), binary.metadata.shared
        return self._programs[prepared.key]


def _parameters(kernel: Kernel, prepared: Prepared, memory: GlobalMemory) -> dict[str, Array]:
    """Return the bits of each parameter of a kernel. The last two are for scratch memory, which no kernel uses."""
    names = [name for name, kind in prepared.signature.items() if kind != "constexpr"]
    assert len(kernel.parameters) == len(names) + 2, "Triton passes arguments in a way that the emulator does not know"
    bits = {name: np.asarray(0, UNSIGNED[kind.bits]) for name, kind in kernel.parameters}
    for name, (parameter, kind) in zip(names, kernel.parameters, strict=False):
        value = prepared.bound[name]
        if isinstance(value, torch.Tensor):
            bits[parameter] = np.asarray(memory.add(name, value), np.uint64)
        elif kind.is_float:
            bits[parameter] = np.asarray(value, np.float32).view(np.uint32)
        else:
            bits[parameter] = np.asarray(int(value) & ((1 << kind.bits) - 1), UNSIGNED[kind.bits])
    return bits


def _without_machine_code(*arguments: Any) -> tuple[str, str] | None:
    """Leave out the last stage of Triton's compiler, ptxas, which takes half of the time; a hook of Triton.

    Without arguments, it returns what distinguishes the results in Triton's cache.
    """
    if not arguments:
        return ("ptx only", "ptx only")
    _, stages, *_ = arguments
    stages["cubin"] = lambda source, metadata: b""
    return None


def _filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a function that allocates fill integers with random numbers, because equal ones could pass as results."""
    generator = torch.Generator().manual_seed(0)

    def filled(*args: Any, **options: Any) -> torch.Tensor:
        x = allocate(*args, **options)
        if x.device.type == "cpu" and x.dtype in (torch.int32, torch.int64):
            x.random_(-(2**31), 2**31 - 1, generator=generator)
        return x

    return filled


@contextmanager
def _poisoned() -> Iterator[None]:
    """Let PyTorch fill fresh memory with NaN, and with random integers."""
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic = torch.are_deterministic_algorithms_enabled()
    places: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    originals = [getattr(place, name) for place, name in places]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        for place, name in places:
            setattr(place, name, _filled(getattr(place, name)))
        yield
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


@contextmanager
def emulated(*, poison: bool = True) -> Iterator[Emulator]:
    """Run all launches of Triton kernels in the emulator; with `poison`, fresh memory of PyTorch is NaN or random.

    Products of fp32 numbers are exact, as those of the reference on the CPU are. By default, convolutions on a GPU use
    TF32.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    emulator = Emulator()
    launcher, hook = JITFunction.run, knobs.runtime.add_stages_inspection_hook
    JITFunction.run = lambda kernel, *args, **options: emulator.launch(kernel, *args, **options)
    knobs.runtime.add_stages_inspection_hook = _without_machine_code
    try:
        with _poisoned() if poison else nullcontext(), fp32_precision(convolutions="ieee", matrix_products="ieee"):
            yield emulator
    finally:
        JITFunction.run, knobs.runtime.add_stages_inspection_hook = launcher, hook


def use_triton_on_the_cpu() -> None:
    """Register the Triton kernels of all ops for tensors on the CPU, as `fastssl` does for Triton's interpreter."""
    for name, missing in dispatch.MISSING.items():
        if missing.get(("triton", "cpu"), "not implemented") == "not implemented":
            continue
        op: dispatch.Op = importlib.import_module(f"fastssl.kernels.{name}.op")._OP
        op._plug_in(dispatch.TRITON, f"fastssl.kernels.{name}.triton_kernel", "CPU")
        dispatch.BACKENDS[name]["cpu"] += ("triton",)
        del missing["triton", "cpu"]


def compile_again(emulator: Emulator, op: str, architecture: int) -> list[Compiled]:
    """Compile the launches of an emulator for another architecture, to machine code; return the compiler's figures."""
    different: dict[tuple[str, str], tuple[str, Prepared]] = {}
    for launch in emulator.launches:
        prepared = prepare(launch, architecture)
        different.setdefault(prepared.key, (launch.kernel.__name__, prepared))
    return [
        Compiled(op, "emulated", name, architecture, **figures(prepared.compile()))
        for name, prepared in different.values()
    ]
