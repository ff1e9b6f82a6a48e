"""The public function of `positional_conv` and its checks."""

import torch
from torch import Tensor

from fastssl.kernels.dispatch import Op, autocast_off, to_autocast_dtype
from fastssl.kernels.positional_conv import reference, torch_conv
from fastssl.packing import Layout

_OP = Op("positional_conv", torch_devices=("cpu", "cuda"))


def positional_conv(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (D, D/G, K)
    layout: Layout,
    *,
    bias: Tensor | None = None,  # (D,)
    backend: str | None = None,
) -> Tensor:  # (N, D)
    """Grouped convolution over the frames of each sequence that keeps its length (arXiv 2006.11477, section 2).

    Output frame t is the sum over k of weight[:, :, k] times input frame t + k - K // 2, with zeros beyond the ends of
    the sequence. This is the convolution of Transformers and fairseq with padding K // 2, where for an even kernel the
    extra frame at the end is dropped.

    Args:
        x: (N, D) packed frames.
        weight: (D, D/G, K), as `torch.nn.Conv1d` with G groups stores it, in the dtype of `x`.
        layout: Where each sequence begins.
        bias: (D,) in the dtype of `x`, or None.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        (N, D) in the dtype of `x`. Under autocast, `x`, `weight` and `bias` are cast to autocast's dtype first.

    Raises:
        ValueError: Shapes or dtypes do not fit, or `backend` cannot serve the call.
    """
    x, weight, bias = to_autocast_dtype(x, weight, bias)
    _check(x, weight, layout, bias)
    unsupported = {}
    if x.dtype == torch.float64:
        unsupported["torch"] = "it computes gradients in float32"
    elif x.dtype == torch.float16 and x.device.type == "cpu":
        unsupported["torch"] = "oneDNN supports float16 convolutions on some CPUs only"
    elif layout.total == 0:
        unsupported["torch"] = "it does not support empty batches"
    chosen = _OP.choose(x, backend, unsupported)
    implementation = {"torch": torch_conv.positional_conv, "reference": reference.positional_conv}[chosen]
    with autocast_off(x):
        return implementation(x.contiguous(), weight, layout, bias=bias)


def _check(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, D) for this layout, got {tuple(x.shape)}")
    if layout.cu_seqlens.device != x.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, must be on {x.device} like x")
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[0] != channels or weight.shape[1] == 0 or channels % weight.shape[1]:
        raise ValueError(f"weight: expected ({channels}, {channels} / groups, K), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"weight and bias: must be {x.dtype} like x")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected ({channels},), got {tuple(bias.shape)}")
