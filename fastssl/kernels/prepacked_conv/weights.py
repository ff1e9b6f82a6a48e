"""Weights in the layout that the kernels read, and back."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: How a prepacked weight stores and multiplies its values.
Format = Literal["fp32", "bf16", "int8"]
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8")

_PANEL_COLUMNS = 64
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_VALUES_PER_UNIT = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
#: Deepest sum of products of bytes that always fits into 32 bits.
_DEEPEST_INT8 = (2**31 - 1) // (255 * 127)


class PrepackedWeight(NamedTuple):
    """Weight and bias of a convolution or linear layer, from `prepack`; all tensors are on the CPU.

    P is the number of panels of 64 output channels, of all G groups together; the last panel of a group is filled up
    with zeros.

    Attributes:
        panels: (P, K * steps, 64, U) values in fp32, bf16 or int8: a step holds U input channels of a tap.
        bias: (P, 64) fp32.
        scales: (P, 64) fp32, for each output channel the factor of its int8 values; None for other formats.
        sums: (K, P, 64) fp32, sums of the int8 values of each tap; None for other formats.
        shape: C_out, C_in / G and K, the shape of the weight that was prepacked.
        groups: G, the number of channel groups.
        has_bias: Whether a bias was given.
    """

    panels: Tensor  # (P, K * steps, 64, U)
    bias: Tensor  # (P, 64)
    scales: Tensor | None  # (P, 64)
    sums: Tensor | None  # (K, P, 64)
    shape: tuple[int, int, int]
    groups: int
    has_bias: bool

    @property
    def format(self) -> Format:
        """How the values are stored."""
        return next(name for name in FORMATS if _DTYPES[name] == self.panels.dtype)

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(x.nbytes for x in self if isinstance(x, Tensor))


def prepack(
    weight: Tensor,  # (C_out, C_in / G, K)
    bias: Tensor | None = None,  # (C_out,)
    *,
    format: Format,
    groups: int = 1,
) -> PrepackedWeight:
    """Lay out the weight of a convolution or linear layer for `prepacked_conv`.

    In "int8", each output channel has a scale of its own: its largest value becomes 127 or -127. In "bf16", values are
    rounded to the nearest.

    Args:
        weight: (C_out, C_in / G, K) weight as `torch.nn.Conv1d` stores it, or (C_out, C_in) as `torch.nn.Linear` does,
            in fp32, bf16 or fp16.
        bias: (C_out,) bias, or None.
        format: "fp32", "bf16" or "int8".
        groups: G, the number of channel groups; must divide C_out.

    Returns:
        Copies of the values, in the kernel's layout.

    Raises:
        ValueError: A shape or dtype is invalid, the format is unknown, a value is not finite in "int8", or its sum over
            the input channels may not fit into 32 bits.
    """
    if format not in FORMATS:
        raise ValueError(f"format: must be one of {', '.join(FORMATS)}, got {format!r}")
    if weight.dim() == 2:
        weight = weight.unsqueeze(2)
    if weight.dim() != 3 or 0 in weight.shape or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"weight: expected (C_out, C_in / {groups}, K) or (C_out, C_in), got {tuple(weight.shape)}")
    c_out, c_in, kernel = weight.shape
    if bias is not None and bias.shape != (c_out,):
        raise ValueError(f"bias: expected ({c_out},), got {tuple(bias.shape)}")
    if not weight.is_floating_point() or weight.dtype == torch.float64:
        raise ValueError(f"weight: must be float32, bfloat16 or float16, got {weight.dtype}")
    if format == "int8" and c_in > _DEEPEST_INT8:
        raise ValueError(f"weight: int8 supports up to {_DEEPEST_INT8} input channels, got {c_in}")
    vector = torch.zeros(c_out, device="cpu") if bias is None else bias.detach().float().cpu()
    with torch.no_grad():
        panels, scales, sums = _panels(weight.detach(), format, groups)
        return PrepackedWeight(
            panels, _by_panel(vector, groups), scales, sums, (c_out, c_in, kernel), groups, bias is not None
        )


def unpack(prepacked: PrepackedWeight) -> tuple[Tensor, Tensor | None]:
    """Return the weight (C_out, C_in / G, K) and the bias (C_out,), None if there is none, as the kernels use them.

    Both are fp32. The weight is exact for "fp32", rounded for "bf16", and scale times value for "int8".
    """
    (c_out, c_in, kernel), groups, panels = prepacked.shape, prepacked.groups, prepacked.panels
    values = panels.float()
    if prepacked.scales is not None:
        values = values * prepacked.scales[:, None, :, None]
    values = values.view(groups, -1, kernel, panels.shape[1] // kernel, _PANEL_COLUMNS, panels.shape[3])
    values = values.permute(0, 1, 4, 3, 5, 2).reshape(groups, -1, panels.shape[1] // kernel * panels.shape[3], kernel)
    weight = values[:, : c_out // groups, :c_in].reshape(c_out, c_in, kernel)
    bias = prepacked.bias.view(groups, -1)[:, : c_out // groups].reshape(c_out)
    return weight, bias.clone() if prepacked.has_bias else None


def _by_panel(vector: Tensor, groups: int) -> Tensor:  # (C_out,) -> (P, 64)
    rows = vector.view(groups, -1)
    return F.pad(rows, (0, -rows.shape[1] % _PANEL_COLUMNS)).reshape(-1, _PANEL_COLUMNS).contiguous()


def _panels(weight: Tensor, format: Format, groups: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return panels, scales and sums of a weight (C_out, C_in / G, K).

    One panel is computed at a time: whole temporary copies of each weight would leave holes in the heap.
    """
    c_out, c_in, kernel = weight.shape
    dtype = _DTYPES[format]
    unit = _VALUES_PER_UNIT[dtype]
    steps, columns = math.ceil(c_in / unit), math.ceil(c_out / groups / _PANEL_COLUMNS)
    panels = torch.zeros(groups * columns, kernel * steps, _PANEL_COLUMNS, unit, dtype=dtype, device="cpu")
    scales = sums = None
    if format == "int8":
        scales = torch.zeros(groups * columns, _PANEL_COLUMNS, device="cpu")
        sums = torch.zeros(kernel, groups * columns, _PANEL_COLUMNS, device="cpu")
    for group, rows in enumerate(weight.split(c_out // groups)):
        for column, part in enumerate(rows.split(_PANEL_COLUMNS)):
            number, count = group * columns + column, len(part)
            values = torch.zeros(_PANEL_COLUMNS, kernel, steps * unit, device="cpu")
            values[:count, :, :c_in] = part.transpose(1, 2)
            if scales is not None and sums is not None:
                peaks = values.abs().amax((1, 2))
                if not peaks.isfinite().all():
                    raise ValueError("weight: contains NaN or infinity, which int8 cannot hold")
                scales[number] = peaks / 127
                values.mul_(torch.where(peaks > 0, 127 / peaks, 0.0)[:, None, None]).round_().clamp_(-127, 127)
                sums[:, number] = values.sum(2).t()
            panels[number] = values.view(_PANEL_COLUMNS, kernel * steps, unit).transpose(0, 1)
    return panels, scales, sums
