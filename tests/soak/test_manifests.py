"""Damaged manifests: the good lines are read, and each bad line, or the whole manifest, is reported by name."""

from pathlib import Path

from tests.data.damage import run_damaged
from tests.soak.conftest import Count


def test_damaged_manifests_are_read_or_named(tmp_path: Path, count: Count, seed: int) -> None:
    outcomes = run_damaged(tmp_path, count=count(300), seed=seed)  # fails at the first that is neither
    print(dict(outcomes))
    assert outcomes.total() == count(300)
    assert outcomes["opened"]
    assert outcomes["refused"]
