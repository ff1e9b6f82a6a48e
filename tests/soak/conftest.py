"""Give the soak tests their count and their seed: `pytest -m slow tests/soak -s --count 2000 --seed 1`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.conftest import make_config

__all__ = ["make_config"]  # a fixture

Count = Callable[[int], int]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Count:
    """Return a function from a test's default number of cases to the number asked for."""
    given: int | None = request.config.getoption("--count")
    return lambda default: default if given is None else given


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    value: int = request.config.getoption("--seed")
    return value


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Forks of a process whose threads have started would wait for them."""
