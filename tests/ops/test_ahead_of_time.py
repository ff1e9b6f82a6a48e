"""Test Triton kernels compiled for six GPUs (none is needed): shared memory must fit, registers must not spill."""

from pathlib import Path
from typing import NamedTuple

import pytest

import fastssl.kernels
from tests.ops.ahead_of_time import SHARED_BYTES, TURING, Compiled, compiled

pytest.importorskip("triton", reason="Triton is not installed")

OPS = tuple(sorted(path.parent.name for path in Path(fastssl.kernels.__file__).parent.glob("*/triton_kernel.py")))

#: Cases that need the most shared memory of their op on GPUs that have 99 KiB per block.
DEMANDING = [("strided_conv", "front end, layer norm, float32"), ("varlen_attention", "bfloat16, E=128")]


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
    Allowance("strided_conv", "", (80,), 8, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "front end, layer norm, bfloat16", (100,), 104, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "front end, layer norm, float16", (90, 100), 104, "as with bfloat16, 8 on sm_90"),
    Allowance("strided_conv", "front end, layer norm, float32", (80, 90, 100), 48, "not meant to be fast"),
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
    assert case.spilled <= allowed, f"spills more than {allowed} bytes per thread: {case}"
    assert case.fits, f"too much shared memory: {case}"


@pytest.mark.parametrize("op", OPS)
def test_each_kernel_on_hopper(op: str) -> None:
    cases = [case for case in compiled(OPS, (90,), one_per_kernel=True) if case.op == op]
    assert cases
    for case in cases:
        check(case)


@pytest.mark.parametrize(("op", "label"), DEMANDING)
def test_blocks_fit_into_the_shared_memory_of_small_gpus(op: str, label: str) -> None:
    cases = compiled((op,), (86,), case=label)
    assert cases
    for case in cases:
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize("op", OPS)
def test_every_case(op: str, architecture: int) -> None:
    for case in compiled((op,), (architecture,)):
        check(case)


@pytest.mark.slow
def test_turing_is_not_supported_because_products_use_no_tensor_cores() -> None:
    cases = [
        case
        for case in compiled(("varlen_attention",), (TURING,), one_per_kernel=True)
        if case.kernel != "_reduce_bias_kernel"  # it has no products
    ]
    assert cases
    assert not any(case.products for case in cases)
    assert min(case.spilled for case in cases) > 1000
