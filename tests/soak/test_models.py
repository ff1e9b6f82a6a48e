"""Damaged models: each loads, or is refused in a sentence that names it, within its size."""

from collections import Counter
from pathlib import Path

from tests.models.damage import damaged_models, good_models, outcome
from tests.soak.conftest import Count


def test_damaged_models_load_or_are_named(tmp_path: Path, count: Count, seed: int) -> None:
    good = tmp_path / "good"
    good.mkdir()
    good_models(good)
    kinds: Counter[bool] = Counter()
    for damage, path in damaged_models(good, tmp_path / "damaged", count=count(300), seed=seed):
        message = outcome(path)
        kinds[message == "loads"] += 1
        assert message == "loads" or str(path) in message, f"{damage}: {message}"
    print(f"{kinds[True]} load, {kinds[False]} are refused")
    assert kinds[True]
    assert kinds[False]
