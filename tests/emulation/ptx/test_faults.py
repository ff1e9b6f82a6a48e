"""Test the emulator's checks: each fault put into a kernel on purpose must be found."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.emulation.ptx.test_kernels import OPS, emulator_environment

pytest.importorskip("triton", reason="Triton is not installed")


def printed(module: str, *options: str) -> Any:
    """Run a module of this package in a process of its own; return what it prints as JSON."""
    command = [sys.executable, "-m", f"tests.emulation.ptx.{module}", *options]
    done = subprocess.run(command, env=emulator_environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fault_is_found() -> None:
    assert printed("faults", "bias_gelu_dropout", "--first-only") == []


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_fault_is_found(op: str) -> None:
    assert printed("faults", op) == []


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31st() -> None:
    """Compute the end of tensors that have more elements, and find each offset that is computed in 32 bits."""
    assert printed("far") == {"errors": {}, "missed": []}
