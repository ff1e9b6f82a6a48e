"""Test every Triton kernel as it is compiled, on a machine without a GPU: see the package's docstring."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import fastssl.kernels
from tests.ops.ahead_of_time import Compiled

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

OPS = tuple(sorted(path.parent.name for path in Path(fastssl.kernels.__file__).parent.glob("*/triton_kernel.py")))
#: Architectures whose machine code is only compiled, from the same launches.
ALSO = (86, 90)


def emulator_environment() -> dict[str, str]:
    """Return an environment in which Triton compiles, and uses no GPU."""
    return os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}


@lru_cache
def emulated(op: str, *options: str) -> dict[str, Any]:
    """Check an op in a process of its own, because this one uses Triton's interpreter."""
    command = [sys.executable, "-m", "tests.emulation.ptx", op, *options]
    done = subprocess.run(command, env=emulator_environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])[op]
    return found


def check(op: str, dtypes: Sequence[str]) -> None:
    found = emulated(op, "--dtypes", *dtypes, "--architectures", *map(str, ALSO))
    assert {dtype for _, dtype, _, _ in found["outcomes"]} == set(dtypes)
    errors = [f"{dtype}, {what}: {error}" for _, dtype, what, error in found["outcomes"] if error is not None]
    assert not errors, "\n".join(errors)
    assert not found["not launched"]
    compiled = [Compiled(*row) for row in found["compiled"]]
    assert {row.architecture for row in compiled} == set(ALSO)
    for row in compiled:
        assert row.fits, row


@pytest.mark.parametrize("op", OPS)
def test_bfloat16(op: str) -> None:
    check(op, ["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes(op: str, dtype: str) -> None:
    check(op, [dtype])


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_tests_of_the_op_pass_in_the_emulator(op: str) -> None:
    """Includes every dtype, odd sizes, single frames, empty batches, strided arguments, and batch mates."""
    files = [f"tests/ops/test_{name}.py" for name in ("standard", "every_op", op)]
    # Gradients are not computed in fp64, and `torch.compile` and opcheck launch the same kernels again.
    chosen = f"triton-cpu and {op} and not gradcheck and not compile and not opcheck"
    command = [sys.executable, "-m", "pytest", "-p", "tests.emulation.ptx.plugin", "-q", *files, "-k", chosen]
    done = subprocess.run(command, env=emulator_environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 20
