"""Descriptions of one layer of `strided_conv`: the one that callers pass, and the one that kernels use."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class StridedConvLayer(NamedTuple):
    """One layer of `strided_conv_stack`.

    Attributes:
        weight: (C_out, C_in, K) weight of the convolution, in the dtype of the input.
        stride: Number of input frames from one output frame to the next.
        bias: (C_out,) bias, added before the norm; None adds none.
        norm: "none", "group" (over time, per sequence and channel) or "layer" (over channels, per frame).
        norm_weight: (C_out,) scale after the norm; None uses 1.
        norm_bias: (C_out,) shift after the norm; None uses 0.
        eps: Added to the variance.
        activation: "gelu" (exact) or "none".
    """

    weight: Tensor  # (C_out, C_in, K)
    stride: int
    bias: Tensor | None = None  # (C_out,)
    norm: Literal["none", "group", "layer"] = "none"
    norm_weight: Tensor | None = None  # (C_out,)
    norm_bias: Tensor | None = None  # (C_out,)
    eps: float = 1e-5
    activation: Literal["gelu", "none"] = "gelu"


class LayerPlan(NamedTuple):
    """One layer in one call. The fields after `cu_out` are in the order of the lists in the schema."""

    is_kept: bool  # whether the forward pass keeps the convolution's output for the backward pass
    cu_in: Tensor  # (B + 1,) where each sequence of the input begins
    cu_out: Tensor  # (B + 1,) where each sequence of the output begins
    weight: Tensor  # (C_out, C_in, K)
    bias: Tensor | None  # (C_out,)
    norm_weight: Tensor | None  # (C_out,)
    norm_bias: Tensor | None  # (C_out,)
    total: int  # number of output frames
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
        """C_out, the number of output channels."""
        return self.weight.shape[0]

    @property
    def kernel(self) -> int:
        """K, the number of input frames that an output frame is computed from."""
        return self.weight.shape[2]

    @property
    def window(self) -> int:
        """K * C_in, the number of contiguous input values that an output frame is computed from."""
        return self.weight.shape[1] * self.weight.shape[2]

    @property
    def halo(self) -> int:
        """The number of output frames before frame t whose windows overlap the window of frame t."""
        return halo(self.kernel, self.stride)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.cu_out.shape[0] - 1

    def new_statistics(self, x: Tensor) -> Tensor:  # (2, B, C_out)
        """Return zeros for group norm's mean and 1 / standard deviation, in at least fp32; (0,) without group norm."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.norm != "group":
            return x.new_empty(0, dtype=dtype)
        return x.new_zeros((2, self.batch, self.channels), dtype=dtype)


def halo(kernel: int, stride: int) -> int:
    """Return the number of output frames before frame t whose windows overlap the window of frame t."""
    return -(-kernel // stride) - 1


def plan_layers(cu_seqlens: Sequence[Tensor], weights: Sequence[Tensor], *lists: Sequence[Any]) -> list[LayerPlan]:
    """Turn the lists of the schema into one `LayerPlan` per layer.

    Args:
        cu_seqlens: L + 1 tensors (B + 1,): where each sequence of the input and of each layer's output begins.
        weights: L weights (C_out, C_in, K).
        lists: One list of L entries for each field of `LayerPlan` from `bias` on.

    Returns:
        L plans, from the first layer to the last.
    """
    fields = zip(cu_seqlens[:-1], cu_seqlens[1:], weights, *lists, strict=True)
    # The output of a first layer with one input channel is cheaper to recompute than to load.
    return [LayerPlan(index > 0 or weights[0].shape[1] > 1, *values) for index, values in enumerate(fields)]
