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
    """Grouped convolution over the frames of each sequence, as long as its input (arXiv 2006.11477, section 2).

    Output frame t is the sum over taps k of weight[:, :, k] times input frame t + k - K // 2, with zeros beyond the
    ends of its own sequence: Transformers' and fairseq's convolution with padding K // 2, of which an even kernel drops
    the last frame.

    Args:
        x: (N, D) packed frames.
        weight: (D, D/G, K), as `torch.nn.Conv1d` with G groups stores it, in the dtype of `x`.
        layout: Where each sequence begins.
        bias: (D,).
        backend: See `fastssl.ops`; None takes the fastest there is.

    Returns:
        (N, D) in the dtype of `x`, which under autocast is autocast's.

    Raises:
        ValueError: Shapes or dtypes do not fit, or `backend` cannot serve the call.
    """
    x, weight, bias = to_autocast_dtype(x, weight, bias)
    _check(x, weight, layout, bias)
    unsupported = {}
    if x.dtype == torch.float64:
        unsupported["torch"] = "its gradient is computed in fp32"
    elif x.dtype == torch.float16 and x.device.type == "cpu":
        unsupported["torch"] = "oneDNN has no convolution in fp16 for every CPU"
    elif layout.total == 0:
        unsupported["torch"] = "it takes no empty batch"
    chosen = _OP.choose(x, backend, unsupported)
    implementation = {"torch": torch_conv.positional_conv, "reference": reference.positional_conv}[chosen]
    with autocast_off(x):
        return implementation(x.contiguous(), weight, layout, bias=bias)


def _check(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, D) for this layout, got {tuple(x.shape)}")
    if layout.cu_seqlens.device != x.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, x on {x.device}")
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[0] != channels or weight.shape[1] == 0 or channels % weight.shape[1]:
        raise ValueError(f"weight: expected ({channels}, {channels} / groups, K), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"weight and bias: must be {x.dtype} as x")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected ({channels},), got {tuple(bias.shape)}")
