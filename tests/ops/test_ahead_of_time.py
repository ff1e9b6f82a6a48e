"""Every Triton kernel compiled for three GPUs, none of which needs to be there: shared memory fits, nothing spills."""

from pathlib import Path

import pytest

import fastssl.ops
from tests.ops.ahead_of_time import SHARED_BYTES, Compiled, compiled

pytest.importorskip("triton", reason="Triton is not installed")

OPS = tuple(sorted(path.parent.name for path in Path(fastssl.ops.__file__).parent.glob("*/triton_kernel.py")))

#: (kernel, architecture) -> bytes per thread a kernel may spill, with the reason beside it
ALLOWED_SPILLS: dict[tuple[str, int], int] = {}


def check(case: Compiled) -> None:
    spilled, allowed = case.stack + case.local, ALLOWED_SPILLS.get((case.kernel, case.architecture), 0)
    assert spilled <= allowed, f"spills {spilled} bytes per thread, allowed {allowed}: {case}"
    assert case.shared <= SHARED_BYTES[case.architecture], f"too much shared memory: {case}"


@pytest.mark.parametrize("op", OPS)
def test_first_case_on_hopper(op: str) -> None:
    cases = [case for case in compiled(OPS, (90,), only_first=True) if case.op == op]
    assert cases
    for case in cases:
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize("op", OPS)
def test_every_case(op: str, architecture: int) -> None:
    for case in compiled((op,), (architecture,), only_first=False):
        check(case)
