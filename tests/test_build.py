import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from _build import backend, extensions
from _build.extensions import CannotBuildError, Module, Torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("_build", "csrc", "fastssl", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "constraints.txt")
CUDA_TORCH = Torch(Path("/nowhere/torch"), "2.14.1+cu130", "13.0")


def copy_sources(target: Path) -> Path:
    """Copy the source tree without build products."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", extensions.REPORT)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=built)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return target


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SKIP_EXT", "SKIP_CUDA", "REQUIRE_EXT"):
        monkeypatch.delenv(f"FASTSSL_{name}", raising=False)
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def test_torch_is_asked_for_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # any program that exists
    assert backend.get_requires_for_build_wheel() == ["ninja", "pybind11>=2.13"]
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend.get_requires_for_build_editable() == ["ninja", "pybind11>=2.13", "torch>=2.10"]


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("CXX", "/nowhere/c++", "no C\\+\\+ compiler: /nowhere/c\\+\\+"), ("FASTSSL_SKIP_EXT", "1", "FASTSSL_SKIP_EXT")],
)
def test_nothing_is_asked_for_where_nothing_can_be_compiled(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend.get_requires_for_build_wheel() == []
    assert extensions.extensions() == []
    monkeypatch.setenv("FASTSSL_REQUIRE_EXT", "host")
    with pytest.raises(SystemExit, match=reason):
        extensions.extensions()


def test_required_modules_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_REQUIRE_EXT", "cpu, rocm")
    with pytest.raises(ValueError, match="FASTSSL_REQUIRE_EXT: rocm: not among cpu, cuda, host"):
        extensions.required_modules()


def test_torch_of_the_environment_is_found_although_it_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "find_spec", lambda name: None)  # as in an isolated build
    found = extensions.find_torch()
    assert found == Torch(Path(torch.__file__).parent, torch.__version__, torch.version.cuda)


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [("2.9.1", "'13.0'", None), ("2.10.0a0+git1", "None", "cpu"), ("3.0.0+cu140", "'14.0'", "cuda")],
)
def test_torch_is_read_from_its_version_file(
    version: str, cuda: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda}\n"
    )
    monkeypatch.setattr(extensions, "find_spec", lambda name: None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"platlib": tmp_path, "purelib": tmp_path})
    found = extensions.find_torch()
    assert found == (expected and Torch(tmp_path / "torch", version, "14.0" if expected == "cuda" else None))


def test_reasons_for_no_cuda_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotBuildError, match=r"torch 2\.14\.1\+cpu was built without CUDA"):
        extensions.find_cuda(Torch(Path("/nowhere"), "2.14.1+cpu", None))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(CannotBuildError, match=r"no CUDA toolkit: .*/bin/nvcc does not run"):
        extensions.find_cuda(CUDA_TORCH)
    script(tmp_path / "bin" / "nvcc", "echo Cuda compilation tools, release 12.4, V12.4.99")
    with pytest.raises(CannotBuildError, match=r"nvcc is of CUDA 12\.4, torch 2\.14\.1\+cu130 of CUDA 13\.0"):
        extensions.find_cuda(CUDA_TORCH)
    monkeypatch.setenv("FASTSSL_SKIP_CUDA", "1")
    with pytest.raises(CannotBuildError, match="FASTSSL_SKIP_CUDA is set"):
        extensions.find_cuda(CUDA_TORCH)


def test_toolkit_behind_a_wrapper_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder above the wrapper's is not the toolkit, so the build asks nvcc where the toolkit is."""
    toolkit = tmp_path / "toolkit"
    real = script(
        toolkit / "bin" / "nvcc",
        f'case "$*" in *--version*) echo "release 13.0, V13.0.88";; *--dryrun*) echo "#$ _HERE_={toolkit}/bin";; '
        '*--list-gpu-arch*) echo "compute_80 compute_90";; esac',
    )
    (toolkit / "lib").mkdir()
    (toolkit / "lib" / "libcudart.so.13").touch()
    wrapper = script(tmp_path / "path" / "nvcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}/bin")
    monkeypatch.setattr(extensions, "torch_architectures", lambda torch: ["9.0", "8.0", "12.0"])
    found = extensions.find_cuda(CUDA_TORCH)
    assert (found.nvcc, found.runtime) == (str(wrapper), toolkit / "lib" / "libcudart.so.13")
    # The compiler lacks torch's newest architecture, so PTX is added for the newest that it knows.
    assert found.architectures == "sm_80 sm_90 compute_90"
    monkeypatch.setattr(extensions, "torch_architectures", lambda torch: [])
    assert extensions.find_cuda(CUDA_TORCH).architectures == "sm_80 sm_90 compute_90"
    monkeypatch.setattr(extensions, "torch_architectures", lambda torch: ["12.0"])
    with pytest.raises(CannotBuildError, match=r"can compile for no GPU that torch 2\.14\.1\+cu130 runs on"):
        extensions.find_cuda(CUDA_TORCH)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_architectures_are_those_of_torch() -> None:
    found = extensions.find_torch()
    assert found is not None
    names = [f"sm_{name.replace('.', '')}" for name in extensions.torch_architectures(found)]
    assert names == [name for name in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", name)]
    assert names


def test_a_torch_that_cannot_be_asked_names_no_architectures(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")  # found before the one that is installed
    assert extensions.torch_architectures(Torch(tmp_path / "torch", "2.14.1", "13.0")) == []


def test_architectures_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a 12.0+PTX")
    flags = extensions.architecture_flags("nvcc", CUDA_TORCH)
    assert [flag.rpartition("=")[2] for flag in flags] == ["sm_86", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(CannotBuildError, match="TORCH_CUDA_ARCH_LIST: cannot read 'Hopper'"):
        extensions.architecture_flags("nvcc", CUDA_TORCH)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_one_module_that_fails_does_not_take_the_others_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder $HOME"  # a build file or a shell would split or expand this
    folder.mkdir()
    (folder / "good.cpp").write_text("int good() { return 1; }\n")
    (folder / "bad.cpp").write_text("int bad() { return missing; }\n")

    def module(name: str) -> Module:
        source = folder / f"{name}.cpp"
        return Module(f"_{name}", (source,), (*extensions.cxx(), "-fPIC", f"-I{folder}"), ("-MMD", "-MF"), ())

    monkeypatch.setattr(extensions, "cpu_module", lambda: module("good"))
    monkeypatch.setattr(extensions, "host_module", lambda: module("bad"))
    monkeypatch.setenv("FASTSSL_SKIP_CUDA", "1")
    libraries, reasons = extensions.compile_modules(folder / "out")
    assert libraries == {"cpu": folder / "out" / "_good.so"}
    assert libraries["cpu"].exists()
    assert reasons["cuda"] == "FASTSSL_SKIP_CUDA is set"
    assert "compilation failed" in reasons["host"]
    assert "missing" in reasons["host"]


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    subprocess.run(
        [sys.executable, "-c", "from _build import backend; backend.build_sdist('dist')"],
        cwd=tree,
        check=True,
        capture_output=True,
    )
    with tarfile.open(next(tree.glob("dist/*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        path.relative_to(tree) for folder in ("csrc", "_build", "fastssl") for path in tree.glob(f"{folder}/**/*")
    ]
    kinds = {".py", ".pyi", ".cpp", ".cu", ".h", ".yaml", ".typed"}
    missing = {str(path) for path in wanted if path.suffix in kinds} - names
    assert not missing
    assert {"constraints.txt", "pyproject.toml", "setup.py", "fastssl/py.typed"} <= names


def test_package_works_with_nothing_compiled(tmp_path: Path) -> None:
    """Without compiled modules every op runs its reference, and errors explain why other backends are missing."""
    tree = copy_sources(tmp_path)
    (tree / "fastssl" / extensions.REPORT).write_text(json.dumps({"cpu": "no C++ compiler", "cuda": "no nvcc"}))
    program = """
import json, torch, numpy
from fastssl.data.waveforms import pack_waveforms
from fastssl.ops import integrate_and_fire
from fastssl.kernels.dispatch import BACKENDS, MISSING
from fastssl.packing import Layout
x, weights, layout = torch.ones(6, 2), torch.full((6,), 0.5), Layout.from_lengths([6])
out, _ = integrate_and_fire(x, weights, layout)
assert torch.equal(out, torch.ones(3, 2))
assert pack_waveforms([numpy.ones(3, numpy.float32)], normalize=True).tolist() == [0, 0, 0]
try:
    integrate_and_fire(x, weights, layout, backend="native")
except ValueError as error:
    print(json.dumps([BACKENDS["integrate_and_fire"], MISSING["integrate_and_fire"]["native", "cuda"], str(error)]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, check=True, capture_output=True, text=True)
    present, why_not_cuda, error = json.loads(done.stdout)
    assert present == {"cpu": ["reference"], "cuda": ["reference"]}
    assert "no nvcc" in why_not_cuda
    assert "not available for integrate_and_fire on cpu" in error
    assert "no C++ compiler" in error


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["75", "80", "86", "90", "100", "120"])
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*/kernel.cu")), ids=lambda path: path.parent.name)
def test_cuda_kernels_do_not_spill(source: Path, architecture: str, tmp_path: Path) -> None:
    """Read the compiler's report on registers. Neither this nor compiling needs a GPU."""
    try:
        command = list(extensions.cuda_module().compile)
    except CannotBuildError as reason:
        pytest.skip(str(reason))
    command = [word for word in command if not word.startswith("-gencode")]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-cubin", "-Xptxas=-v"]
    done = subprocess.run([*command, source, "-o", tmp_path / "cubin"], check=True, capture_output=True, text=True)
    spills = [line.strip() for line in done.stderr.splitlines() if "spill" in line]
    assert spills
    assert {line.partition(",")[2] for line in spills} == {" 0 bytes spill stores, 0 bytes spill loads"}
