"""What every op test runs under: uninitialised memory is NaN, so a kernel that leaves an element unwritten is caught."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
