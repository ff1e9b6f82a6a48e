"""Rotary position embedding (RoFormer, arXiv 2104.09864) over packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.packing import Layout

_BASE = 10000.0


class Rotation(NamedTuple):
    """Cosine and sine of the rotation angle of each channel pair of each frame."""

    cos: Tensor  # (N, 1, E / 2) fp32 or fp64
    sin: Tensor  # (N, 1, E / 2) fp32 or fp64


def rotation(layout: Layout, width: int) -> Rotation:
    """Compute the rotation of each frame: pair i turns by position * 10000 ** (-2i / E) (arXiv 2104.09864, eq. 15).

    Args:
        layout: Layout of the frames; positions count from 0 in each sequence.
        width: E, the number of channels of a head.

    Returns:
        Cosines and sines, (N, 1, E / 2) fp32 each, on the layout's device.

    Raises:
        ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f"width: channels are rotated in pairs, so the width of a head must be even, got {width}")
    exponents = torch.arange(0, width, 2, device=layout.cu_seqlens.device, dtype=torch.float64) / width
    return rotation_by(layout, _BASE**-exponents, torch.float32)


def rotation_by(layout: Layout, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """Compute the rotation of each frame from the frequency of each channel pair.

    Args:
        layout: Layout of the frames; positions count from 0 in each sequence.
        frequencies: (E / 2,) radians per frame, fp32 or fp64, in which the angles are computed.
        dtype: Dtype of the result. Cosines and sines are computed in fp64 and then rounded, so that they do not depend
            on a frame's place in the batch.

    Returns:
        Cosines and sines, (N, 1, E / 2) each, on the layout's device.
    """
    angles = (layout.positions.unsqueeze(1) * frequencies).unsqueeze(1).double()
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Rotate queries or keys, so that positions affect their dot products only through the distance of two frames.

    Args:
        x: (N, H, E) queries or keys. Channel i of the first half and channel i of the second half form a pair.
        turn: The rotation of the layout of `x`, for width E.

    Returns:
        (N, H, E) in the dtype of `x`; computed in at least fp32.
    """
    first, second = x.chunk(2, dim=2)
    turned = torch.cat((first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin), 2)
    return turned.to(x.dtype)
