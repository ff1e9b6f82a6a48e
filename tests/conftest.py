"""Define the options, markers and fixtures that all tests share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Read when torch loads OpenMP: waiting threads then sleep. By default they spin, and take the core of another worker.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when fastssl is imported: Triton kernels run on the CPU
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Divide the cores among the workers, and among the processes that tests start.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    # Spare each later garbage collection the half second that it takes to visit all modules that tests have imported.
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--speech", type=Path, help="folder of recordings to test on, instead of synthesised speech")
    parser.addoption("--count", type=int, help="number of cases of each soak test, instead of its default")
    parser.addoption("--seed", type=int, default=0, help="seed of the soak tests")


@pytest.fixture(autouse=True)
def exact_convolutions_on_a_gpu() -> Iterator[None]:
    """Compute fp32 convolutions in full fp32 on a GPU, where TF32 is the default: tolerances are those of fp32.

    So too where compiled kernels run in the emulator of `tests.emulation.ptx.plugin`, which needs TRITON_INTERPRET=0.
    """
    compiled = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "0"
    torch.backends.cudnn.allow_tf32 = not compiled
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(scope="session")
def speech_folder(request: pytest.FixtureRequest) -> Path:
    """Return a folder of speech recordings: the one given with `--speech`, otherwise the spoken corpus."""
    folder: Path | None = request.config.getoption("--speech")
    return folder or request.getfixturevalue("spoken_corpus")


@pytest.fixture(scope="session")
def spoken_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two minutes of synthetic speech by four speakers, with `utterances.tsv`; shared, so do not change it."""
    pytest.importorskip("espeakng_loader", reason="espeakng_loader is not installed")
    from fastssl.data.synthetic import speak_corpus

    return speak_corpus(tmp_path_factory.mktemp("corpus") / "spoken", minutes=2, seed=0, speakers=4)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make fourteen recordings of 1 to 4 s."""
    from tests.tiny import write_recording

    folder = tmp_path_factory.mktemp("recordings")
    for index in range(14):
        write_recording(folder / f"speaker{index % 3}" / f"{index:02d}.wav", 1.0 + 3.0 * index / 13, seed=index)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: decoding processes need the cores too, and every process of a test must sum in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
