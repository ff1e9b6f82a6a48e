"""Test what the host does on a GPU: no mixed devices or dtypes, the recorded waits only, launches within a budget.

After a change that is meant to change launches or waits, `python -m tests.emulation.fake_cuda.run --record` writes the
new numbers to tests/emulation/budgets.json; patterns such as "train/wav2vec2/*" before the option limit it.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.emulation.fake_cuda import budgets, shims
from tests.emulation.fake_cuda.run import found_by

WHY_NOT = shims.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"a GPU cannot be pretended: {WHY_NOT}")

#: A scenario of each kind, for the default suite.
TRAINING = (
    "train/wav2vec2/tiny/none/bf16-mixed/*",
    "train/hubert/tiny/integrate-and-fire/bf16-mixed/ordinary",
    "train/wavlm/tiny/none/16-mixed/ordinary",
    "train/best-rq/tiny/none/32-true/ordinary",
    "train/distillation/tiny/integrate-and-fire/bf16-mixed/empty",
    "train/wav2vec2/tiny/integrate-and-fire/bf16-mixed/two processes",
    "encoder/wav2vec2/bf16-mixed",
    "encoder/wav2vec2 base*",
)
MODELS = (
    "accelerated/transformers/wavlm base/evaluation/bf16 autocast",
    "accelerated/transformers/hubert large/training/bf16 autocast",
    "accelerated/transformers/wavlm base/training/bf16 autocast, no lengths",
    "accelerated/transformers/sew base/training/bf16 autocast",
    "accelerated/transformers/conformer base/evaluation/bf16 autocast",
    "accelerated/torchaudio/wav2vec2 base/evaluation/bf16 autocast",
    "loop/extract/wav2vec2 compressed",
    "fit/wav2vec2/bf16-mixed",
)
#: Groups of scenarios that run in one process each; together, all of them.
GROUPS = (
    *(f"train/{system}/*" for system in ("wav2vec2", "hubert", "wavlm", "best-rq", "distillation")),
    "encoder/*",
    *(
        f"accelerated/{library}/*/{mode}/*"
        for library in ("transformers", "torchaudio")
        for mode in ("eval*", "train*")
    ),
    "accelerated/validate/*",
    "loop/*",
    "fit/*",
    "graphs/*",
)


#: The most launches of a step or a forward pass; the records themselves may only be lower.
LIMITS = {
    "train/wav2vec2/base/none/bf16-mixed/ordinary": 620,
    "train/wav2vec2/tiny/none/bf16-mixed/ordinary": 400,
    "train/wav2vec2/tiny/integrate-and-fire/bf16-mixed/ordinary": 600,
    "encoder/wav2vec2 base/bf16-mixed": 190,
    "encoder/wav2vec2 base, 2 layers, integrate-and-fire/bf16-mixed": 170,
}


def faults(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what is wrong with each scenario that has a fault."""
    recorded = budgets.read()
    said = {
        name: [
            *of["error"].splitlines()[-3:],
            *of["problems"],
            *(f"memory is not page-locked at {place}" for place in of["pageable"]),
            *(f"a second batch needs another variant of {variant}" for variant in of["new_variants"]),
            *(f"{output} is {dtype}" for output, dtype in of["notes"].get("different dtypes", {}).items()),
            *budgets.broken(name, of, recorded),
        ]
        for name, of in found.items()
    }
    return {name: lines for name, lines in said.items() if lines}


@pytest.mark.parametrize("patterns", [TRAINING, MODELS], ids=["training", "models"])
def test_one_scenario_of_each_kind(patterns: tuple[str, ...]) -> None:
    found = found_by(*patterns)
    assert len(found) >= len(patterns)
    assert faults(found) == {}


def test_records_are_within_the_limits() -> None:
    recorded = budgets.read()
    assert {name: most for name, most in LIMITS.items() if sum(recorded[name]["launches"].values()) > most} == {}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", GROUPS)
def test_every_scenario(pattern: str) -> None:
    assert faults(found_by(pattern)) == {}
