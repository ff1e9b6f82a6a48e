"""The positional convolution in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.packing import Layout


def positional_conv(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (D, D/G, K)
    layout: Layout,
    *,
    bias: Tensor | None,  # (D,)
) -> Tensor:  # (N, D)
    """Convolve one sequence at a time. Arguments as in `fastssl.ops.positional_conv`."""
    groups, padding = x.shape[1] // weight.shape[1], weight.shape[2] // 2
    # For an empty batch, convolve one frame of zeros and drop it, so that autograd still reaches every input.
    sequences = [frames for frames in x.split(layout.lengths) if len(frames)] or [F.pad(x, (0, 0, 0, 1))]
    outputs = [
        F.conv1d(frames.t(), weight, bias, padding=padding, groups=groups)[:, : len(frames)].t() for frames in sequences
    ]
    return torch.cat(outputs)[: len(x)]
