"""Which GPUs the compiled CUDA kernels and the Triton kernels can run on."""

import ctypes
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

#: Lowest compute capability for Triton kernels. Below it they have no tensor cores, and spill kilobytes per thread.
TRITON_CAPABILITY = (8, 0)
#: Compute capabilities of the GPUs on which every kernel has been run and was right (`fastssl check`).
RUN_ON: tuple[tuple[int, int], ...] = ()
#: Of `cudaDeviceGetAttribute`, for the major and the minor number of the compute capability.
_ATTRIBUTES = (75, 76)


class Gpu(NamedTuple):
    """A GPU that PyTorch can use.

    Attributes:
        number: PyTorch's number of it.
        capability: Compute capability: major and minor number.
    """

    number: int
    capability: tuple[int, int]

    def __str__(self) -> str:
        """Return the number and the compute capability."""
        return f"GPU {self.number} (compute capability {self.capability[0]}.{self.capability[1]})"


def gpus() -> list[Gpu]:
    """Return the GPUs that this process may use, without initialising CUDA in PyTorch."""
    if not torch.cuda.is_available():
        return []
    found = ((index, _capability(index)) for index in range(torch.cuda.device_count()))
    return [Gpu(index, capability) for index, capability in found if capability is not None]


def is_unproven(device: torch.device) -> bool:
    """Return whether a device is a GPU of a kind on which our kernels have not been run yet (`RUN_ON`)."""
    return device.type == "cuda" and not (RUN_ON and torch.cuda.get_device_capability(device) in RUN_ON)


def _capability(index: int) -> tuple[int, int] | None:
    """Return a GPU's compute capability, None if the CUDA runtime does not say.

    PyTorch's own function initialises CUDA. After that, processes forked from this one cannot use it, and an import
    should not have such an effect.
    """
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}")  # which torch has loaded
    except OSError:
        return torch.cuda.get_device_capability(index)
    numbers = [ctypes.c_int(), ctypes.c_int()]
    for number, attribute in zip(numbers, _ATTRIBUTES, strict=True):
        if runtime.cudaDeviceGetAttribute(ctypes.byref(number), attribute, index) != 0:
            return None
    return numbers[0].value, numbers[1].value


def why_no_triton(present: Sequence[Gpu]) -> str:
    """Return why Triton kernels should not run on GPUs, "" if they should on all of them."""
    if not present:
        return "no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs; on those of AMD, nobody has chosen their settings or run them"
    old = [gpu for gpu in present if gpu.capability < TRITON_CAPABILITY]
    needed = ".".join(map(str, TRITON_CAPABILITY))
    return f"{old[0]} is too old for the Triton kernels, which need {needed} or above" if old else ""


def why_no_code(architectures: str, present: Sequence[Gpu]) -> str:
    """Return why compiled kernels cannot run on GPUs, "" if they can on all of them.

    Args:
        architectures: What the kernels were compiled for, separated by spaces: "sm_80" is machine code, "compute_90"
            is PTX, which the driver compiles for newer GPUs.
        present: The GPUs.
    """
    for gpu in present:
        if not any(_runs_on(architecture, gpu.capability) for architecture in architectures.split()):
            major, minor = gpu.capability
            return (
                f"_C_cuda has no code for {gpu}, only {architectures or 'none'}; "
                f"install with TORCH_CUDA_ARCH_LIST={major}.{minor} set"
            )
    return ""


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an architecture runs on a GPU.

    Machine code runs on GPUs of the same major number whose minor number is not lower, PTX on all that are not older. A
    suffix restricts both: "a" to that very GPU, "f" to its family, which is taken to be its major number.
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if parts is None:
        return False
    compiled = int(parts[2]), int(parts[3])
    if parts[4] == "a":
        return capability == compiled
    if parts[1] == "sm" or parts[4] == "f":
        return capability[0] == compiled[0] and capability >= compiled
    return capability >= compiled
