"""Run integrate-and-fire's CUDA kernels on the CPU, as they are and with faults that must be found."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.emulation.host.build import ROOT, compile_for_host, why_not

KERNELS = ROOT / "csrc" / "integrate_and_fire" / "kernel.cu"

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"nothing can be compiled: {why_not()}")


def run(library: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.emulation.host.fire", str(library), *options],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )


def test_cuda_kernels_give_what_the_reference_gives(tmp_path: Path) -> None:
    done = run(compile_for_host(KERNELS, tmp_path), "--count", "24")
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr}"
    assert done.stdout.count("Case(") == 24


class Fault(NamedTuple):
    """A change of the source that breaks it: the `place`-th `old` becomes `new`; `found` is part of the message."""

    old: str
    new: str
    found: str
    place: int = 0


BARRIER = "    __syncthreads();\n"
OTHER_RESULT = "AssertionError: "
FAULTS = {
    "no barrier after the additions": Fault(BARRIER, "", OTHER_RESULT, 1),
    "reads after the end": Fault("if (t + u <= last) {", "{", "access outside of `x_data`"),
    "local memory not initialised": Fault("acc_t sum[WIDTH] = {};", "acc_t sum[WIDTH];", OTHER_RESULT),
}
MORE_FAULTS = {
    "no barrier before the additions": Fault(BARRIER, "", OTHER_RESULT, 0),
    "no barrier before other warps' sums are read": Fault(BARRIER, "", OTHER_RESULT, 3),
    "no barrier before other warps' sums are overwritten": Fault(BARRIER, "", OTHER_RESULT, 4),
    "a barrier that some threads miss": Fault(
        "  double sum = 0;\n", "  if (threadIdx.x > 200) return;\n  double sum = 0;\n", "barrier is missed by a thread"
    ),
    "a barrier that some threads pass": Fault(
        BARRIER, "    if (threadIdx.x < 64) __syncthreads();\n", "threads wait at different barriers"
    ),
    "reads before the beginning": Fault(
        "x_ptr + static_cast<int64_t>(t) * channels", "x_ptr + (t - 1L) * channels", "bytes before its beginning"
    ),
    "writes after the end": Fault("if (row >= rows) {\n    return;\n  }", "", "access outside of"),
    "shared memory not initialised": Fault("i < kScanPiece; i +=", "i < count; i +=", OTHER_RESULT),
    "shared memory too small": Fault("sums[kScanPiece];", "sums[kScanPiece - 1];", "out of bounds"),
    "misaligned loads": Fault("channels % kWidth == 0 && ", "", "misaligned"),
    "the wrong lane": Fault(">= distance", "> distance", OTHER_RESULT),
}


@pytest.mark.parametrize(
    "fault",
    [
        *(pytest.param(fault, id=name) for name, fault in FAULTS.items()),
        *(pytest.param(fault, id=name, marks=pytest.mark.slow) for name, fault in MORE_FAULTS.items()),
    ],
)
def test_faults_are_found(fault: Fault, tmp_path: Path) -> None:
    parts = KERNELS.read_text().split(fault.old)
    assert len(parts) > fault.place + 1
    source = tmp_path / KERNELS.parent.name / KERNELS.name
    source.parent.mkdir()
    before, after = (fault.old.join(half) for half in (parts[: fault.place + 1], parts[fault.place + 1 :]))
    source.write_text((before + fault.new + after).replace("dispatch_floating(", "dispatch_float32("))
    done = run(compile_for_host(source, tmp_path), "--only-float32", "--count", "12")
    assert done.returncode != 0
    assert fault.found in done.stderr, done.stderr
