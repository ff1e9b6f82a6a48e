"""Compile the two small libraries that a process with a pretended GPU needs, and say why that is impossible here."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

#: Environment variable that is set in a process that was started with the libraries; its value is their folder.
FOLDER = "FASTSSL_FAKE_CUDA"
_SOURCES = Path(__file__).parent
_LIBRARIES = {"engine.so": "engine.cpp", "libcuda.so.1": "libcuda.cpp"}


def why_not() -> str | None:
    """Return why no process of this machine can pretend to have a GPU, or None if one can."""
    import torch

    if sys.platform != "linux":
        return "libraries are preloaded on Linux only"
    if torch.version.cuda is None:
        return "PyTorch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if _compiler() else "no C++ compiler"


def environment(folder: Path) -> dict[str, str]:
    """Compile the libraries into a folder, and return the environment of a process that uses them.

    Args:
        folder: An empty folder, which must exist as long as the process runs.
    """
    compiler = _compiler()
    assert compiler is not None
    for library, source in _LIBRARIES.items():
        command = [
            compiler,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            str(_SOURCES / source),
            "-o",
            str(folder / library),
        ]
        subprocess.run(command, check=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTSSL_BACKEND")}
    return kept | {
        FOLDER: str(folder),
        "LD_PRELOAD": _before(folder / "engine.so", "LD_PRELOAD"),
        "LD_LIBRARY_PATH": _before(folder, "LD_LIBRARY_PATH"),
        "CUDA_VISIBLE_DEVICES": "",  # a real GPU would answer instead
        "OMP_NUM_THREADS": "1",
    }


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next((found for name in (*named[:1], "c++", "g++", "clang++") if (found := shutil.which(name))), None)


def _before(path: Path, variable: str) -> str:
    return ":".join(filter(None, (str(path), os.environ.get(variable))))
