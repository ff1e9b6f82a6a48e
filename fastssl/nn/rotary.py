"""Rotary positions over packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.packing import Layout

_BASE = 10000.0


class Rotation(NamedTuple):
    """By which angles each frame is turned."""

    cos: Tensor  # (N, 1, E / 2) fp32
    sin: Tensor  # (N, 1, E / 2) fp32


def rotation(layout: Layout, width: int) -> Rotation:
    """Angles of every frame, position times base ** (-2i / E) (RoFormer, arXiv 2104.09864, equation 15).

    Args:
        layout: Positions begin at 0 in each sequence.
        width: E, the width of a head.

    Raises:
        ValueError: The width is odd.
    """
    if width % 2:
        raise ValueError(f"width: a head is turned by pairs of channels, so its width must be even, got {width}")
    exponents = torch.arange(0, width, 2, device=layout.cu_seqlens.device, dtype=torch.float64) / width
    angles = (layout.positions.unsqueeze(1) * _BASE**-exponents).unsqueeze(1)
    return Rotation(angles.cos().float(), angles.sin().float())


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn queries or keys: the products of turned ones depend on the distance of their frames alone.

    Args:
        x: (N, H, E); channel i of its first half and channel i of its second are a pair.
        turn: Of the layout of `x`.

    Returns:
        (N, H, E) in the dtype of `x`.
    """
    first, second = x.chunk(2, dim=2)
    turned = torch.cat((first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin), 2)
    return turned.to(x.dtype)
