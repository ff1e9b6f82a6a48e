"""Test Triton kernels compiled for three GPUs (none is needed): shared memory must fit, registers must not spill."""

from pathlib import Path
from typing import NamedTuple

import pytest

import fastssl.kernels
from tests.ops.ahead_of_time import SHARED_BYTES, Compiled, compiled

pytest.importorskip("triton", reason="Triton is not installed")

OPS = tuple(sorted(path.parent.name for path in Path(fastssl.kernels.__file__).parent.glob("*/triton_kernel.py")))


class Allowance(NamedTuple):
    """Bytes per thread that an op's kernels may spill in cases whose label starts with `label`, and the reason."""

    op: str
    label: str
    architectures: tuple[int, ...]
    spilled: int
    why: str


ALLOWANCES = (
    Allowance("varlen_attention", "bfloat16", (80, 100), 144, "blocks are chosen for sm_90"),
    Allowance("varlen_attention", "float16", (80, 100), 144, "as with bfloat16"),
    Allowance("varlen_attention", "float32, E=64", (90, 100), 24, "no tensor cores, and not meant to be fast"),
    Allowance("varlen_attention", "float32, E=128", (80, 90, 100), 432, "as with E=64"),
    Allowance("varlen_attention", "TF32", (80,), 24, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "", (80,), 8, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "front end, layer norm, bfloat16", (100,), 104, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "front end, layer norm, float16", (90, 100), 104, "as with bfloat16, 8 on sm_90"),
    Allowance("strided_conv", "front end, layer norm, float32", (80, 90, 100), 96, "blocks are chosen for bf16"),
    Allowance("dropout_add_layer_norm", "D=8192", (80, 90, 100), 16, "wider than any speech encoder so far"),
)


def check(case: Compiled) -> None:
    allowed = max(
        (
            allowance.spilled
            for allowance in ALLOWANCES
            if allowance.op == case.op
            and case.label.startswith(allowance.label)
            and case.architecture in allowance.architectures
        ),
        default=0,
    )
    assert case.stack + case.local <= allowed, f"spills more than {allowed} bytes per thread: {case}"
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
