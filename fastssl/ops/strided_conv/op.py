"""The public function of `strided_conv` and its checks."""

from typing import Literal

import torch
from torch import Tensor

from fastssl.ops._dispatch import choose_backend, define_op
from fastssl.ops.strided_conv import reference, torch_gemm
from fastssl.packing import Layout

define_op("strided_conv", torch_devices=("cpu",))


def strided_conv(
    x: Tensor,  # (N, C_in)
    weight: Tensor,  # (C_out, C_in, K)
    layout: Layout,
    *,
    stride: int,
    bias: Tensor | None = None,  # (C_out,)
    norm: Literal["none", "group", "layer"] = "none",
    norm_weight: Tensor | None = None,  # (C_out,)
    norm_bias: Tensor | None = None,  # (C_out,)
    eps: float = 1e-5,
    activation: Literal["gelu", "none"] = "gelu",
    backend: str | None = None,
) -> tuple[Tensor, Layout]:  # (N_out, C_out)
    """Strided convolution of packed sequences, then norm, then activation (wav2vec 2.0, arXiv 2006.11477, section 2).

    No padding: a sequence of T frames gives floor((T - K) / stride) + 1 of them, and none when T < K. Nothing crosses
    the border between sequences. "group" normalises each channel over the frames of its utterance (GroupNorm with
    C_out groups), so the result does not depend on what an utterance was batched with.

    Args:
        x: (N, C_in) packed frames, channels last.
        weight: (C_out, C_in, K), as `torch.nn.Conv1d` stores it, in the dtype of `x`.
        layout: Where each sequence of `x` begins.
        stride: Input frames from one output frame to the next.
        bias: (C_out,) added before the norm.
        norm: "none", "group" (over time, per utterance and channel) or "layer" (over channels, per frame).
        norm_weight: (C_out,) scale after the norm.
        norm_bias: (C_out,) shift after the norm.
        eps: Added to the variance.
        activation: "gelu" (with erf, not the tanh approximation) or "none".
        backend: See `fastssl.ops`; None takes the fastest there is.

    Returns:
        (N_out, C_out) in the dtype of `x`, and its layout. Under autocast `x` and `weight` are cast to its dtype. Norm
        and activation are computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: Shapes, dtypes or options do not fit, or `backend` cannot serve the call.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    _check(x, weight, layout, stride, bias, norm, norm_weight, norm_bias, activation)
    unsupported = {}
    if x.dtype not in (torch.float32, torch.float64):
        unsupported["torch"] = f"its products are rounded one by one, which is too coarse for {x.dtype}"
    chosen = choose_backend("strided_conv", x, backend, unsupported=unsupported)
    implementation = {"torch": torch_gemm.strided_conv, "reference": reference.strided_conv}[chosen]
    with torch.autocast(x.device.type, enabled=False):
        out = implementation(
            x,
            weight,
            layout,
            stride=stride,
            bias=bias,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            activation=activation,
        )
    return out, layout.after_conv(weight.shape[2], stride)


def _check(
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    stride: int,
    bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
) -> None:
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, C_in) for this layout, got {tuple(x.shape)}")
    if layout.cu_seqlens.device != x.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, x on {x.device}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected (C_out, {x.shape[1]}, K), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: dtype {weight.dtype} does not match x, which is {x.dtype}")
    if stride < 1:
        raise ValueError(f"stride: must be at least 1, got {stride}")
    if norm not in ("none", "group", "layer"):
        raise ValueError(f"norm: must be 'none', 'group' or 'layer', got {norm!r}")
    if activation not in ("gelu", "none"):
        raise ValueError(f"activation: must be 'gelu' or 'none', got {activation!r}")
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError("norm_weight and norm_bias: given, but norm is 'none'")
    for name, parameter in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None and parameter.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected ({weight.shape[0]},), got {tuple(parameter.shape)}")
