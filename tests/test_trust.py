"""List all calls that could import, run, unpickle or download something, with the reason why each is safe."""

import ast
from collections import Counter
from pathlib import Path

import fastssl

PACKAGE = Path(fastssl.__file__).parent

#: Functions and methods that import, run, unpickle, load a library or download, directly or in another package.
METHODS = {
    *("CDLL", "Popen", "Pipe", "Unpickler", "check_call", "check_output", "deserialize_item", "download", "full_load"),
    *("from_pretrained", "getoutput", "import_module", "load", "load_all", "load_audio", "load_jsonl", "load_library"),
    *("open_best", "popen", "render", "run_module", "run_path", "snapshot_download", "spawn", "system", "to_jsonl"),
    *("unsafe_load",),
}
BUILTINS = {"__import__", "compile", "eval", "exec"}
#: Modules that the package must not import.
MODULES = {"jinja2", "marshal", "pickle", "runpy", "shelve", "subprocess"}

#: (file, call) -> number of calls, and why a file from an untrusted source cannot decide what they do.
PLACES = {
    ("cli/__init__.py", "importlib.import_module"): (1, "one of our own commands, from a fixed table"),
    ("cli/check/command.py", "import subprocess"): (1, "for the next entry"),
    ("cli/check/command.py", "subprocess.Popen"): (1, "this Python, with a module of our own"),
    ("cli/info.py", "importlib.import_module"): (1, "a constant"),
    ("data/audio.py", "plain.load_audio"): (1, "sources checked at any depth; only libsndfile opens the files"),
    ("data/manifest.py", "deserialize_item"): (1, "after the sources were checked"),
    ("data/synthetic.py", "ctypes.CDLL"): (1, "espeak-ng's library, from its installed package"),
    ("interop/classes.py", "importlib.import_module"): (1, "a module of Transformers or torchaudio, from fixed tables"),
    ("interop/hub.py", "snapshot_download"): (2, "a name that the user typed; only configs and weights"),
    ("interop/load.py", "hub.download"): (1, "a name that the user typed; others only from the local cache"),
    ("train/checkpoints.py", "hub.download"): (1, "a name that the user typed"),
    ("interop/load.py", "(ConformerEncoder if is_conformer else Encoder).from_pretrained"): (1, "safetensors"),
    ("interop/transformers.py", "importlib.import_module"): (1, "a module of Transformers, by a constant name"),
    ("models/pickled.py", "torch.load"): (1, "weights_only"),
    ("kernels/dispatch.py", "importlib.import_module"): (1, "a constant of one of our ops"),
    ("kernels/dispatch.py", "ctypes.CDLL"): (1, "compiled modules, from the package's folder"),
    ("kernels/gpus.py", "ctypes.CDLL"): (1, "the CUDA runtime, which torch has loaded"),
    ("kernels/dispatch.py", "torch.ops.load_library"): (1, "compiled modules, from the package's folder"),
    ("train/pretrain.py", "trainer.fit"): (
        1,
        "opens the run's checkpoint with torch.load, whose default is weights_only",
    ),
}


def _calls(path: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found.update(f"import {name}" for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            dangerous = METHODS | BUILTINS if isinstance(node.func, ast.Name) else METHODS
            last = name.rpartition(".")[2]
            if name == "trainer.fit" or (last in dangerous and not name.startswith("tl.")):
                found[name] += 1
    return found


def test_nothing_else_imports_runs_unpickles_or_fetches() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), call): number
        for path in sorted(PACKAGE.rglob("*.py"))
        for call, number in _calls(path).items()
    }
    assert found == {place: number for place, (number, _) in PLACES.items()}


def test_the_loads_are_restricted() -> None:
    for file, call in PLACES:
        if call == "torch.load":
            for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == call:
                    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                    assert options["weights_only"] == "True", f"{file}:{node.lineno}"
