"""The records of one layer of `strided_conv`: as the caller gives it, and as the kernels take it."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class StridedConvLayer(NamedTuple):
    """One layer of `strided_conv_stack`; the fields are the arguments of `strided_conv`."""

    weight: Tensor  # (C_out, C_in, K)
    stride: int
    bias: Tensor | None = None  # (C_out,)
    norm: Literal["none", "group", "layer"] = "none"
    norm_weight: Tensor | None = None  # (C_out,)
    norm_bias: Tensor | None = None  # (C_out,)
    eps: float = 1e-5
    activation: Literal["gelu", "none"] = "gelu"


class LayerPlan(NamedTuple):
    """One layer of one call. The fields after `cu_out` are in the order of the lists in the schema."""

    is_kept: bool  # whether the forward pass keeps the convolution's output for the backward pass
    cu_in: Tensor  # (B + 1,)
    cu_out: Tensor  # (B + 1,)
    weight: Tensor  # (C_out, C_in, K)
    bias: Tensor | None  # (C_out,)
    norm_weight: Tensor | None  # (C_out,)
    norm_bias: Tensor | None  # (C_out,)
    total: int  # frames of the output
    stride: int
    norm: str
    eps: float
    activation: str

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Weight, bias, norm weight and norm bias."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias

    @property
    def channels(self) -> int:
        """C_out."""
        return self.weight.shape[0]

    @property
    def kernel(self) -> int:
        """K, the input frames that one output frame sees."""
        return self.weight.shape[2]

    @property
    def window(self) -> int:
        """K * C_in, the contiguous numbers that one output frame is computed from."""
        return self.weight.shape[1] * self.weight.shape[2]

    @property
    def halo(self) -> int:
        """How many output frames before frame t see an input frame that frame t sees too."""
        return -(-self.kernel // self.stride) - 1

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.cu_out.shape[0] - 1

    def new_statistics(self, x: Tensor) -> Tensor:  # (2, B, C_out)
        """Zeros for the mean and rstd of group norm, in the accumulation type of `x`; (0,) without group norm."""
        shape = (2, self.batch, self.channels) if self.norm == "group" else (0,)
        return x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def plan_layers(cu_seqlens: Sequence[Tensor], weights: Sequence[Tensor], *lists: Sequence[Any]) -> list[LayerPlan]:
    """One record per layer from the lists of the schema, which all but `cu_seqlens` have one entry per layer.

    Args:
        cu_seqlens: L + 1 of (B + 1,): where each sequence of the input and of each layer's output begins.
        weights: L of (C_out, C_in, K).
        lists: The fields of `LayerPlan` from `bias` on.
    """
    fields = zip(cu_seqlens[:-1], cu_seqlens[1:], weights, *lists, strict=True)
    # A first layer with one input channel is cheaper to compute again than to load.
    return [LayerPlan(index > 0 or weights[0].shape[1] > 1, *values) for index, values in enumerate(fields)]
