"""Strided convolution over packed sequences, with norm and activation, in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.strided_conv.plan import StridedConvLayer
from fastssl.packing import Layout


def strided_conv(
    x: Tensor,  # (N, C_in)
    layer: StridedConvLayer,
    layout: Layout,
) -> Tensor:  # (N_out, C_out)
    """Compute one sequence at a time, so that sequences cannot mix. Arguments as in `fastssl.ops.strided_conv`."""
    weight, stride, bias, norm, norm_weight, norm_bias, eps, activation = layer
    outputs = []
    # For an empty batch, run one empty sequence, so that every parameter gets a gradient of zero.
    for sequence in x.split(layout.lengths) if layout.lengths else (x,):
        if len(sequence) >= weight.shape[2]:
            frames = F.conv1d(sequence.t(), weight, stride=stride).t()
        else:
            frames = sequence[:0] @ weight[:, :, 0].t()
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        if bias is not None:
            frames = frames + bias
        if norm == "group":
            mean = frames.mean(0)
            variance = (frames - mean).square().mean(0)
            frames = (frames - mean) * torch.rsqrt(variance + eps)
        elif norm == "layer":
            frames = F.layer_norm(frames, frames.shape[1:], eps=eps)
        if norm_weight is not None:
            frames = frames * norm_weight
        if norm_bias is not None:
            frames = frames + norm_bias
        if activation == "gelu":
            frames = F.gelu(frames)
        outputs.append(frames.to(x.dtype))
    return torch.cat(outputs)
