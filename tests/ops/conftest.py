"""Run every op test with several threads, and fill uninitialised memory with NaN to expose missing writes."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from tests.ops.triton_interpreter import repair_bfloat16

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    repair_bfloat16()


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Use at least two threads, even in workers with one, because kernels divide their work between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
