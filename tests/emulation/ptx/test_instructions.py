"""Test the emulator on PTX written by hand: what instructions compute, who executes them, and which accesses fail."""

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulation.ptx.machine import DeadlockError, Program
from tests.emulation.ptx.memory import GlobalMemory, MemoryAccessError
from tests.emulation.ptx.parser import UnknownPtxError, parse

_PTX = """
.visible .entry test(
    {parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
    mov.u32 %r0, %tid.x;
    {body}
    ret;
}}
"""


def run(body: str, *tensors: Tensor, threads: int = 32, programs: int = 1, shared: int = 0) -> None:
    """Run a kernel whose %r0 is the thread, and whose %rd0, %rd1, ... are the addresses of tensors."""
    declared = ",\n".join(f".param .u64 .ptr .global .align 1 t{index}" for index in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{index}, [t{index}];" for index in range(len(tensors)))
    kernel = parse(_PTX.format(parameters=declared, threads=threads, body=loads + body))
    memory = GlobalMemory()
    parameters = {f"t{i}": np.asarray(memory.add(f"t{i}", x), np.uint64) for i, x in enumerate(tensors)}
    Program(kernel).run(parameters, memory, (programs, 1, 1), shared)


def elementwise(instruction: str, *sources: Tensor, out: torch.dtype, width: int | None = None) -> list[float]:
    """Apply an instruction to neighbouring numbers of tensors of at most 32 elements; $ stands for registers."""
    count, bits = len(sources[0]), 8 * out.itemsize
    padded = [torch.nn.functional.pad(source, (0, 32 - count)) for source in sources]
    result = torch.empty(32, dtype=out)
    names = {16: "%rs", 32: "%r", 64: "%rd"}
    body = ""
    operands = []
    for index, source in enumerate(padded):
        size = source.element_size()
        register = f"{names[8 * size]}{5 + index if size < 8 else 10 + index}"
        body += f"mad.wide.u32 %rd9, %r0, {size}, %rd{index}; ld.global.b{8 * size} {register}, [%rd9];"
        operands.append(register)
    target = {16: "%rs1", 32: "%r30", 64: "%rd15"}[bits]
    body += f"{instruction.replace('$d', target).format(*operands)};"
    body += f"mad.wide.u32 %rd9, %r0, {bits // 8}, %rd{len(padded)}; st.global.b{bits} [%rd9], {target};"
    run(body, *padded, result)
    values: list[float] = result[:count].tolist()
    return values


def ints(*values: int) -> Tensor:
    return torch.tensor([value - 2**32 if value >= 2**31 else value for value in values], dtype=torch.int32)


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


NAN, INF = float("nan"), float("inf")
I32, F32 = torch.int32, torch.float32


@pytest.mark.parametrize(
    ("instruction", "sources", "out", "expected"),
    [
        ("add.s32 $d, {0}, {1}", [ints(2**31 - 1, -5), ints(1, 3)], I32, [-(2**31), -2]),
        ("sub.s32 $d, {0}, 7", [ints(3, -(2**31))], I32, [-4, 2**31 - 7]),
        ("mul.lo.s32 $d, {0}, {1}", [ints(2**16, -3), ints(2**16, 5)], I32, [0, -15]),
        ("mul.hi.u32 $d, {0}, {1}", [ints(0xFFFFFFFF, 2), ints(0xFFFFFFFF, 3)], I32, [-2, 0]),
        ("mul.hi.s32 $d, {0}, {1}", [ints(-1, 2**30), ints(5, 8)], I32, [-1, 2]),
        ("mul.wide.s32 $d, {0}, {1}", [ints(-1, 2**30), ints(5, 8)], torch.int64, [-5, 2**33]),
        ("mul.wide.u32 $d, {0}, {1}", [ints(-1), ints(5)], torch.int64, [5 * (2**32 - 1)]),
        ("mad.lo.s32 $d, {0}, {1}, {2}", [ints(3), ints(-4), ints(5)], I32, [-7]),
        ("div.s32 $d, {0}, {1}", [ints(7, -7, 7, -7), ints(2, 2, -2, -2)], I32, [3, -3, -3, 3]),
        ("rem.s32 $d, {0}, {1}", [ints(7, -7, 7, -7), ints(2, 2, -2, -2)], I32, [1, -1, 1, -1]),
        ("div.u32 $d, {0}, {1}", [ints(-1), ints(2)], I32, [2**31 - 1]),
        ("shl.b32 $d, {0}, {1}", [ints(1, 1, 3), ints(31, 32, 1)], I32, [-(2**31), 0, 6]),
        ("shr.s32 $d, {0}, {1}", [ints(-8, -8, 8), ints(1, 99, 2)], I32, [-4, -1, 2]),
        ("shr.u32 $d, {0}, {1}", [ints(-1, -1), ints(28, 32)], I32, [15, 0]),
        ("min.s32 $d, {0}, {1}", [ints(-1, 4), ints(2, 3)], I32, [-1, 3]),
        ("min.u32 $d, {0}, {1}", [ints(-1, 4), ints(2, 3)], I32, [2, 3]),
        ("and.b32 $d, {0}, 12", [ints(10)], I32, [8]),
        ("xor.b32 $d, {0}, {1}", [ints(10), ints(12)], I32, [6]),
        ("not.b32 $d, {0}", [ints(0)], I32, [-1]),
        ("neg.s32 $d, {0}", [ints(5, -(2**31))], I32, [-5, -(2**31)]),
        ("bfe.u32 $d, {0}, 4, 8", [ints(0xABCDE)], I32, [0xCD]),
        ("bfe.s32 $d, {0}, 4, 8", [ints(0xABCDE)], I32, [0xCD - 256]),
        ("prmt.b32 $d, {0}, {1}, 0x5410", [ints(0x44332211), ints(0x08776655)], I32, [0x66552211]),
        ("prmt.b32 $d, {0}, {1}, 0x7f0a", [ints(0x44332211), ints(0x88776655)], I32, [0x88FF1100 - 2**32]),
        ("lop3.b32 $d, {0}, {1}, {2}, 0xe8", [ints(0b1100), ints(0b1010), ints(0b0110)], I32, [0b1110]),
        ("fma.rn.f32 $d, {0}, {1}, {2}", [floats(1 + 2**-23), floats(1 - 2**-23), floats(-1.0)], F32, [-(2.0**-46)]),
        ("mul.f32 $d, {0}, {1}", [floats(2.0**-100), floats(2.0**-40)], F32, [2.0**-140]),
        ("mul.ftz.f32 $d, {0}, {1}", [floats(2.0**-100), floats(2.0**-40)], F32, [0.0]),
        ("max.f32 $d, {0}, {1}", [floats(NAN, 1.0), floats(2.0, 3.0)], F32, [2.0, 3.0]),
        ("abs.f32 $d, {0}", [floats(-1.5)], F32, [1.5]),
        ("ex2.approx.ftz.f32 $d, {0}", [floats(-INF, 3.0)], F32, [0.0, 8.0]),
        ("lg2.approx.ftz.f32 $d, {0}", [floats(0.0, 8.0)], F32, [-INF, 3.0]),
        ("rsqrt.approx.ftz.f32 $d, {0}", [floats(16.0)], F32, [0.25]),
        ("div.full.f32 $d, {0}, {1}", [floats(1.0, 1.0), floats(4.0, 0.0)], F32, [0.25, INF]),
        ("cvt.rzi.s32.f32 $d, {0}", [floats(-2.7, 1e20, NAN)], I32, [-2, 2**31 - 1, 0]),
        ("cvt.rn.f32.s32 $d, {0}", [ints(2**24 + 1, -3)], F32, [2.0**24, -3.0]),
        ("cvt.rn.f32.u32 $d, {0}", [ints(-1)], F32, [2.0**32]),
        ("cvt.s64.s32 $d, {0}", [ints(-5)], torch.int64, [-5]),
        ("cvt.u64.u32 $d, {0}", [ints(-5)], torch.int64, [2**32 - 5]),
        ("cvt.u32.u64 $d, {0}", [torch.tensor([2**40 + 7])], I32, [7]),
        ("cvt.rn.bf16.f32 $d, {0}", [floats(1 + 2**-8, 1 + 3 * 2**-8)], torch.bfloat16, [1.0, 1 + 2**-6]),
        ("cvt.rn.f16.f32 $d, {0}", [floats(1 + 2**-11, 1e6)], torch.float16, [1.0, INF]),
        ("cvt.f32.f16 $d, {0}", [torch.tensor([0.5]).half()], F32, [0.5]),
        ("cvt.f64.f32 $d, {0}", [floats(0.1)], torch.float64, [struct.unpack("f", struct.pack("f", 0.1))[0]]),
        ("fma.rn.f64 $d, {0}, {0}, {0}", [torch.tensor([3.0]).double()], torch.float64, [12.0]),
        ("setp.lt.f32 %p1, {0}, {1}; selp.b32 $d, 1, 0, %p1", [floats(1.0, NAN), floats(2.0, 2.0)], I32, [1, 0]),
        ("setp.neu.f32 %p1, {0}, {1}; selp.b32 $d, 1, 0, %p1", [floats(1.0, NAN), floats(1.0, 2.0)], I32, [0, 1]),
        ("setp.lt.s32 %p1, {0}, 0; selp.b32 $d, 1, 0, %p1", [ints(-1, 1)], I32, [1, 0]),
        ("setp.lt.u32 %p1, {0}, 5; selp.b32 $d, 1, 0, %p1", [ints(-1, 1)], I32, [0, 1]),
        ("setp.nan.f32 %p1, {0}, {0}; selp.b32 $d, 1, 0, %p1", [floats(NAN, 1.0)], I32, [1, 0]),
        ("setp.gt.s32 %p1, {0}, 0; not.pred %p2, %p1; selp.b32 $d, 1, 0, %p2", [ints(-1, 1)], I32, [1, 0]),
        ("mov.b32 $d, 7; setp.gt.s32 %p1, {0}, 0; @%p1 mov.b32 $d, 9", [ints(-1, 1)], I32, [7, 9]),
        ("mov.b32 $d, 7; setp.gt.s32 %p1, {0}, 0; @!%p1 mov.b32 $d, 9", [ints(-1, 1)], I32, [9, 7]),
        ("mov.b64 {{_, $d}}, {0}", [torch.tensor([5 * 2**32 + 3])], I32, [5]),
        ("mov.b64 $d, {{{0}, {1}}}", [ints(3), ints(5)], torch.int64, [5 * 2**32 + 3]),
        ("mov.b32 $d, 0f3FC00000", [ints(0)], F32, [1.5]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_results(instruction: str, sources: list[Tensor], out: torch.dtype, expected: Sequence[float]) -> None:
    assert elementwise(instruction, *sources, out=out) == expected


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16x2"), (torch.float16, "f16x2")])
def test_pairs_of_halves(dtype: torch.dtype, name: str) -> None:
    x, y = (torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    out = torch.empty(64, dtype=dtype)
    loads = "mad.wide.u32 %rd8, %r0, 4, %rd0; mad.wide.u32 %rd9, %r0, 4, %rd1; mad.wide.u32 %rd10, %r0, 4, %rd2;"
    loads += "ld.global.b32 %r1, [%rd8]; ld.global.b32 %r2, [%rd9];"
    run(f"{loads} fma.rn.{name} %r3, %r1, %r2, %r1; st.global.b32 [%rd10], %r3;", x, y, out)
    assert torch.equal(out, (x.double() * y.double() + x.double()).to(dtype))
    pair = "selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; or.b32 %r3, %r3, %r4;"
    less = torch.empty(32, dtype=torch.int32)
    run(f"{loads} setp.lt.{name} %p1|%p2, %r1, %r2; {pair} st.global.b32 [%rd10], %r3;", x, y, less)
    assert torch.equal(less, (x < y).view(32, 2).int() @ torch.tensor([1, 2], dtype=torch.int32))
    fp32 = torch.randn(64)
    mixed = "mad.wide.u32 %rd8, %r0, 8, %rd0; mad.wide.u32 %rd9, %r0, 4, %rd1; ld.global.v2.b32 {%r1, %r2}, [%rd8];"
    run(f"{mixed} cvt.rn.{name}.f32 %r3, %r2, %r1; st.global.b32 [%rd9], %r3;", fp32, out)
    assert torch.equal(out, fp32.to(dtype))


def test_shuffles_and_reductions() -> None:
    for instruction, expected in {
        "shfl.sync.bfly.b32 %r2, %r1, 4, 31, -1": [lane ^ 4 for lane in range(32)],
        "shfl.sync.idx.b32 %r2, %r1, 3, 31, -1": [3] * 32,
        "shfl.sync.up.b32 %r2, %r1, 1, 0, -1": [0, *range(31)],
        "shfl.sync.down.b32 %r2, %r1, 1, 31, -1": [*range(1, 32), 31],
        "mov.b32 %r4, -1; redux.sync.add.s32 %r2, %r1, %r4": [496] * 32,
    }.items():
        out = torch.empty(64, dtype=torch.int32)
        run(
            f"and.b32 %r1, %r0, 31; {instruction}; mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], %r2;",
            out,
            threads=64,
        )
        assert out.tolist() == expected * 2


@pytest.mark.parametrize(
    ("shape", "dtype", "name"),
    [("m16n8k16", torch.bfloat16, "bf16"), ("m16n8k16", torch.float16, "f16"), ("m16n8k8", torch.bfloat16, "bf16")],
)
def test_products_of_matrices_in_shared_memory(shape: str, dtype: torch.dtype, name: str) -> None:
    """Rows that threads store, and `ldmatrix` loads, multiply as matrices; B is stored as (depth, 8)."""
    depth = int(shape.removeprefix("m16n8k"))
    a, b = (
        torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(dtype) for size in ((16, depth), (depth, 8))
    )
    registers = "{%r10, %r11, %r12, %r13}" if depth == 16 else "{%r10, %r11}"
    operands = "{%r20, %r21}" if depth == 16 else "{%r20}"
    of_a, of_b = (4, 2) if depth == 16 else (2, 1)
    columns = f"shr.u32 %r2, %r0, 4; and.b32 %r2, %r2, {depth // 8 - 1};"  # lanes 16 to 31: the right half of A
    rows = f"and.b32 %r1, %r0, 15; mul.lo.s32 %r1, %r1, {2 * depth}; mad.lo.s32 %r1, %r2, 16, %r1;"
    out = torch.empty(16, 8)
    run(
        f"""
        {columns} {rows}
        cvt.u64.u32 %rd8, %r1; add.s64 %rd8, %rd8, %rd0; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd8];
        st.shared.v4.b32 [%r1], {{%r4, %r5, %r6, %r7}};
        and.b32 %r3, %r0, {depth - 1}; shl.b32 %r3, %r3, 4;
        cvt.u64.u32 %rd8, %r3; add.s64 %rd8, %rd8, %rd1; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd8];
        st.shared.v4.b32 [%r3 + 512], {{%r4, %r5, %r6, %r7}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{of_a}.shared.b16 {registers}, [%r1];
        ldmatrix.sync.aligned.m8n8.x{of_b}.trans.shared.b16 {operands}, [%r3 + 512];
        mov.b32 %r30, 0f3F800000; mov.b32 %r31, %r30; mov.b32 %r32, %r30; mov.b32 %r33, %r30;
        mma.sync.aligned.{shape}.row.col.f32.{name}.{name}.f32 {{%r30, %r31, %r32, %r33}}, {registers}, {operands},
            {{%r30, %r31, %r32, %r33}};
        mad.wide.u32 %rd9, %r0, 8, %rd2;
        st.global.v2.b32 [%rd9], {{%r30, %r31}}; st.global.v2.b32 [%rd9 + 256], {{%r32, %r33}};
        """,
        a,
        b,
        out,
        shared=1024,
    )
    torch.testing.assert_close(out, (a.double() @ b.double() + 1).float(), rtol=1e-6, atol=1e-6)


def test_products_in_tf32_ignore_the_lowest_bits() -> None:
    a, b = torch.ones(32) + 2.0**-12, torch.ones(32)
    out = torch.empty(32)
    load = "mad.wide.u32 %rd8, %r0, 4, %rd0; ld.global.b32 %r1, [%rd8]; mad.wide.u32 %rd9, %r0, 4, %rd1;"
    load += "ld.global.b32 %r2, [%rd9]; mov.b32 %r3, 0;"
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r4, %r5, %r6, %r7}, {%r1, %r1, %r1, %r1},"
    run(
        f"{load} {product} {{%r2, %r2}}, {{%r3, %r3, %r3, %r3}}; mad.wide.u32 %rd9, %r0, 4, %rd2;"
        "st.global.b32 [%rd9], %r4;",
        a,
        b,
        out,
    )
    assert out.tolist() == [8.0] * 32


def test_each_thread_takes_its_own_path() -> None:
    """Thread t of program p runs t times through a loop, and even threads skip the rest."""
    out = torch.zeros(2, 64, dtype=torch.int32)
    run(
        """
        mov.u32 %r5, %ctaid.x; mov.b32 %r1, 0; mov.b32 %r2, 0;
    LOOP:
        setp.ge.s32 %p1, %r1, %r0; @%p1 bra DONE;
        add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1; bra.uni LOOP;
    DONE:
        and.b32 %r3, %r0, 1; setp.eq.s32 %p2, %r3, 0; @%p2 ret;
        mad.lo.s32 %r4, %r5, 64, %r0; mad.wide.u32 %rd9, %r4, 4, %rd0; st.global.b32 [%rd9], %r2;
        """,
        out,
        threads=64,
        programs=2,
    )
    assert out.tolist() == [[t * (t - 1) // 2 if t % 2 else 0 for t in range(64)]] * 2


_ODD = "and.b32 %r9, %r0, 1; setp.eq.s32 %p1, %r9, 1;"
_MINE = "shl.b32 %r1, %r0, 2;"  # the address of a thread's own word
_NEXT_WARP = "add.s32 %r2, %r0, 32; and.b32 %r2, %r2, 63; shl.b32 %r2, %r2, 2;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%rd0 + 128];", "leave t0, which has 128 bytes, at byte 128"),
        ("ld.global.b32 %r1, [%rd0 + -4];", "leave t0"),
        ("st.global.v4.b32 [%rd0 + 120], {%r0, %r0, %r0, %r0};", "leave t0"),
        ("ld.global.b32 %r1, [%rd0 + 2];", "not aligned to 4"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd0 + 4];", "not aligned to 8"),
        ("sub.s64 %rd5, %rd1, 4; ld.global.b32 %r1, [%rd5];", "leave t1"),
        ("ld.global.b32 %r1, [%rd1 + 4];", "between its elements"),
        ("mov.b64 %rd5, 0; ld.global.b32 %r1, [%rd5];", "leave t0"),
        ("mov.b64 %rd5, -1; ld.global.b32 %r1, [%rd5];", "comes from no tensor"),
        ("mov.b32 %r1, 256; ld.shared.b32 %r2, [%r1];", "leaves shared memory"),
        ("st.shared.b32 [%r0], %r0;", "not aligned"),
        (f"{_MINE} ld.shared.b32 %r2, [%r1];", "read before it is written"),
        (f"{_MINE} {_NEXT_WARP} st.shared.b32 [%r1], %r0; ld.shared.b32 %r3, [%r2];", "has just written"),
        (
            f"{_MINE} {_NEXT_WARP} st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r3, [%r2];"
            "st.shared.b32 [%r1], %r3;",
            "has just read",
        ),
        ("mov.b32 %r1, 0; st.shared.b32 [%r1], %r0;", "warps store different numbers at the same address"),
        ("st.global.b32 [%rd0], %r0;", "threads store different numbers at the same address"),
        (
            f"{_MINE} mad.wide.u32 %rd8, %r0, 4, %rd2; cp.async.ca.shared.global [%r1], [%rd8], 0x4, 4;"
            "cp.async.commit_group; ld.shared.b32 %r3, [%r1];",
            "read before it is written",
        ),
        (
            f"{_MINE} mad.wide.u32 %rd8, %r0, 4, %rd2; cp.async.ca.shared.global [%r1], [%rd8], 0x4, 4;"
            "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r3, [%r1];",
            "read before it is written",
        ),
        ("@%p3 add.s32 %r1, %r0, 1;", "predicate %p3 of test is read before"),
        ("trap;", "stops itself"),
    ],
)
def test_faults_of_memory(body: str, message: str) -> None:
    tensors = torch.zeros(32), torch.zeros(8, 2)[:, 0], torch.zeros(64)
    with pytest.raises(MemoryAccessError, match=message):
        run(body, *tensors, threads=64, shared=256)


def test_shared_memory_moves_numbers_between_warps() -> None:
    """Barriers allow what `test_faults_of_memory` forbids; a copy of no bytes stores zeros."""
    source, out = torch.arange(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    run(
        f"""
        {_MINE} {_NEXT_WARP} {_ODD} selp.b32 %r4, 4, 0, %p1;
        mad.wide.u32 %rd8, %r0, 4, %rd0; mad.wide.u32 %rd9, %r0, 4, %rd1;
        cp.async.ca.shared.global [%r1], [%rd8], 0x4, %r4; cp.async.commit_group;
        cp.async.wait_group 0; bar.sync 0;
        ld.shared.b32 %r3, [%r2]; bar.sync 0; st.shared.b32 [%r1], %r3;
        st.global.b32 [%rd9], %r3;
        """,
        source,
        out,
        threads=64,
        shared=256,
    )
    assert out.tolist() == [(t + 32) % 64 if t % 2 else 0 for t in range(64)]


def test_uninitialised_registers_are_nan() -> None:
    out = torch.zeros(32)
    run("mad.wide.u32 %rd9, %r0, 4, %rd0; add.f32 %r2, %r1, %r1; st.global.b32 [%rd9], %r2;", out)
    assert out.isnan().all()


def test_a_barrier_that_some_threads_skip() -> None:
    with pytest.raises(DeadlockError, match=r"wait at 'bar\.sync 0'"):
        run(f"{_ODD} @%p1 bra OTHER; bar.sync 0; bra DONE; OTHER: bar.sync 1; DONE: bar.sync 0;", threads=64)


def test_threads_that_have_ended_need_not_come_to_a_barrier() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run(f"{_ODD} @%p1 ret; bar.sync 0; mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], 1;", out)
    assert out.tolist() == [1, 0] * 16


@pytest.mark.parametrize(
    "instruction",
    ["wgmma.fence.sync.aligned", "atom.global.add.f32 %r1, [%rd0], %r2", "cvt.sat.f32.f32 %r1, %r2",
     "ld.local.b32 %r1, [%r2]", "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd1}, {%rd2}, {%rd3}, {%rd4}",
     "shfl.sync.bfly.b32 %r1, %r2, 1, 7183, -1", "cp.async.bulk.wait_group 0"],
)  # fmt: skip
def test_unknown_instructions_are_named(instruction: str) -> None:
    with pytest.raises(UnknownPtxError, match=instruction.split(" ")[0]):
        run(f"{instruction};", torch.zeros(4))
