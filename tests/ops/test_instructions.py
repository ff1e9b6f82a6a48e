"""Test the counts of machine instructions of Triton kernels, and hold kernels to the budgets in a file."""

import json
from pathlib import Path

import pytest

from tests.ops.instructions import Section, counted, loops, main_section, parse

pytest.importorskip("triton", reason="Triton is not installed")

#: op -> label of a case -> kernel -> the most instructions of its main section on sm_90, per iteration and warp.
BUDGETS: dict[str, dict[str, dict[str, int]]] = json.loads(
    Path(__file__).with_name("instruction_budgets.json").read_text()
)
NESTED = """
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000e220000000800 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ; /* 0x0 */
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;        /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;      /* 0x0 */
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;        /* 0x0 */
        /*0050*/              @!P1 BRA 0x10 ;                             /* 0x0 */
        /*0060*/               @P0 FADD.FTZ R3, R2, R1 ;                  /* 0x0 */
        /*0070*/              @!P0 BRA `(.L_x_1) ;                        /* 0x0 */
        /*0080*/              @!P0 BRA 0x0 ;                              /* 0x0 */
        /*0090*/                   EXIT ;                                 /* 0x0 */
        /*00a0*/                   BRA 0xa0;                              /* 0x0 */
"""


def test_loops_end_with_a_branch_backwards() -> None:
    instructions = parse(NESTED)
    assert [instruction.address for instruction in instructions] == list(range(0, 0xB0, 0x10))
    assert instructions[6].text == "FADD.FTZ R3, R2, R1"
    (inner,) = loops(instructions)
    assert inner == Section(5, 2, 2, {"HGMMA": 2, "WARPGROUP": 2, "BRA": 1})
    assert inner.is_serialised
    assert main_section(instructions) == inner


def test_a_kernel_without_loops_is_counted_as_a_whole() -> None:
    instructions = parse(NESTED)[6:7]
    assert loops(instructions) == []
    assert main_section(instructions) == Section(1, 0, 0, {"FADD": 1})


@pytest.mark.slow
@pytest.mark.parametrize(("op", "label"), [(op, label) for op, cases in BUDGETS.items() for label in cases])
def test_kernels_keep_their_budgets(op: str, label: str) -> None:
    found = counted(op, label, 90)
    assert found.keys() == BUDGETS[op][label].keys()
    for kernel, section in found.items():
        assert section.instructions <= BUDGETS[op][label][kernel], f"{kernel}: {section}"
        assert not section.is_serialised, f"{kernel}: ptxas runs its products one after the other: {section}"
