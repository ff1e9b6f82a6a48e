"""Launch settings of the Triton kernels of `varlen_attention`: sizes of tiles, warps and pipeline stages."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.precision import precision_of


class Launch(NamedTuple):
    """Launch settings of a kernel: queries and keys per tile, warps per program, and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Options of the launch that are not arguments of the kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @staticmethod
    def grid(block: int, arguments: dict[str, Any]) -> tuple[int, int]:
        """Return the grid: one program for each block that `block_of` numbers and each head."""
        return arguments["total"] // block + arguments["batch"], arguments["heads"]


class Launches(NamedTuple):
    """Launch settings of the four kernels."""

    forward: Launch
    backward_q: Launch
    backward_kv: Launch
    backward_bias: Launch


def launches_for(
    q: Tensor,  # (N, H, E)
    biased: bool,
    max_length: int,
) -> Launches:
    """Return launch settings that let the kernels compile without spills for sm_90 (see README.md).

    Settings that change the order of a sum must not depend on the lengths, or the bits of a sequence would depend on
    its batch. The forward computes each query on its own, so its `block_m` may depend on them: it is smaller for short
    sequences.
    """
    if q.dtype == torch.float32:
        if precision_of("varlen_attention", q) == "ieee":  # no tensor cores
            return Launches(*[Launch(32, 32, 8, 1)] * 4)
        few, many = Launch(32, 32, 4, 2), Launch(32, 32, 8, 2)
        return Launches(Launch(64, 32, 4, 2), few if q.shape[2] <= 64 else many, few, few)
    small, wide = Launch(64, 64, 4, 2), Launch(64, 64, 8, 2)
    forward = small if biased or max_length <= 256 else Launch(128, 64, 8, 3)
    if q.shape[2] <= 64:
        return Launches(forward, small, small, wide)
    return Launches(forward, wide if biased else small, wide, wide)
