"""Test which backends are chosen on GPUs that this machine does not have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastssl.kernels import dispatch
from fastssl.kernels.gpus import Gpu, why_no_code, why_no_triton
from fastssl.kernels.triton_driver import why_no_launches

T4, A100, L40, H100, B200 = (
    Gpu(index, capability) for index, capability in enumerate([(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
)
ROOT = Path(dispatch.__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("architectures", "gpus", "lacks"),
    [
        ("sm_80 sm_90 compute_90", [A100, L40, H100], None),
        ("sm_80 sm_90 compute_90", [H100, T4], T4),
        ("sm_86", [L40], None),
        ("sm_86", [A100], A100),  # machine code for a higher minor number
        ("sm_80", [H100], H100),  # machine code for another major number
        ("compute_80", [H100], None),
        ("compute_90", [L40], L40),
        ("sm_90a", [H100], None),
        ("compute_90a", [B200], B200),
        ("sm_100f", [Gpu(0, (10, 3))], None),
        ("compute_100f", [Gpu(0, (12, 0))], Gpu(0, (12, 0))),
        ("", [H100], H100),
        ("", [], None),
    ],
)
def test_code_runs_where_cuda_says(architectures: str, gpus: list[Gpu], lacks: Gpu | None) -> None:
    reason = why_no_code(architectures, gpus)
    if lacks is None:
        assert reason == ""
    else:
        number = ".".join(map(str, lacks.capability))
        assert f"no code for GPU {lacks.number} (compute capability {number}), only " in reason
        assert f"TORCH_CUDA_ARCH_LIST={number}" in reason


def test_triton_needs_an_ampere() -> None:
    assert why_no_triton([]) == "no CUDA device"
    assert why_no_triton([A100, H100]) == ""
    reason = why_no_triton([H100, T4])
    assert reason == "GPU 0 (compute capability 7.5) is too old for the Triton kernels, which need 8.0 or above"


def test_triton_kernels_are_for_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ROCm, AMD's GPUs are CUDA devices to PyTorch, of a capability that is another number."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "are for NVIDIA GPUs" in why_no_triton([Gpu(0, (9, 4))])
    assert why_no_triton([]) == "no CUDA device"


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")

    def build() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease")

    monkeypatch.setattr(driver, "CudaUtils", build)
    assert why_no_launches().startswith("Triton cannot launch kernels (Failed to find C compiler.); install")
    monkeypatch.setattr(driver, "CudaUtils", lambda: None)
    assert why_no_launches() == ""
    monkeypatch.delattr(driver, "CudaUtils")
    assert why_no_launches() == ""


#: Pretends to have a GPU, and prints the backends of two ops and why others are missing, then `fastssl info`.
PRETEND = """
import ctypes, json, sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index: "Some GPU"

class Runtime:
    def cudaDeviceGetAttribute(self, number, attribute, index):
        number._obj.value = json.loads(sys.argv[1])[attribute - 75]
        return 0

load = ctypes.CDLL
ctypes.CDLL = lambda name, *rest: Runtime() if str(name).startswith("libcudart") else load(name, *rest)
import fastssl.ops
from fastssl.cli.info import info
from fastssl.kernels.dispatch import BACKENDS
print(json.dumps({op: BACKENDS[op]["cuda"] for op in ("integrate_and_fire", "contrastive_loss")}))
info([])
"""


def pretend(capability: tuple[int, int]) -> tuple[dict[str, list[str]], str]:
    """Return the backends for CUDA of some ops, and what `fastssl info` says, in a process with a pretended GPU."""
    done = subprocess.run(
        [sys.executable, "-c", PRETEND, json.dumps(capability)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    first, _, rest = done.stdout.partition("\n")
    return json.loads(first), rest


@pytest.mark.skipif(bool(dispatch.COMPILED_MODULES["cuda"]), reason="the compiled CUDA module cannot be used")
def test_an_old_gpu_gets_the_references() -> None:
    backends, info = pretend((6, 1))
    assert backends == {"integrate_and_fire": ["reference"], "contrastive_loss": ["reference"]}
    why = "_C_cuda has no code for GPU 0 (compute capability 6.1), only "
    assert f"compiled module for cuda: {why}" in info
    assert f"    no native: {why}" in info
    assert "    no triton: GPU 0 (compute capability 6.1) is too old for the Triton kernels" in info
    assert "GPU 0 (compute capability 6.1): Some GPU (CUDA" in info


@pytest.mark.skipif(bool(dispatch.COMPILED_MODULES["cuda"]), reason="the compiled CUDA module cannot be used")
def test_a_new_gpu_gets_the_kernels_that_the_module_has() -> None:
    """The module says itself what it was compiled for; the PTX of its newest architecture runs on any later GPU."""
    backends, info = pretend((99, 0))
    assert backends["integrate_and_fire"] == ["native", "reference"]
    assert backends["contrastive_loss"] == ["reference"]  # without a driver, Triton launches nothing
    assert "    no triton: Triton cannot launch kernels (" in info
    assert "compiled module for cuda: loaded" in info
