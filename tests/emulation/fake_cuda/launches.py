"""Record launches of Triton kernels instead of making them."""

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests.emulation.fake_cuda.record import Record

#: Largest size of a grid, by axis.
_LIMITS = (2**31 - 1, 65535, 65535)


@contextmanager
def recording(note: Callable[..., None]) -> Iterator[None]:
    """Within this context, call `note(kernel, args, grid, options)` for each launch of a Triton kernel."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        note(kernel, args, grid, options)

    original, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = original


@cache
def operators() -> dict[str, Callable[..., Any]]:
    """Return the host code of each Triton operator, by the operator's name."""
    import fastssl.kernels

    found = {}
    for module in pkgutil.iter_modules(fastssl.kernels.__path__):
        if module.ispkg and (kernels := _triton_module(module.name)) is not None:
            for name in (f"{module.name}_fwd", f"{module.name}_bwd"):
                found[name] = getattr(kernels, name)
    return found


def _triton_module(op: str) -> Any:
    try:
        return import_module(f"fastssl.kernels.{op}.triton_kernel")
    except ModuleNotFoundError:
        return None


def note_launch(record: Record, kernel: Any, args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
    """Check a launch and add it to a record.

    Problems are an argument on another device, one with strides, a grid outside the limits of the hardware, and tensors
    with dtypes that the kernel has in no case that is compiled ahead of time.
    """
    names = [parameter.name for parameter in kernel.params]
    arguments = dict(zip(names, args, strict=False))
    arguments |= {name: value for name, value in options.items() if name in names}
    op = kernel.__module__.split(".")[-2]
    title = f"{op}.{kernel.__name__}"
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if value.device.type != "cuda":
                record.problem(f"{title}: {name} is on {value.device}")
            if not value.is_contiguous():
                record.problem(f"{title}: {name} is not contiguous, {tuple(value.shape)} {value.stride()}")
    sizes = grid(arguments) if callable(grid) else grid
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    if any(not 0 < size <= limit for size, limit in zip(sizes, _LIMITS, strict=False)):
        record.problem(f"{title}: grid {sizes} is out of range")
    if kernel.__module__.startswith("fastssl.kernels."):
        dtypes = _dtypes(arguments)
        if dtypes not in _compiled_dtypes(op).get(kernel.__name__, set()):
            named = ", ".join(sorted(f"{name} {dtype}" for name, dtype in dtypes))
            record.problem(f"{title}: no ahead-of-time case has {named}")
    record.launches[title] += 1
    record.step(title, arguments, sizes, {name: value for name, value in options.items() if name not in names})
    record.variants.add((title, *_specialization(kernel, args, options)))


def _dtypes(arguments: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """Return the dtype of each tensor of a launch; another mixture, or an argument less, is another kernel."""
    tensors = ((name, value.dtype) for name, value in arguments.items() if isinstance(value, Tensor))
    return frozenset((name, str(dtype).removeprefix("torch.")) for name, dtype in tensors)


@cache
def _compiled_dtypes(op: str) -> dict[str, set[frozenset[tuple[str, str]]]]:
    """Return the dtypes of each launch of the cases that are compiled ahead of time, by kernel."""
    seen: dict[str, set[frozenset[tuple[str, str]]]] = {}

    def note(kernel: Any, args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
        arguments = dict(zip([parameter.name for parameter in kernel.params], args, strict=False)) | options
        seen.setdefault(kernel.__name__, set()).add(_dtypes(arguments))

    with recording(note), torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode(mode=False):
        for case in _triton_module(op).ahead_of_time_cases().values():
            case()
    return seen


class _Pointer:
    """What Triton asks of a tensor: its dtype, and whether its address is a multiple of 16."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self._offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset

    @staticmethod
    def ptr_range() -> int:
        return 0


@cache
def _binder(kernel: Any) -> Callable[..., Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder: Callable[..., Any] = create_function_from_signature(kernel.signature, kernel.params, backend)
    return binder


def _specialization(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, ...]:
    """Return what Triton compiles the kernel for; it compiles again whenever one of these texts is new."""

    def plain(value: Any) -> Any:
        return _Pointer(value) if isinstance(value, Tensor) else value

    named = {name: plain(value) for name, value in options.items()}
    bound, specialization, others = _binder(kernel)(*map(plain, args), **named)
    kinds = [f"{name}={kind}" for name, kind in zip(bound, specialization, strict=True)]
    return *kinds, *(f"{name}={value}" for name, value in sorted(others.items()))
