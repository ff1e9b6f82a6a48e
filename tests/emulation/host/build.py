"""Compile CUDA sources with a C++ compiler, against stand-ins for CUDA (`include/cuda_runtime.h`)."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from _build import extensions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
#: An index outside of an array and a misaligned load end the process; a local variable starts as a strange number.
_CHECKS = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-ftrivial-auto-var-init=pattern")
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")


def why_not() -> str | None:
    """Return why nothing can be compiled here, or None."""
    if (reason := extensions.missing_prerequisite()) is not None:
        return reason
    return None if extensions.find_torch() else "torch has no headers"


def compile_for_host(source: Path, folder: Path) -> Path:
    """Compile a CUDA source into a library that defines its operators as `fastssl_on_host::...`.

    Args:
        source: A `kernel.cu`. Headers that it includes may also lie where its own folder's are in `csrc/`.
        folder: Existing folder for object files and the library.

    Returns:
        The library, for `torch.ops.load_library`; it also has the C functions `set_order` and `set_guard`.
    """
    torch = extensions.require_torch()
    include = ("-isystem", str(torch.folder / "include"))
    kernels = ("-DTORCH_STABLE_ONLY", f"-I{HERE / 'include'}", "-include", "torch_on_host.h", "-x", "c++")
    beside = f"-I{ROOT / 'csrc' / source.parent.name}"
    library, objects = folder / "kernel_on_host.so", (folder / "kernel.o", folder / "guarded_memory.o")
    commands = (
        (*_FLAGS, *_CHECKS, *include, *kernels, beside, "-c", str(source), "-o", str(objects[0])),
        (*_FLAGS, *include, "-c", str(HERE / "guarded_memory.cpp"), "-o", str(objects[1])),
    )
    _run_together([[*extensions.cxx(), *command] for command in commands])
    link = (f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library))
    _run_together([[*extensions.cxx(), "-shared", *map(str, objects), _CHECKS[0], *link]])
    return library


def _run_together(commands: Sequence[Sequence[str]]) -> None:
    """Run commands at the same time; raise an AssertionError with the output of one that fails."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
