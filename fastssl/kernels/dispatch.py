"""What all ops share: their operators, the compiled modules, the choice of a backend, autocast and contiguity.

Each op defines `fastssl_native::<op>_fwd/_bwd` (compiled C++ and CUDA) and `fastssl_triton::<op>_fwd/_bwd`; optional
modules bring the kernels. Which kernels exist is recorded once, at import, in `BACKENDS`.
"""

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

_PACKAGE = Path(__file__).resolve().parent.parent
#: What brings a compiled module that was never built.
BUILD_IT = "run `pip install .` in a clone of the project"
NATIVE = torch.library.Library("fastssl_native", "DEF")
TRITON = torch.library.Library("fastssl_triton", "DEF")

#: op -> device type -> backends, the preferred one first.
BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {}
#: op -> (backend, device type) -> why it is missing, in words.
MISSING: dict[str, dict[tuple[str, str], str]] = {}


def _load_compiled_modules() -> dict[str, str]:
    """Load `_C_cpu` and `_C_cuda`; returns device type -> why there is no module, empty where there is one."""
    report = _PACKAGE / "_build_report.json"  # what the installation left out, and why
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
    return reasons


#: What FASTSSL_BACKEND asks for, read once: reading the environment inside a public function breaks fullgraph.
DEFAULT_BACKEND = os.environ.get("FASTSSL_BACKEND") or None
#: device type -> why the compiled module for it is missing ("" where it is loaded).
COMPILED_MODULES = _load_compiled_modules()


def _why_no_triton() -> dict[str, str]:
    """Device type -> why Triton kernels do not run there, empty where they do."""
    if importlib.util.find_spec("triton") is None:
        return dict.fromkeys(("cpu", "cuda"), "triton is not installed")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "cpu": "" if interprets else "Triton runs on the CPU in its interpreter only (TRITON_INTERPRET=1), for tests",
        "cuda": "" if torch.cuda.is_available() else "no CUDA device",
    }


_WHY_NO_TRITON = _why_no_triton()


class Op:
    """One op: its operators, the kernels that exist for them, and the choice of a backend for a call.

    Attributes:
        name: The op, which is the stem of its operators.
        forward: Backend -> operator `<name>_fwd`; empty while no kernel is written.
        backward: Backend -> operator `<name>_bwd`.
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
        """Define the operators, register their fake and Triton kernels, and record which kernels exist.

        Args:
            name: The op, which is the stem of its operators.
            fake_forward: Shapes of `<name>_fwd`, for tracing; its annotations are the schema.
            fake_backward: The same for `<name>_bwd`.
            schemas: Schemas of the two, where annotations cannot express them.
            torch_devices: Device types where PyTorch's own kernel serves the op and is faster than the reference.
            triton_kernels: Module with `<name>_fwd` and `<name>_bwd`, imported only where Triton runs.
            native_cpu: For native CPU kernels that are Python around compiled parts: the module with `<name>_fwd` and
                `<name>_bwd`, and the parts, name -> signature.
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
        BACKENDS[name], MISSING[name] = {}, {}
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            present, missing = [], MISSING[name]
            if self.forward and _has_native_kernel(f"{name}_fwd", key):
                present.append("native")
            else:
                missing["native", device] = (self.forward and COMPILED_MODULES[device]) or "no kernel written"
            if triton_kernels is None or _WHY_NO_TRITON[device]:
                missing["triton", device] = _WHY_NO_TRITON[device] if triton_kernels else "no kernel written"
            else:
                self._plug_in(TRITON, triton_kernels, key)
                present.append("triton")
            if device in torch_devices:
                present.append("torch")
            present.append("reference")
            if device == "cpu" and "triton" in present:  # the interpreter is for tests: on request only
                present.remove("triton")
                present.append("triton")
            BACKENDS[name][device] = tuple(present)

    def _plug_in(self, library: torch.library.Library, module: str, key: str) -> None:
        for operator in (f"{self.name}_fwd", f"{self.name}_bwd"):
            library.impl(operator, getattr(importlib.import_module(module), operator), key)

    def choose(self, x: Tensor, backend: str | None, unsupported: Mapping[str, str | None] | None = None) -> str:
        """Return the backend that serves a call.

        Args:
            x: A tensor of the call; its device decides which backends exist.
            backend: The caller's wish; None takes FASTSSL_BACKEND, else the first backend that serves the call.
            unsupported: Backend -> why it does not serve the arguments of this call, None where it does.

        Raises:
            ValueError: The requested backend does not exist for this op, device and arguments.
        """
        unsupported = unsupported or {}
        present = BACKENDS[self.name].get(x.device.type, ("reference",))
        wish = backend or DEFAULT_BACKEND
        if wish is None:
            return next(name for name in present if unsupported.get(name) is None)
        why = unsupported.get(wish)
        if wish in present and why is None:
            return wish
        why = why or MISSING[self.name].get((wish, x.device.type)) or "there is no such backend for it"
        usable = ", ".join(name for name in present if unsupported.get(name) is None)
        raise ValueError(
            f"backend={wish!r}: not available for {self.name} on {x.device.type} ({why}); available: {usable}"
        )


def define_operator(
    library: torch.library.Library, name: str, fake: Callable[..., Any], schema: str | None = None
) -> torch._ops.OpOverload:
    """Define an operator without kernels.

    Args:
        library: `NATIVE` or `TRITON`.
        name: Name of the operator.
        fake: Its shapes, for tracing.
        schema: Such as "(Tensor x) -> Tensor"; None infers it from the annotations of `fake`.
    """
    library.define(name + (schema or torch.library.infer_schema(fake, mutates_args=())))
    torch.library.register_fake(f"{library.ns}::{name}", fake)
    operator: torch._ops.OpOverload = getattr(getattr(torch.ops, library.ns), name).default
    return operator


def _has_native_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastssl_native::{name}", key))


def contiguous(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Make every tensor among the arguments of a kernel contiguous: kernels know no strides."""
    return tuple([x.contiguous() if isinstance(x, Tensor) else x for x in arguments])


def autocast_off(x: Tensor) -> AbstractContextManager[None]:
    """Return a context that keeps autocast on the device of `x` out of an op; where it is off already, one for free."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def to_autocast_dtype(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast tensors to the dtype of autocast where it is enabled, on the device of the first; None stays None."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if x is None else x.to(dtype) for x in tensors)
