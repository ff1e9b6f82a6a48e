"""Which kernel runs: schemas, the compiled modules, and the choice of a backend.

Every op has a schema `fastssl_native::<op>_fwd/_bwd` (compiled C++ and CUDA) and `fastssl_triton::<op>_fwd/_bwd`;
kernels plug into them from optional modules. What exists is read once, here, into `BACKENDS`.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PACKAGE = Path(__file__).resolve().parent.parent
#: What brings a compiled module that was never built.
BUILD_IT = "run `pip install .` in a clone of the project"
_NATIVE = torch.library.Library("fastssl_native", "DEF")
_TRITON = torch.library.Library("fastssl_triton", "DEF")

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


class Schemas(NamedTuple):
    """What the kernels of an op have in common.

    Args:
        forward: Signature of `<name>_fwd`, such as "(Tensor x) -> Tensor".
        backward: Signature of `<name>_bwd`.
        fake_forward: Shapes of the forward, for tracing.
        fake_backward: Shapes of the backward.
    """

    forward: str
    backward: str
    fake_forward: Callable[..., Any]
    fake_backward: Callable[..., Any]


def _has_native_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastssl_native::{name}", key))


def define_op(
    name: str,
    *,
    schemas: Schemas | None = None,
    torch_devices: Sequence[str] = (),
    triton_kernels: str | None = None,
    native_cpu: tuple[str, Mapping[str, str]] | None = None,
) -> None:
    """Define the schemas of an op, register its fake and Triton kernels and note which kernels exist.

    Args:
        name: The op, which is the stem of both schemas.
        schemas: Of its kernels; None while no kernel is written.
        torch_devices: Device types on which PyTorch's own kernel serves the op and measures faster than the reference.
        triton_kernels: Module with `<name>_fwd` and `<name>_bwd`, imported only where Triton runs.
        native_cpu: Where the native CPU kernels are Python around compiled parts: the module with `<name>_fwd` and
            `<name>_bwd`, and the parts, name -> signature.
    """
    if schemas is not None:
        for namespace, library in (("fastssl_native", _NATIVE), ("fastssl_triton", _TRITON)):
            library.define(f"{name}_fwd{schemas.forward}")
            library.define(f"{name}_bwd{schemas.backward}")
            torch.library.register_fake(f"{namespace}::{name}_fwd", schemas.fake_forward)
            torch.library.register_fake(f"{namespace}::{name}_bwd", schemas.fake_backward)
    if native_cpu is not None:
        module_name, parts = native_cpu
        for part, signature in parts.items():
            _NATIVE.define(part + signature)
        if all(_has_native_kernel(part, "CPU") for part in parts):
            module = importlib.import_module(module_name)
            for stem in (f"{name}_fwd", f"{name}_bwd"):
                _NATIVE.impl(stem, getattr(module, stem), "CPU")
    BACKENDS[name], MISSING[name] = {}, {}
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        present, missing = [], MISSING[name]
        if schemas is not None and _has_native_kernel(f"{name}_fwd", key):
            present.append("native")
        else:
            missing["native", device] = (schemas and COMPILED_MODULES[device]) or "no kernel written"
        if triton_kernels is None or _WHY_NO_TRITON[device]:
            missing["triton", device] = _WHY_NO_TRITON[device] if triton_kernels else "no kernel written"
        else:
            module = importlib.import_module(triton_kernels)
            for stem in (f"{name}_fwd", f"{name}_bwd"):
                _TRITON.impl(stem, getattr(module, stem), key)
            present.append("triton")
        if device in torch_devices:
            present.append("torch")
        present.append("reference")
        if device == "cpu" and "triton" in present:  # the interpreter is for tests: on request only
            present.remove("triton")
            present.append("triton")
        BACKENDS[name][device] = tuple(present)


def define_native(name: str, signature: str, fake: Callable[..., Any]) -> None:
    """Define one more kernel that every compiled implementation of an op has, beside its forward and backward.

    Args:
        name: Of the kernel.
        signature: Such as "(Tensor x) -> Tensor".
        fake: Its shapes, for tracing.
    """
    _NATIVE.define(f"{name}{signature}")
    torch.library.register_fake(f"fastssl_native::{name}", fake)


def choose_backend(op: str, x: Tensor, backend: str | None, *, unsupported: dict[str, str] | None = None) -> str:
    """The backend that serves a call.

    Args:
        op: Name of the op.
        x: A tensor of the call; its device decides what is there.
        backend: The caller's wish; None takes FASTSSL_BACKEND, else the first backend that serves the call.
        unsupported: Backend -> why it does not serve the arguments of this call.

    Raises:
        ValueError: The backend asked for does not exist for this op, device and arguments.
    """
    unsupported = unsupported or {}
    present = BACKENDS[op].get(x.device.type, ("reference",))
    wish = backend or DEFAULT_BACKEND
    if wish is None:
        return next(name for name in present if name not in unsupported)
    if wish in present and wish not in unsupported:
        return wish
    why = unsupported.get(wish) or MISSING[op].get((wish, x.device.type)) or "there is no such backend for it"
    usable = ", ".join(name for name in present if name not in unsupported)
    raise ValueError(f"backend={wish!r}: not available for {op} on {x.device.type} ({why}); available: {usable}")
