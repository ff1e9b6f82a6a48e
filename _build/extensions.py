"""Compiles `csrc/`: `_C_cpu` and `_C_cuda` on the LibTorch stable ABI, and `_host` with pybind11.

A module that cannot be built is left out with a notice, since the package works without it; FASTSSL_REQUIRE_EXT turns
the notice into an error. The reasons also go into `fastssl/_build_report.json`, where `fastssl info` finds them.

`torch.utils.cpp_extension` is not used: the stable ABI needs torch's headers and libraries but no torch in this
process, so an isolated build can use the host's, and one ninja run builds all modules in parallel.
"""

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_TORCH = (2, 10)
MODULES = ("cpu", "cuda", "host")
#: Compute capabilities to compile for if TORCH_CUDA_ARCH_LIST is not set and torch does not say what it has code for.
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
REPORT = "_build_report.json"


@dataclass(frozen=True)
class Torch:
    """An installed torch, found without importing it."""

    folder: Path
    version: str
    cuda: str | None  # CUDA version it was built with, None for a CPU-only build


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit that fits the installed torch."""

    nvcc: str
    runtime: Path  # libcudart.so, whatever its version suffix
    architecture_flags: tuple[str, ...]

    @property
    def architectures(self) -> str:
        """What the flags ask for, as `fastssl.kernels.gpus` reads it: "sm_90" for machine code, "compute_90" for PTX."""
        return " ".join(flag.rpartition("=")[2] for flag in self.architecture_flags)


class CannotBuildError(Exception):
    """Why a module cannot be built, in words for the user."""


def find_torch() -> Torch | None:
    """The torch to build against: an importable one, else that of the environment that pip installs into.

    Inside an isolated build the second is hidden from `sys.path`, but `sysconfig` still knows where it is.
    """
    spec = find_spec("torch")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent.parent]
    paths = sysconfig.get_paths()
    folders += [Path(paths["platlib"]), Path(paths["purelib"]), Path(site.getusersitepackages())]
    version_folder = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if "VIRTUAL_ENV" in os.environ:  # uv builds in an environment of its own
        folders.append(Path(os.environ["VIRTUAL_ENV"], "lib", version_folder, "site-packages"))
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if configuration.exists() and re.search(r"system-site-packages\s*=\s*true", configuration.read_text()):
        system = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
        folders += [Path(system["platlib"]), Path(system["purelib"])]
    for folder in folders:
        version_file = folder / "torch" / "version.py"
        if version_file.exists():
            text = version_file.read_text()
            version = re.search(r"^__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", text, re.MULTILINE)
            cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
            if version and (int(version[2]), int(version[3])) >= MINIMUM_TORCH:
                return Torch(folder / "torch", version[1], cuda[1] if cuda else None)
    return None


def missing_prerequisite() -> str | None:
    """Why nothing at all can be compiled here, or None."""
    if os.environ.get("FASTSSL_SKIP_EXT", "0") not in ("", "0"):
        return "FASTSSL_SKIP_EXT is set"
    if not sys.platform.startswith("linux"):
        return f"compiled modules are built on Linux only, not on {sys.platform}"
    if shutil.which(cxx()[0]) is None:
        return f"no C++ compiler: {cxx()[0]} was not found (install g++, or set CXX)"
    return None


def cxx() -> list[str]:
    """The C++ compiler, a command line because CXX may hold options."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def required_modules() -> set[str]:
    """The modules that FASTSSL_REQUIRE_EXT names.

    Raises:
        ValueError: It names one that does not exist.
    """
    names = {name.strip() for name in os.environ.get("FASTSSL_REQUIRE_EXT", "").split(",")} - {""}
    if not names <= set(MODULES):
        raise ValueError(
            f"FASTSSL_REQUIRE_EXT: {', '.join(sorted(names - set(MODULES)))}: not among {', '.join(MODULES)}"
        )
    return names


def output_of(*command: str) -> str:
    """Standard output and error of a command, empty when it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def find_cuda(torch: Torch) -> CudaToolkit:
    """The toolkit to build `_C_cuda` with; no GPU is needed.

    Raises:
        CannotBuildError: There is none, or it does not fit the installed torch.
    """
    if os.environ.get("FASTSSL_SKIP_CUDA", "0") not in ("", "0"):
        raise CannotBuildError("FASTSSL_SKIP_CUDA is set")
    if torch.cuda is None:
        raise CannotBuildError(f"torch {torch.version} was built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if release is None:
        raise CannotBuildError(f"no CUDA toolkit: {nvcc} does not run")
    if release[1] != torch.cuda.split(".")[0]:
        raise CannotBuildError(f"nvcc is of CUDA {release[1]}.{release[2]}, torch {torch.version} of CUDA {torch.cuda}")
    # nvcc may be a wrapper script, so its folder says nothing: it names the real one itself.
    real = re.search(r"_HERE_=(.+)", output_of(nvcc, "--dryrun", "-x", "cu", "/dev/null"))
    top = Path(real[1].strip() if real else nvcc).parent
    bundled = torch.folder.parent / "nvidia" / f"cu{release[1]}"
    for folder in (top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib")), bundled / "lib"):
        runtimes = sorted(folder.glob("libcudart.so*"))
        if runtimes:
            return CudaToolkit(nvcc, runtimes[0], tuple(architecture_flags(nvcc, torch)))
    raise CannotBuildError(f"the CUDA toolkit in {top} has no libcudart.so")


def torch_architectures(torch: Torch) -> list[str]:
    """Compute capabilities that an installed torch has code for, such as 8.0; none if it cannot be asked."""
    program = "import torch; print(*torch._C._cuda_getArchFlags().split())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(torch.folder.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return [f"{major}.{minor}" for major, minor in re.findall(r"\bsm_(\d+)(\d)\b", done.stdout)]


def architecture_flags(nvcc: str, torch: Torch) -> list[str]:
    """Flags of nvcc for TORCH_CUDA_ARCH_LIST, else for what torch itself runs on, and PTX of the last for newer GPUs.

    Raises:
        CannotBuildError: The list holds something else than numbers such as 9.0, 9.0a or 10.0+PTX, or nvcc cannot
            compile for any of torch's GPUs.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        known = output_of(nvcc, "--list-gpu-arch").split()
        wanted = [
            name
            for name in torch_architectures(torch) or DEFAULT_ARCHITECTURES
            if f"compute_{name.replace('.', '')}" in known
        ]
        if not wanted:
            raise CannotBuildError(f"{nvcc} can compile for no GPU that torch {torch.version} runs on")
        wanted = sorted(set(wanted), key=float)
        wanted[-1] += "+PTX"
    flags = []
    for name in wanted:
        parts = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if parts is None:
            raise CannotBuildError(
                f"TORCH_CUDA_ARCH_LIST: cannot read {name!r}, expected numbers such as 9.0 or 10.0+PTX"
            )
        number = parts[1] + parts[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if parts[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@dataclass(frozen=True)
class Module:
    """One shared library: its sources and the command line that compiles one of them."""

    name: str
    sources: tuple[Path, ...]
    compile: tuple[str, ...]
    dependencies: tuple[str, ...]  # flags that make the compiler write a dependency file
    libraries: tuple[str, ...]


_GCC_DEPENDENCIES = ("-MMD", "-MF")
_STABLE_ABI = (
    "-DTORCH_STABLE_ONLY",
    f"-DTORCH_TARGET_VERSION=0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}" + "0" * 12,
)
# Without -fno-trapping-math a loop with a comparison of floats has control flow for AVX2 and is not vectorised.
_CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fno-trapping-math",
    "-DNDEBUG",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
)


def cpu_module() -> Module:
    """`_C_cpu`: kernels for the CPU."""
    torch = require_torch()
    include = ("-isystem", str(torch.folder / "include"))
    return Module(
        "_C_cpu",
        tuple(sorted(ROOT.glob("csrc/*/cpu*.cpp"))),
        (*cxx(), *_CXX_FLAGS, *_STABLE_ABI, *include),
        _GCC_DEPENDENCIES,
        (f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    )


def cuda_module() -> Module:
    """`_C_cuda`: kernels for the GPU."""
    torch = require_torch()
    cuda = find_cuda(torch)
    host = ("-ccbin", cxx()[0]) if "CXX" in os.environ else ()
    flags = ("-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--threads=2", "--expt-relaxed-constexpr", *host)
    libraries = (f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-lc10", str(cuda.runtime))
    include = ("-isystem", str(torch.folder / "include"))
    return Module(
        "_C_cuda",
        (ROOT / "csrc" / "common" / "cuda_architectures.cpp", *sorted(ROOT.glob("csrc/*/kernel.cu"))),
        (
            cuda.nvcc,
            *flags,
            f'-DFASTSSL_CUDA_ARCHITECTURES="{cuda.architectures}"',
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *cuda.architecture_flags,
            *_STABLE_ABI,
            *include,
        ),
        ("-MD", "-MF"),
        libraries,
    )


def host_module() -> Module:
    """`_host`: numpy arrays in data workers; needs no torch."""
    if find_spec("pybind11") is None:
        raise CannotBuildError("pybind11 is not installed")
    import pybind11

    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").exists():
        raise CannotBuildError(f"the headers of Python are not installed: no Python.h in {python}")
    includes = ("-isystem", python, "-isystem", pybind11.get_include())
    sources = tuple(sorted(ROOT.glob("csrc/host/*.cpp")))
    return Module("_host", sources, (*cxx(), *_CXX_FLAGS, *includes), _GCC_DEPENDENCIES, ())


def require_torch() -> Torch:
    """The torch to build against.

    Raises:
        CannotBuildError: There is none.
    """
    torch = find_torch()
    if torch is None:
        raise CannotBuildError(f"no torch >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} to build against")
    return torch


def ninja_file(modules: Sequence[Module]) -> str:
    """One build file for all modules; paths are relative to the folder it is in, or absolute."""

    def command(arguments: Sequence[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    def path(name: str | Path) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5"]
    for module in modules:
        dependencies = f"{command(module.dependencies)} $out.d"
        lines += [
            f"rule compile{module.name}",
            f"  command = {command(module.compile)} {dependencies} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"rule link{module.name}",
            f"  command = {command(cxx())} -shared $in {command(module.libraries)} -o $out",
        ]
        objects = []
        for source in module.sources:
            objects.append(f"{module.name}/{source.parent.name}_{source.stem}.o")
            lines.append(f"build {path(objects[-1])}: compile{module.name} {path(source)}")
        lines.append(f"build {module.name}.so: link{module.name} {' '.join(map(path, objects))}")
    return "\n".join(lines) + "\n"


def compile_modules(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Build what can be built in `folder`.

    Returns:
        Name in `MODULES` -> library, and name -> why it was not built.
    """
    modules, reasons = {}, {}
    for name, describe in (("cpu", cpu_module), ("cuda", cuda_module), ("host", host_module)):
        try:
            modules[name] = describe()
        except CannotBuildError as reason:
            reasons[name] = str(reason)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        return {}, {name: reasons.get(name, "ninja was not found (pip install ninja)") for name in MODULES}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(list(modules.values())))
    libraries = {}
    # One call for all, so that their sources compile in parallel; then one each, to learn which of them failed.
    subprocess.run([ninja, "-C", str(folder), "-k", "0"], check=False)
    for name, module in modules.items():
        target = f"{module.name}.so"
        again = subprocess.run(
            [ninja, "-C", str(folder), target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if again.returncode == 0:
            libraries[name] = folder / target
        else:
            reasons[name] = f"compilation failed: {first_error(again.stdout)}"
    return libraries, reasons


def first_error(log: str) -> str:
    """The line of a compiler's output that says most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")


class BuildExtensions(build_ext):
    """Compile with ninja, then put what there is where setuptools expects it."""

    extensions: list[Extension]
    reasons: dict[str, str]

    def run(self) -> None:
        """Build every module that can be built; leave the others out, with a notice."""
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        libraries, self.reasons = compile_modules(ROOT / "build" / f"ninja-{tag}")
        package = Path(self.get_finalized_command("build_py").get_package_dir("fastssl"))
        built = []
        for extension in self.extensions:
            name = extension.name.rpartition("_")[2]
            file_name = Path(self.get_ext_filename(extension.name)).name
            target = package / file_name if self.inplace else Path(self.build_lib, "fastssl", file_name)
            if name in libraries:
                target.parent.mkdir(parents=True, exist_ok=True)
                # A process that has the old file loaded keeps it; writing into it would crash that process.
                target.unlink(missing_ok=True)
                shutil.copy(libraries[name], target)
                built.append(extension)
        self.extensions = built
        missing = required_modules() & set(self.reasons)
        if missing:
            raise SystemExit(
                "\n".join(f"fastssl: {name} is required: {self.reasons[name]}" for name in sorted(missing))
            )


class BuildReport(Command):
    """Write down what was left out of the build, and why."""

    user_options: ClassVar[list[Any]] = []
    build_lib: str | None = None
    editable_mode = False

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """Write where the package is collected."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Write the report into the package, print it, and remove what it says is not there."""
        nothing = missing_prerequisite()
        extensions = self.get_finalized_command("build_ext")
        reasons = dict.fromkeys(MODULES, nothing) if nothing else extensions.reasons
        for name, reason in reasons.items():
            print(f"fastssl: built without its {name} module: {reason}", file=sys.stderr)
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in reasons:  # of an earlier build, in an editable installation
            for library in path.parent.glob(f"_*{name}.*so"):
                library.unlink()
        path.write_text(json.dumps(reasons, indent=1) + "\n")

    def _path(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib or "")) / "fastssl" / REPORT

    def get_source_files(self) -> list[str]:
        """None: the report is made, not copied."""
        return []

    def get_outputs(self) -> list[str]:
        """The report."""
        return [str(self._path())]

    def get_output_mapping(self) -> dict[str, str]:
        """Empty: the report is made, not copied."""
        return {}


class Build(build):
    """The usual build, then the report."""

    sub_commands: ClassVar[list[Any]] = [*build.sub_commands, ("build_report", None)]


def extensions() -> list[Extension]:
    """What setuptools is told to expect: nothing where nothing can be compiled, which makes a pure Python wheel."""
    nothing = missing_prerequisite()
    if nothing:
        if required_modules():
            raise SystemExit(f"fastssl: FASTSSL_REQUIRE_EXT is set, but {nothing}")
        return []
    # The first two hold no Python: "py_limited_api" only keeps the interpreter's version out of their names.
    return [
        Extension("fastssl._C_cpu", [], py_limited_api=True),
        Extension("fastssl._C_cuda", [], py_limited_api=True),
        Extension("fastssl._host", []),
    ]
