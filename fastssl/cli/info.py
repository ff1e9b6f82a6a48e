"""`fastssl info`: show which kernels each op has, and why any is missing."""

import argparse
import importlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from fastssl.cli.installation import stranger_of_the_same_name
from fastssl.kernels import dispatch
from fastssl.kernels.gpus import gpus


def info(arguments: Sequence[str]) -> None:
    """Print versions, devices and the kernels of each op; only the core dependencies are needed.

    Args:
        arguments: The command's arguments, as typed: none, or --help.
    """
    argparse.ArgumentParser(
        prog="fastssl info", description="Show which kernels each op has on each device, and why any is missing."
    ).parse_args(list(arguments))
    import platform

    import torch

    import fastssl

    versions = [f"{name} {version(name)}" for name in ("torch", "triton", "numpy", "safetensors")]
    print(", ".join([f"python {platform.python_version()}", f"fastssl {fastssl.__version__}", *versions]))
    if (warning := stranger_of_the_same_name()) is not None:
        print(warning)
    print(f"CPU: {cpu_name()}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        names = [f"{gpu}: {torch.cuda.get_device_name(gpu.number)}" for gpu in gpus()]
        print(f"{', '.join(names)} ({_torch_build()})")
    else:
        print(f"GPU: none that torch can use (torch is built for {_torch_build()})")
    if dispatch.DEFAULT_BACKEND is not None:
        print(f"FASTSSL_BACKEND={dispatch.DEFAULT_BACKEND}")
    if dispatch.EXCLUDED:
        print(f"FASTSSL_EXCLUDE={','.join(dispatch.EXCLUDED)}")
    for device, reason in dispatch.COMPILED_MODULES.items():
        print(f"compiled module for {device}: {reason or 'loaded'}")
    print(f"compiled module for data workers: {_why_no_host_module() or 'loaded'}")
    for op, devices in (dispatch.BACKENDS | dispatch.INFERENCE_BACKENDS).items():
        print(f"\n{op}")
        for device, backends in devices.items():
            print(f"  {device}: {', '.join(backends)}")
            for (backend, place), reason in dispatch.MISSING[op].items():
                if place == device:
                    print(f"    no {backend}: {reason}")


def _why_no_host_module() -> str:
    """Return why NumPy does the work of `fastssl._host`; an empty text if that module is loaded."""
    try:
        importlib.import_module("fastssl._host")
    except ModuleNotFoundError:
        report = (
            Path(__file__).resolve().parent.parent / "_build_report.json"
        )  # what the installation left out, and why
        left_out = json.loads(report.read_text()) if report.exists() else {}
        return f"compiled module _host was not built: {left_out.get('host', dispatch.BUILD_IT)}"
    except ImportError as error:
        return f"_host cannot be loaded: {error}"
    return ""


def version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Return the name of the processor."""
    import platform

    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _torch_build() -> str:
    import torch

    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
