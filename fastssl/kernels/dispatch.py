"""Code that all ops share: operator definitions, loading of compiled modules, choice of a backend, autocast.

Each op defines the operators `fastssl_native::<op>_fwd/_bwd` (compiled C++ and CUDA) and
`fastssl_triton::<op>_fwd/_bwd`. Optional modules implement them. `BACKENDS` records at import which implementations are
available.
"""

import ctypes
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels.autograd import is_transformed, once_differentiable
from fastssl.kernels.gpus import gpus, why_no_code, why_no_triton
from fastssl.kernels.triton_driver import why_no_launches

_PACKAGE = Path(__file__).resolve().parent.parent
#: Advice in error messages on how to get a compiled module that was not built.
BUILD_IT = "run `pip install .` in a clone of the project"
NATIVE = torch.library.Library("fastssl_native", "DEF")
TRITON = torch.library.Library("fastssl_triton", "DEF")

#: op -> device type -> available backends, the preferred one first.
BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {}
#: The same for ops that have no gradients.
INFERENCE_BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {}
#: op -> (backend, device type) -> reason why that backend is not available, for error messages.
MISSING: dict[str, dict[tuple[str, str], str]] = {}


def _load_compiled_modules() -> dict[str, str]:
    """Load `_C_cpu` and `_C_cuda`. Return for each device type why its module cannot be used, "" if it can."""
    report = _PACKAGE / "_build_report.json"  # modules that the installation left out, with the reasons
    left_out = json.loads(report.read_text()) if report.exists() else {}
    reasons = {}
    for device in ("cpu", "cuda"):
        libraries = sorted(_PACKAGE.glob(f"_C_{device}*.so"))
        reasons[device] = ""
        if not libraries:
            reasons[device] = f"compiled module _C_{device} was not built: {left_out.get(device, BUILD_IT)}"
            continue
        try:
            torch.ops.load_library(str(libraries[0]))
        except OSError as error:
            reasons[device] = f"{libraries[0].name} does not load: {error.__cause__ or error}"
            continue
        if device == "cuda":
            reasons[device] = why_no_code(_cuda_architectures(libraries[0]), gpus())
    return reasons


def _cuda_architectures(library: Path) -> str:
    """Return the architectures that `_C_cuda` was compiled for, as `why_no_code` reads them; "" if it does not say."""
    function = getattr(ctypes.CDLL(str(library)), "fastssl_cuda_architectures", None)
    if function is None:  # built from an earlier version
        return ""
    function.restype = ctypes.c_char_p
    names: bytes = function()
    return names.decode()


#: Backend named by FASTSSL_BACKEND. Read once at import, because reading the environment inside an op breaks
#: `torch.compile(fullgraph=True)`.
DEFAULT_BACKEND = os.environ.get("FASTSSL_BACKEND") or None
#: Implementations that FASTSSL_EXCLUDE leaves out, as in "varlen_attention.triton,strided_conv.native".
EXCLUDED = tuple(filter(None, os.environ.get("FASTSSL_EXCLUDE", "").replace(" ", "").split(",")))
#: device type -> reason why its compiled module cannot be used, "" if it can.
COMPILED_MODULES = _load_compiled_modules()


def _why_no_triton() -> dict[str, str]:
    """Return for each device type why Triton kernels cannot run on it, "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return dict.fromkeys(("cpu", "cuda"), "triton is not installed")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "cpu": "" if interprets else "Triton needs a GPU; set TRITON_INTERPRET=1 to run its slow interpreter in tests",
        "cuda": why_no_triton(gpus()) or why_no_launches(),
    }


#: device type -> reason why Triton kernels cannot run on it, "" if they can.
WHY_NO_TRITON = _why_no_triton()


#: Reasons why no backend but the reference supports a call under `torch.func` or forward-mode AD.
_TRANSFORMED = dict.fromkeys(
    ("native", "triton", "torch"), "transforms of torch.func and forward-mode AD need the code in plain PyTorch"
)


class UnavailableBackendError(ValueError):
    """Raised if the backend that was asked for does not exist for an op and a device, or cannot serve a call."""


class Op:
    """One op: its operators, their available implementations, and the choice of a backend for a call.

    Attributes:
        name: Name of the op, and prefix of the names of its operators.
        forward: Backend -> operator `<name>_fwd`; empty if the op has no operators of its own.
        backward: Backend -> operator `<name>_bwd`; empty if the op has no operators of its own.
    """

    def __init__(
        self,
        name: str,
        fake_forward: Callable[..., Any] | None = None,
        fake_backward: Callable[..., Any] | None = None,
        *,
        schemas: tuple[str | None, str | None] = (None, None),
        torch_devices: Sequence[str] = (),
        triton_kernels: str | None = None,
        native_cpu: tuple[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Define the operators, register their fake and Triton kernels, and record the available backends.

        Args:
            name: Name of the op, and prefix of the names of its operators.
            fake_forward: Function that returns empty results of `<name>_fwd`, for tracing. Its type annotations give
                the schema of the operator. None if the op needs no operators.
            fake_backward: The same for `<name>_bwd`; None if the op has no gradients.
            schemas: Schemas of `<name>_fwd` and `<name>_bwd`; None takes the schema from the type annotations.
            torch_devices: Device types on which PyTorch's own kernel supports the op and is faster than the reference.
            triton_kernels: Module with `<name>_fwd` and `<name>_bwd`; imported only if Triton can run.
            native_cpu: For an op whose native CPU implementation is Python code: the module with `<name>_fwd` and
                `<name>_bwd`, and the signatures, by name, of the compiled functions that it calls.
        """
        self.name = name
        self.forward, self.backward = (
            {
                backend: define_operator(library, f"{name}_{suffix}", fake, schema)
                for backend, library in (("native", NATIVE), ("triton", TRITON))
                if fake is not None
            }
            for suffix, fake, schema in zip(("fwd", "bwd"), (fake_forward, fake_backward), schemas, strict=True)
        )
        if native_cpu is not None:
            module, parts = native_cpu
            for part, signature in parts.items():
                NATIVE.define(part + signature)
            if all(_has_native_kernel(part, "CPU") for part in parts):
                self._plug_in(NATIVE, module, "CPU")
        inference = bool(self.forward and not self.backward)
        self.backends: dict[str, tuple[str, ...]] = {}
        (INFERENCE_BACKENDS if inference else BACKENDS)[name], MISSING[name] = self.backends, {}
        keys = {"cpu": "CPU"} if inference else {"cpu": "CPU", "cuda": "CUDA"}  # no inference op is for GPUs
        for device, key in keys.items():
            present, missing = [], MISSING[name]
            if self.forward and _has_native_kernel(f"{name}_fwd", key) and not COMPILED_MODULES[device]:
                present.append("native")
            else:
                missing["native", device] = (self.forward and COMPILED_MODULES[device]) or "not implemented"
            if triton_kernels is None or WHY_NO_TRITON[device]:
                missing["triton", device] = WHY_NO_TRITON[device] if triton_kernels else "not implemented"
            else:
                self._plug_in(TRITON, triton_kernels, key)
                present.append("triton")
            if device in torch_devices:
                present.append("torch")
            present.append("reference")
            if device == "cpu" and "triton" in present:  # the slow interpreter is for tests, so prefer all others
                present.remove("triton")
                present.append("triton")
            left_out = [backend for backend in present if f"{name}.{backend}" in EXCLUDED and backend != "reference"]
            missing.update({(backend, device): "excluded by FASTSSL_EXCLUDE" for backend in left_out})
            self.backends[device] = tuple(backend for backend in present if backend not in left_out)

    def _plug_in(self, library: torch.library.Library, module: str, key: str) -> None:
        """Register `<name>_fwd` and `<name>_bwd` of a Python module as kernels for a dispatch key."""
        for operator in (f"{self.name}_fwd", f"{self.name}_bwd"):
            library.impl(operator, getattr(importlib.import_module(module), operator), key)

    def choose(self, x: Tensor, backend: str | None, unsupported: Mapping[str, str | None] | None = None) -> str:
        """Choose the backend for a call. Under `torch.func`'s transforms and forward-mode AD, it is the reference.

        Args:
            x: A tensor of the call; its device decides which backends are available.
            backend: Backend that the caller requests. None uses FASTSSL_BACKEND if it is set, otherwise the first
                available backend that supports the arguments.
            unsupported: Backend -> reason why it does not support the arguments of this call, None if it does.

        Returns:
            Name of the backend.

        Raises:
            UnavailableBackendError: The requested backend is not available for this op and device, or does not support
                the arguments.
        """
        unsupported = _TRANSFORMED if is_transformed() else unsupported or {}
        present = self.backends.get(x.device.type, ("reference",))
        wish = backend or DEFAULT_BACKEND
        if wish is None:
            return next(name for name in present if unsupported.get(name) is None)
        why = unsupported.get(wish)
        if wish in present and why is None:
            return wish
        why = why or MISSING[self.name].get((wish, x.device.type)) or "the op has no such backend"
        usable = ", ".join(name for name in present if unsupported.get(name) is None)
        raise UnavailableBackendError(
            f"backend={wish!r}: not available for {self.name} on {x.device.type} ({why}); available: {usable}"
        )


def check_excluded() -> None:
    """Check the names in FASTSSL_EXCLUDE, once all ops exist.

    Raises:
        ValueError: A name is not that of an op and of a backend other than the reference.
    """
    known = {f"{op}.{backend}" for op in BACKENDS | INFERENCE_BACKENDS for backend in ("native", "triton", "torch")}
    for name in EXCLUDED:
        if name not in known:
            raise ValueError(
                f"FASTSSL_EXCLUDE: {name!r} is no kernel; expected names such as varlen_attention.triton, with commas "
                "between them"
            )


def define_operator(
    library: torch.library.Library, name: str, fake: Callable[..., Any], schema: str | None = None
) -> torch._ops.OpOverload:
    """Define an operator; its kernels are registered elsewhere.

    Args:
        library: `NATIVE` or `TRITON`.
        name: Name of the operator.
        fake: Function that returns empty results of the right shapes and dtypes, for tracing.
        schema: Schema such as "(Tensor x) -> Tensor"; None infers it from the annotations of `fake`.

    Returns:
        The operator, as a callable.
    """
    library.define(name + (schema or torch.library.infer_schema(fake, mutates_args=())))
    torch.library.register_fake(f"{library.ns}::{name}", fake)
    operator: torch._ops.OpOverload = getattr(getattr(torch.ops, library.ns), name).default
    return operator


def _has_native_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastssl_native::{name}", key))


def contiguous(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Make every tensor among the arguments contiguous, because kernels do not handle strides."""
    return tuple([x.contiguous() if isinstance(x, Tensor) else x for x in arguments])


def autocast_off(x: Tensor) -> AbstractContextManager[None]:
    """Return a context that disables autocast on the device of `x`; it does nothing if autocast is off already."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def norms_stay_wide(x: Tensor) -> bool:
    """Return whether autocast on the device of `x` computes layer norms in fp32 and widens sums: on CUDA only.

    There, the frames that a layer norm returns are in fp32, and so is a residual that they become. On the CPU, layer
    norms and sums keep the dtype of their input.
    """
    return x.device.type == "cuda" and torch.is_autocast_enabled("cuda")


def to_autocast_dtype(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast tensors to autocast's dtype if autocast is enabled on the device of the first tensor; None stays None."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(_copies(tensors, [dtype] * len(tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(grad, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True) if grad is not None]
        cast = iter(_copies([grad for grad, _ in given], [dtype for _, dtype in given]))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _copies(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast one or more tensors of the same device; on a GPU in one launch, and their gradients in another.

    A tensor that has the dtype is returned as it is. The compiler joins casts itself.
    """
    if tensors[0].device.type == "cpu" or torch.compiler.is_compiling() or is_transformed():
        return [tensor.to(dtype) for tensor in tensors]
    others = [tensor for tensor in tensors if tensor.dtype != dtype]
    cast = iter(_CastTogether.apply(dtype, *others) if others else ())
    return [tensor if tensor.dtype == dtype else next(cast) for tensor in tensors]
