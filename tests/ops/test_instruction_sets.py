"""Test compiled CPU kernels with the narrower instruction sets that they are built for; other tests use the widest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastssl.kernels.dispatch import BACKENDS

FOLDER = Path(__file__).resolve().parent
#: Forward and backward tests of every op against the reference, attention at the borders of its blocks, and prepacked
#: weights.
SELECTION = (
    "((native-cpu and (test_forward or test_backward)) or test_blocks_of_the_cpu_kernel or "
    "(test_prepacked_conv and (test_linear or test_conv or test_keep_length or test_front_end or test_a_single_row)))"
)
FILES = [
    str(FOLDER / f"test_{name}.py") for name in ("standard", "integrate_and_fire", "varlen_attention", "prepacked_conv")
]


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_kernels_agree_with_the_reference(capability: str) -> None:
    if not any("native" in backends["cpu"] for backends in BACKENDS.values()):
        pytest.skip("the compiled CPU module was not built")
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    options = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain"]
    command = [sys.executable, "-m", "pytest", *options, "-k", SELECTION, *FILES]
    environment = os.environ | {"FASTSSL_CPU_CAPABILITY": capability, "ATEN_CPU_CAPABILITY": capability}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(command, cwd=FOLDER.parent.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
