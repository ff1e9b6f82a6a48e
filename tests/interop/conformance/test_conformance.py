"""Test accelerated models like Transformers tests its own: every check on every architecture with every head.

    pytest -m slow tests/interop/conformance

runs all. The default suite runs each check on one model, another one for each.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.interop.conformance import calls, keeping, training
from tests.interop.conformance.cases import ONLY, Case, cases

CHECKS: list[Callable[[Case, Path], None]] = [*calls.CHECKS, *keeping.CHECKS, *training.CHECKS]
_STEP = 7  # has no factor in common with the number of cases, so that the sample has every head


def _all() -> Iterator[Any]:
    for number, check in enumerate(CHECKS):
        fitting = [case for case in cases() if case.trains or check not in training.CHECKS]
        fitting = [case for case in fitting if check.__name__ not in ONLY or ONLY[check.__name__](case)]
        for index, case in enumerate(fitting):
            marks = [] if index == number * _STEP % len(fitting) else [pytest.mark.slow]
            yield pytest.param(check, case, marks=marks, id=f"{check.__name__}, {case}")


@pytest.mark.filterwarnings("ignore:.*so the original code runs")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize(("check", "case"), list(_all()))
def test_an_accelerated_model_does_what_the_original_does(
    check: Callable[[Case, Path], None], case: Case, tmp_path: Path
) -> None:
    check(case, tmp_path)
