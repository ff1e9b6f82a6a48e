"""Test the package's layers ("floors" in ARCHITECTURE.md): a module may import only from lower floors."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fastssl"
FLOORS = {
    "cli": 7,
    "train": 6,
    "eval": 5,
    "interop": 4,
    "models": 3,
    "nn": 2,
    "ops": 1.5,  # public functions on top of the kernels
    "kernels": 1,
    "data": 1,
    "metrics": 1,
    "packing": 0,
    "names": 0,
    "folder_lock": 0.5,
    "files": 0,
    "reading": 0.5,
    "regular": 0,
}
#: All that the kernels and modules need; other dependencies come with extras.
CORE_DEPENDENCIES = {"torch", "numpy", "safetensors", "fastssl"}
SOURCES = sorted(PACKAGE.rglob("*.py"))
#: Packages that are slow to import, so they are imported only inside the functions that use them.
HEAVY = {"torch._dynamo", "torch._inductor", "sympy", "lightning", "lhotse", "transformers", "torchaudio", "triton"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported_names(path: Path) -> set[str]:
    """Return all names that a file imports, anywhere in the file. Imports must be absolute."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; use an absolute one"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in FLOORS, f"{room} has no floor; add it to FLOORS as in ARCHITECTURE.md"
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] != "fastssl" or len(parts) < 2 or parts[1] == room or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] < FLOORS[room], f"{path}: {room} (floor {FLOORS[room]}) imports {name}"


def module_of(path: Path) -> str:
    return ".".join(("fastssl", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_imports_have_no_circle() -> None:
    """Includes imports within a floor or folder, and imports only for type checkers."""
    modules = {module_of(path): path for path in SOURCES}
    imports: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                imports[module] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom):
                # `from fastssl import ops` imports `fastssl.ops`, not `fastssl/__init__.py`.
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                imports[module] |= {name if name in modules else str(node.module) for name in whole} & modules.keys()
    assert circle(imports) is None


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) or ()) == {"b", "c"}


def test_importing_loads_nothing_heavy() -> None:
    """Modules that `import torch` loads do not count. GPUs are hidden: with a GPU, fastssl imports Triton at once.

    Nor does a look at a model's sizes before it is built: filling one on the meta device would import the compiler.
    """
    code = (
        "import sys, torch; before = set(sys.modules); import fastssl\n"
        "from fastssl.models import conformer, encoder, folder, skeleton\n"
        "shape = {'num_hidden_layers': 1, 'conv_dim': (8, 8)}\n"
        "waves = shape | {'conv_kernel': (10, 8), 'conv_stride': (5, 8)}\n"
        "for name in folder.MODEL_CLASSES:\n"
        "    config = encoder.EncoderConfig.from_dict(waves | {'model_type': name})\n"
        "    skeleton.skeleton(lambda: encoder.Encoder(config))\n"
        "for kind in ('average', 'strided', 'integrate-and-fire'):\n"
        "    config = conformer.ConformerConfig(**shape, compressor=kind)\n"
        "    skeleton.skeleton(lambda: conformer.ConformerEncoder(config))\n"
        "print(*sys.modules.keys() - before)"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, env=environment, check=True, capture_output=True, text=True
    )
    loaded = done.stdout.split()
    assert "fastssl.models.encoder" in loaded
    assert not [name for name in loaded if any(f"{name}.".startswith(f"{heavy}.") for heavy in HEAVY)]


def test_the_core_imports_core_dependencies_only() -> None:
    standard = __import__("sys").stdlib_module_names
    for path in SOURCES:
        if room_of(path) in ("files", "folder_lock", "packing", "kernels", "ops", "nn", "models"):
            outside = {name.split(".")[0] for name in imported_names(path)} - CORE_DEPENDENCIES - set(standard)
            outside -= {"typing_extensions"}  # only for type checkers
            if "triton" in path.stem:
                outside.discard("triton")  # imported only if it is installed
            if path.stem == "publish":
                outside.discard("huggingface_hub")  # imported only to upload
            assert not outside, f"{path} imports {outside}"


def test_op_folders_have_the_same_shape() -> None:
    for folder in (PACKAGE / "kernels").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            for name in ("__init__.py", "reference.py", "op.py", "README.md"):
                assert (folder / name).is_file(), f"{folder.name} has no {name}"
            assert (PACKAGE.parent / "tests" / "ops" / f"test_{folder.name}.py").is_file()


def test_no_function_hides_a_module() -> None:
    """A function named like a submodule would hide it, so `import package.module` could return the function."""
    for path in SOURCES:
        if path.name == "__init__.py":
            modules = {other.stem for other in path.parent.iterdir()} - {"__init__"}
            hidden = _imported_from_elsewhere(path) & modules
            assert not hidden, f"{path} hides its module {hidden}"


def _imported_from_elsewhere(path: Path) -> set[str]:
    """Return the names that a package's `__init__.py` imports from modules other than the package itself."""
    package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    imports = [node for node in parsed(path).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports if node.module != package for alias in node.names}


def test_training_knows_systems_only_from_their_table() -> None:
    """In `train/`, only `systems.py` names a system, its classes or its file; words in comments do not count."""
    from fastssl.train.systems import SYSTEMS

    names = {word for name in SYSTEMS for word in (name, name.replace("-", "_"))}
    names |= {one.__name__ for model in SYSTEMS.values() for one in (model, model.config_class)}
    names |= {model.__module__.rpartition(".")[2] for model in SYSTEMS.values()}
    assert "best_rq" in words_of("import fastssl.models.best_rq") & names
    for path in sorted((PACKAGE / "train").glob("*.py")):
        if path.name != "systems.py":
            found = words_of(path.read_text()) & names
            assert not found, f"{path} names {found}"


def words_of(source: str) -> set[str]:
    """Return the names and the words of strings in a source, except those of docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body.pop(0)
    return set(re.findall(r"[\w-]+", ast.unparse(tree)))
