"""Make PyTorch believe in one GPU of compute capability 9.0, without starting CUDA.

`pretend()` must run before fastssl is imported, because fastssl decides at import which kernels exist.
"""

import ctypes
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.emulation.fake_cuda.shims import FOLDER

#: What a wait outside the dispatcher calls, such as `torch.cuda.synchronize`; the recording mode sets it.
on_wait: list[Callable[[str], None]] = []
#: What writes the values of finished copies to the host; the recording mode sets it.
on_arrival: list[Callable[[], None]] = []
#: What a CUDA graph calls with "begin" and "end" of its capture, and with "replay"; the recording mode sets it.
on_graph: list[Callable[[str], None]] = []
#: PyTorch's guard for devices that do not exist speaks of 8 of them; the engine asks for each.
_DEVICES_OF_ENGINE = 8
_PROPERTIES = SimpleNamespace(
    name="pretended GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32
)
_libraries: list[torch.library.Library] = []


def pretend() -> None:
    """Replace what PyTorch asks about GPUs, and what it would call of the CUDA runtime."""
    warnings.filterwarnings("ignore", module="torch")
    torch.autograd.set_multithreading_enabled(False)  # modes of the dispatcher belong to this thread
    torch._C._ensureCUDADeviceGuardSet()
    _replace_cuda()
    _hide_the_runtime()
    _replace_engine()
    _allow_fake_tensors_in_foreach()
    _mend_fake_tensors()
    _register_missing_kernels()
    _treat_fake_weights_as_plain()


def _replace_cuda() -> None:
    cuda: Any = torch.cuda
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": True,
        "is_bf16_supported": True,
        "get_device_capability": (_PROPERTIES.major, _PROPERTIES.minor),
        "get_device_properties": _PROPERTIES,
        "get_device_name": _PROPERTIES.name,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_stats": {},
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    nothing = ("_lazy_init", "init", "set_device", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state")
    answers |= dict.fromkeys((*nothing, "reset_peak_memory_stats", "_sleep"))
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    for name in ("device", "device_of", "stream"):
        setattr(cuda, name, lambda *args, **kwargs: nullcontext())
    cuda.synchronize = lambda *args: _wait("synchronize")
    cuda.Stream = cuda.current_stream = cuda.default_stream = _Stream
    cuda.Event = _Event
    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle = _Graph, _capture, lambda: (0, 1)
    cuda.is_current_stream_capturing = lambda: False
    cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Generator = _Generator  # type: ignore[misc]
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_device_index = lambda: 0


def _hide_the_runtime() -> None:
    """Let no code ask the CUDA runtime itself, which would find no GPU; fastssl then asks PyTorch."""

    class WithoutRuntime(ctypes.CDLL):
        def __init__(self, name: Any, *args: Any, **kwargs: Any) -> None:
            if str(name).startswith("libcudart.so"):
                raise OSError(f"{name} is hidden, because a GPU is pretended")
            super().__init__(name, *args, **kwargs)

    ctypes.CDLL = WithoutRuntime  # type: ignore[misc]
    # What Triton would launch kernels with, which needs more of the driver than is here.
    cast(Any, import_module("triton.backends.nvidia.driver")).CudaUtils = lambda: None


class _Generator(torch.Generator):
    """A generator of any device, made on the CPU: fake tensors draw nothing."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Stream:
    """A stream: nothing is queued, and only a wait of the host counts."""

    device, device_index, cuda_stream, stream_id = torch.device("cuda", 0), 0, 0, 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object = None) -> None:
        pass

    wait_event = record_event = wait_stream

    def synchronize(self) -> None:
        _wait("synchronize")


class _Event:
    """An event: to wait for one of an earlier update costs nothing, because all that came before it is done."""

    updates = 0  # begun so far

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._update = -1

    def record(self, stream: object = None) -> None:
        self._update = _Event.updates

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        if self._update == _Event.updates:
            _wait("synchronize")

    def elapsed_time(self, event: object) -> float:
        return 10_000.0  # ms; benchmarks call what takes long only a few times


def begin_update() -> None:
    """Say that the device has done all that was asked of it in earlier updates."""
    _Event.updates += 1
    for arrive in on_arrival:
        arrive()


def _wait(what: str) -> None:
    for note in on_wait:
        note(what)


class _Graph:
    """A CUDA graph, whose only content is that it was captured and replayed."""

    def replay(self) -> None:
        _note_graph("replay")


@contextmanager
def _capture(graph: _Graph, **options: object) -> Iterator[None]:
    _note_graph("begin")
    try:
        yield
    finally:
        _note_graph("end")


def _note_graph(what: str) -> None:
    for note in on_graph:
        note(what)


def _replace_engine() -> None:
    """Let the autograd engine, and nothing else, hear of a device."""
    shim = ctypes.CDLL(str(Path(os.environ[FOLDER]) / "engine.so"))
    original = torch.autograd.graph._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        shim.pretend_devices(_DEVICES_OF_ENGINE)
        try:
            return original(*args, **kwargs)
        finally:
            shim.pretend_devices(0)

    for module in (torch.autograd, torch.autograd.graph):
        cast(Any, module)._engine_run_backward = run


def _allow_fake_tensors_in_foreach() -> None:
    """Make optimisers and clipping take the same path as with real CUDA tensors."""
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        import_module(name)._foreach_supported_types.append(FakeTensor)


def _mend_fake_tensors() -> None:
    """Let fake tensors do some things as CUDA tensors do."""

    def tolist(tensor: FakeTensor) -> Any:
        return tensor.cpu().tolist()  # one copy, instead of one per element

    def reduce(tensor: FakeTensor, protocol: Any) -> Any:
        return tensor.detach().cpu().__reduce_ex__(protocol)  # as `torch.save` copies a CUDA tensor to the host

    original = torch.nn.Module._apply

    def apply(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Replace fake parameters, because PyTorch would swap their memory, which they do not have."""
        parameters: dict[str, Any] = module._parameters
        changed = {
            name: _changed(cast(Any, value), change)
            for name, value in parameters.items()
            if isinstance(value, FakeTensor)
        }
        parameters |= dict.fromkeys(changed)
        original(module, change, recurse)  # type: ignore[no-untyped-call]
        parameters |= changed
        return module

    fake, module_class = cast(Any, FakeTensor), cast(Any, torch.nn.Module)
    fake.__reduce_ex__, fake.tolist, module_class._apply = reduce, tolist, apply


def _changed(parameter: torch.nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Parameter:
    with torch.no_grad():
        new = change(parameter)
    if new is parameter:
        return parameter
    return torch.nn.Parameter(new.detach(), requires_grad=parameter.requires_grad)


def _register_missing_kernels() -> None:
    """Register the CUDA kernels in C++ by name if they were not built, so that fastssl chooses them as on a GPU."""
    spec = find_spec("fastssl")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    if any(package.glob("_C_cuda*.so")):
        return
    library = torch.library.Library("fastssl_native", "IMPL")
    _libraries.append(library)
    for source in (package.parent / "csrc").glob("*/*.cu"):
        for name in re.findall(r'm\.impl\("(\w+)"', source.read_text()):
            library.impl(name, _never_called, "CUDA")


def check_kernels() -> None:
    """Check that fastssl, imported after `pretend()`, would use its own kernels; otherwise only references would run.

    Raises:
        RuntimeError: An op has Triton or CUDA kernels, and fastssl does not choose them on the pretended GPU.
    """
    from fastssl.kernels.dispatch import MISSING

    reasons = {
        f"{op}.{backend}": why
        for op, missing in MISSING.items()
        for (backend, device), why in missing.items()
        if device == "cuda" and why != "not implemented"
    }
    if reasons:
        raise RuntimeError(f"kernels that a GPU would run are missing on the pretended GPU: {reasons}")


def _treat_fake_weights_as_plain() -> None:
    """Let ops compute in place of modules whose weights are fake, as they do if the weights are ordinary tensors."""
    functional, linear = (
        cast(Any, import_module("fastssl.nn.functional")),
        cast(Any, import_module("fastssl.nn.linear")),
    )
    functional._PLAIN_WEIGHTS = (*functional._PLAIN_WEIGHTS, FakeTensor)
    linear.ORDINARY = (*linear.ORDINARY, FakeTensor)


def _never_called(*args: object) -> None:
    raise AssertionError("an operator on the pretended GPU reached its kernel")


@contextmanager
def cpu_tensors_from_literals() -> Iterator[None]:
    """Let `torch.tensor(..., device="cuda")` make a CPU tensor and copy it, as PyTorch does without modes."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
