"""Run programs in several trees of the package: this checkout, and another commit or checkout."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
#: Environment variable of the programs: version of dropout's random draws.
RANDOMNESS = "SAME_BITS_RANDOMNESS"
_COMPILED = ("*.so", "_build_report.json")


class Tree:
    """A folder in which Python imports the package of one checkout and the benchmarks of this checkout.

    Args:
        name: Name for messages.
        checkout: Folder that contains `fastssl/`.
        folder: Folder to create; programs run in it.
    """

    def __init__(self, name: str, checkout: Path, folder: Path) -> None:
        self.name = name
        self.folder = folder
        folder.mkdir()
        (folder / "fastssl").symlink_to(checkout.resolve() / "fastssl")
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        #: Version of dropout's random draws in all programs; None is the newest of the tree.
        self.randomness: int | None = None

    def newest_randomness(self) -> int | None:
        """Return the newest version of dropout's random draws that the tree knows; None if it knows none."""
        path = self.folder / "fastssl" / "kernels" / "randomness.py"
        found = re.search(r"^RANDOMNESS = (\d+)$", path.read_text(), re.MULTILINE) if path.exists() else None
        return None if found is None else int(found[1])

    def start(self, *arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Start `python -m ARGUMENTS` with one thread, and write its output to the file `log`."""
        # Waiting threads must not spin: the other tree needs the cores.
        settings = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
        if self.randomness is not None:
            settings[RANDOMNESS] = str(self.randomness)
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *map(str, arguments)],
                cwd=self.folder,
                env=os.environ | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, *arguments: str | Path, log: Path) -> None:
        """Run `python -m ARGUMENTS`, wait for it to end, and write its output to the file `log`.

        Raises:
            RuntimeError: The program fails; the message ends with the last 3000 characters of its output.
        """
        finish(self.start(*arguments, log=log), f"{self.name}: {' '.join(map(str, arguments))}", log)


def finish(process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    """Wait for a process; kill it if waiting is interrupted.

    Args:
        process: Process to wait for.
        what: Description of the process for the error message.
        log: File with its output.

    Raises:
        RuntimeError: The exit status is not 0; the message ends with the last 3000 characters of the output.
    """
    try:
        status = process.wait()
    except BaseException:
        process.kill()
        raise
    if status != 0:
        raise RuntimeError(f"{what}: exit status {status}\n{log.read_text(errors='replace')[-3000:]}")


def check_out(commit: str, folder: Path, *, modules: Path | None) -> None:
    """Write a commit's files and its compiled modules into a folder.

    The compiled modules are copied from `modules` if given, or from this checkout if its sources are the same.
    Otherwise they are built.

    Args:
        commit: Commit to write.
        folder: Folder to write to.
        modules: Folder with compiled modules of the commit.

    Raises:
        ValueError: Git does not know the commit, or `modules` contains no compiled module.
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
    """Return a SHA-256 hash of all files that determine the compiled modules of a checkout."""
    digest = hashlib.sha256()
    for folder in ("csrc", "_build"):
        for path in sorted((checkout / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(checkout)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
