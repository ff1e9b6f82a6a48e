"""Test Triton kernels compiled for six GPUs (none is needed): shared memory must fit, registers must not spill."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

import fastssl.kernels
from tests.ops.ahead_of_time import SHARED_BYTES, TURING, Compiled, compiled

pytest.importorskip("triton", reason="Triton is not installed")

OPS = tuple(sorted(path.parent.name for path in Path(fastssl.kernels.__file__).parent.glob("*/triton_kernel.py")))

#: Cases that need the most shared memory of their op on GPUs that have 99 KiB per block.
DEMANDING = [("strided_conv", "front end, layer norm, float32, TF32"), ("varlen_attention", "bfloat16, E=128")]


class Allowance(NamedTuple):
    """Bytes per thread that an op's kernels may spill in cases whose label matches `label`, and the reason.

    In `label`, "*" stands for any text.
    """

    op: str
    label: str
    architectures: tuple[int, ...]
    spilled: int
    why: str


#: GPUs whose tensor cores multiply from registers, warp by warp: the blocks are larger than suits them.
_SMALL_PRODUCTS = (80, 86, 89, 120)
_EXACT = "no tensor cores, not meant to be fast"
ALLOWANCES = (
    Allowance("varlen_attention", "bfloat16*", (*_SMALL_PRODUCTS, 100), 144, "blocks are chosen for sm_90"),
    Allowance("varlen_attention", "bfloat16, E=80, dropout and gated bias", (90,), 16, "all registers are in use"),
    Allowance("varlen_attention", "bfloat16, E=128, dropout and gated bias", (90,), 16, "all registers are in use"),
    Allowance("varlen_attention", "float16*", (*_SMALL_PRODUCTS, 100), 144, "as with bfloat16"),
    Allowance("varlen_attention", "float16, E=64, gated bias in float16", (120,), 152, "as with bfloat16"),
    Allowance("varlen_attention", "float32, E=64*gated bias", tuple(SHARED_BYTES), 24, _EXACT),
    Allowance("varlen_attention", "float32, E=128, dropout and gated bias", tuple(SHARED_BYTES), 448, _EXACT),
    Allowance("varlen_attention", "float32, E=64, gated bias, TF32", tuple(SHARED_BYTES), 16, "as with E=128"),
    Allowance("varlen_attention", "float32, E=128*, TF32", (*_SMALL_PRODUCTS, 100), 72, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "*", _SMALL_PRODUCTS, 8, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "front end, layer norm, bfloat16*", (100,), 104, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "front end, layer norm, float16*", (90, 100), 104, "as with bfloat16, 8 on sm_90"),
    Allowance("strided_conv", "front end, layer norm, *float16*", (120,), 128, "blocks are chosen for sm_90"),
    Allowance("strided_conv", "front end, layer norm, float32*", (100, 120), 40, "not meant to be fast"),
    Allowance("strided_conv", "front end with a gradient*, layer norm in float32*", (100, 120), 24, "as above"),
    Allowance("strided_conv", "layer norm, K=31, 512*", tuple(SHARED_BYTES), 728, "first layers have K=10"),
    Allowance("dropout_add_layer_norm", "D=194, float32*", tuple(SHARED_BYTES), 8, "no width of a speech encoder"),
    Allowance("dropout_add_layer_norm", "D=768, float32, dropout", (86, 89), 8, "ptxas limits itself to 96 registers"),
    Allowance("dropout_add_layer_norm", "D=768, bfloat16, prenorm, dropout", (100,), 8, "as with float32"),
    Allowance("dropout_add_layer_norm", "D=8192*", tuple(SHARED_BYTES), 24, "wider than any speech encoder so far"),
)


def check(case: Compiled) -> None:
    allowed = max(
        (
            allowance.spilled
            for allowance in ALLOWANCES
            if allowance.op == case.op
            and fnmatchcase(case.label, allowance.label)
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
def test_two_blocks_of_the_attention_forward_share_a_multiprocessor_of_hopper() -> None:
    (case,) = (
        case
        for case in compiled(("varlen_attention",), (90,), case="bfloat16, E=64")
        if case.kernel == "_forward_kernel"
    )
    assert 2 * 32 * case.num_warps * case.registers <= 65536
    assert 2 * (case.shared + 1024) <= 228 * 1024


@pytest.mark.slow
def test_turing_is_not_supported_because_products_use_no_tensor_cores() -> None:
    cases = [
        case
        for case in compiled(("varlen_attention",), (TURING,), one_per_kernel=True)
        if case.kernel != "_reduce_bias_kernel"  # it has no products
    ]
    assert cases
    assert not any(case.products for case in cases)
    assert min(case.spilled for case in cases) > 500
