"""Two trees of the package beside each other: this checkout, and another commit or checkout."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_COMPILED = ("*.so", "_build_report.json")


class Tree:
    """A package, and a folder from which Python imports it together with the benchmarks of this checkout.

    Args:
        name: For messages.
        checkout: Folder that contains `fastssl/`.
        folder: Made here; programs run in it.
    """

    def __init__(self, name: str, checkout: Path, folder: Path) -> None:
        self.name = name
        self.folder = folder
        folder.mkdir()
        (folder / "fastssl").symlink_to(checkout.resolve() / "fastssl")
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")

    def start(self, *arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Start `python -m ARGUMENTS` with one thread, what it says going to a file."""
        # Threads that wait must not take the cores from the other tree.
        settings = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *map(str, arguments)],
                cwd=self.folder,
                env=os.environ | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, *arguments: str | Path, log: Path) -> None:
        """Run it to its end.

        Raises:
            RuntimeError: It fails; has the end of what it said.
        """
        finish(self.start(*arguments, log=log), f"{self.name}: {' '.join(map(str, arguments))}", log)


def finish(process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    """Wait for a process.

    Raises:
        RuntimeError: It fails.
    """
    try:
        status = process.wait()
    except BaseException:
        process.kill()
        raise
    if status != 0:
        raise RuntimeError(f"{what}: exit status {status}\n{log.read_text(errors='replace')[-3000:]}")


def check_out(commit: str, folder: Path, *, modules: Path | None) -> None:
    """Write a commit's files into a folder, with compiled modules.

    They are copied from `modules`, or from this checkout where both have the same sources, and built otherwise.

    Raises:
        ValueError: Git does not know the commit, or `modules` contains none.
    """
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        raise ValueError(f"{commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    if modules is None and sources_digest(folder) == sources_digest(ROOT):
        modules = ROOT / "fastssl"
    if modules is not None:
        found = [path for pattern in _COMPILED for path in modules.glob(pattern)]
        if not any(path.suffix == ".so" for path in found):
            raise ValueError(f"{modules}: contains no compiled module; run python setup.py build_ext --inplace")
        for path in found:
            shutil.copy(path, folder / "fastssl")
        return
    print(f"building the compiled modules of {commit}", file=sys.stderr)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"FASTSSL_SKIP_CUDA": "1", "FASTSSL_REQUIRE_EXT": "cpu"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def sources_digest(checkout: Path) -> str:
    """Of everything that decides what the compiled modules are."""
    digest = hashlib.sha256()
    for folder in ("csrc", "_build"):
        for path in sorted((checkout / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(checkout)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
