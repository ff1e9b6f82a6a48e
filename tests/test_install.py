"""Install the package in the five supported ways, each in a real virtual environment.

These tests download torch, so they are marked slow: run `pytest -m slow tests/test_install.py`.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_build import ROOT, copy_sources

pytestmark = pytest.mark.slow

BUILD_LIMIT_S = 120

#: Program that reports what was installed, and that it works. It runs in the environment, outside the source tree.
REPORT = """
import json
from importlib.metadata import distribution
from pathlib import Path
import torch, fastssl
from fastssl.ops import integrate_and_fire
from fastssl.kernels.dispatch import BACKENDS, COMPILED_MODULES, MISSING
from fastssl.packing import Layout
out, _ = integrate_and_fire(torch.ones(6, 2), torch.full((6,), 0.5), Layout.from_lengths([6]))
assert torch.equal(out, torch.ones(3, 2))
try:
    from fastssl import _host
except ImportError:
    _host = None
print(json.dumps({
    "cpu": list(BACKENDS["integrate_and_fire"]["cpu"]),
    "reasons": COMPILED_MODULES,
    "host": _host is not None,
    "torch": torch.__version__,
    "folder": str(Path(fastssl.__file__).parent),
    "wheel": distribution("fastssl-speech").read_text("WHEEL"),
}))
"""


class Environment:
    """Fresh virtual environment."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.folder = folder

    def run(self, *arguments: str | Path, **variables: str) -> str:
        """Run the environment's Python, and return its standard output and error."""
        done = subprocess.run(
            [self.folder / "bin" / "python", *arguments],
            cwd=self.folder,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def install(self, *arguments: str | Path, **variables: str) -> str:
        """Run `pip install -v`; `-v` makes pip show the packages and messages of the build too."""
        began = time.monotonic()
        log = self.run("-m", "pip", "install", "-v", *arguments, **variables)
        print(f"pip install {' '.join(map(str, arguments))}: {time.monotonic() - began:.0f} s")
        return log

    def report(self) -> dict[str, Any]:
        """Run `REPORT` and return its answers."""
        found: dict[str, Any] = json.loads(self.run("-c", REPORT).splitlines()[-1])
        return found


def installed(log: str) -> set[str]:
    """Return the names of all packages that pip installed, including those in isolated build environments."""
    found = re.findall(r"Successfully installed (.+)", log)
    return {package.rpartition("-")[0] for line in found for package in line.split()}


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("with_torch"))
    environment.install("-c", ROOT / "constraints.txt", "torch", "numpy", "safetensors")
    return environment


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_sources(tmp_path / "tree")


def test_with_torch(with_torch: Environment, tree: Path) -> None:
    began = time.monotonic()
    log = with_torch.install("--force-reinstall", "--no-deps", tree)
    assert time.monotonic() - began < BUILD_LIMIT_S
    assert installed(log) == {"setuptools", "ninja", "pybind11", "fastssl-speech"}
    found = with_torch.report()
    assert found["cpu"][0] == "native"
    assert found["host"]
    assert found["reasons"]["cpu"] == ""


def test_without_isolation(with_torch: Environment, tree: Path) -> None:
    with_torch.install("setuptools>=77", "ninja", "pybind11")
    log = with_torch.install("--force-reinstall", "--no-deps", "--no-build-isolation", tree)
    assert installed(log) == {"fastssl-speech"}
    found = with_torch.report()
    assert found["cpu"][0] == "native"
    assert found["host"]


def test_editable(with_torch: Environment, tree: Path) -> None:
    with_torch.install("--force-reinstall", "--no-deps", "-e", tree)
    found = with_torch.report()
    assert found["cpu"][0] == "native"
    assert found["folder"] == str(tree / "fastssl")
    # A second build without compiled modules must remove those of the first build.
    with_torch.install("--force-reinstall", "--no-deps", "-e", tree, FASTSSL_SKIP_EXT="1")
    found = with_torch.report()
    assert found["cpu"] == ["reference"]
    assert "FASTSSL_SKIP_EXT" in found["reasons"]["cpu"]
    assert not found["host"]


def test_without_a_compiler(with_torch: Environment, tree: Path) -> None:
    stale = tree / "build" / "lib" / "fastssl" / "_C_cpu.abi3.so"  # left by an earlier build; must not be shipped
    stale.parent.mkdir(parents=True)
    stale.write_text("not even a library")
    path = str(with_torch.folder / "bin")
    log = with_torch.install("--force-reinstall", "--no-deps", tree, PATH=path)
    assert "built without its cpu module: no C++ compiler" in log
    assert installed(log) == {"setuptools", "fastssl-speech"}
    found = with_torch.report()
    assert "Tag: py3-none-any" in found["wheel"]
    assert found["cpu"] == ["reference"]
    assert "no C++ compiler" in found["reasons"]["cpu"]


def test_a_required_module_that_cannot_be_built_is_an_error(with_torch: Environment, tree: Path) -> None:
    (tree / "csrc" / "integrate_and_fire" / "cpu.cpp").write_text("#error broken on purpose\n")
    log = with_torch.install("--force-reinstall", "--no-deps", tree, FASTSSL_SKIP_CUDA="1")
    assert "built without its cpu module: compilation failed" in log
    assert with_torch.report()["cpu"] == ["reference"]
    with pytest.raises(AssertionError, match=r"cpu is required: compilation failed: .*broken on purpose"):
        with_torch.install("--force-reinstall", "--no-deps", tree, FASTSSL_REQUIRE_EXT="cpu", FASTSSL_SKIP_CUDA="1")


def test_without_torch(tmp_path: Path, tree: Path) -> None:
    environment = Environment(tmp_path / "without_torch")
    environment.install(tree, PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    found = environment.report()
    assert found["cpu"][0] == "native"
    assert found["host"]
