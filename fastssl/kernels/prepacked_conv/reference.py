"""The reference for `prepacked_conv` in plain PyTorch; specification: `README.md` of this op."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def prepacked_conv(
    x: Tensor,  # (N, G * C_in)
    cu_in: Tensor | None,  # (B + 1,)
    cu_out: Tensor | None,  # (B + 1,)
    total: int,
    kernel: int,
    stride: int,
    padding: int,
    groups: int,
    panels: Sequence[Tensor],  # (P, K * steps, 64, U)
    scales: Sequence[Tensor],  # (P, 64)
    sums: Sequence[Tensor],  # (K, P, 64)
    biases: Sequence[Tensor],  # (P, 64)
    channels: Sequence[int],
    norm_weight: Tensor | None,  # (C_out,)
    norm_bias: Tensor | None,  # (C_out,)
    eps: float,
    gelu: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # each (N_out, C_out)
    """Compute the products of `op.prepacked_conv` and `op.prepacked_linear`; arguments as in the schema."""
    stored = panels[0].dtype
    frames = x.float()
    if stored == torch.int8:
        values, scale, zero = _to_bytes(frames)
        frames = scale * (values - zero)
    elif stored == torch.bfloat16:
        frames = frames.bfloat16().float()
    if cu_in is None or cu_out is None:
        begins = [(0, len(x))]
    else:
        begins = list(zip(cu_in[:-1].tolist(), cu_in[1:].tolist(), strict=True))
    unfolded = [_windows(frames[begin:end], kernel, stride, padding, groups) for begin, end in begins]
    rows = torch.cat(unfolded, 1) if unfolded else frames.new_empty(groups, 0, kernel * x.shape[1] // groups)
    outs = []
    for index, width in enumerate(channels):
        weight = _matrix(panels[index], scales[index] if scales else None, kernel, x.shape[1] // groups)
        columns = torch.bmm(rows.double(), weight.view(groups, -1, weight.shape[1]).double().mT).float()
        out = columns[..., : width // groups].permute(1, 0, 2).reshape(-1, width)
        out = out + biases[index].view(groups, -1)[:, : width // groups].reshape(width)
        if norm_weight is not None:
            out = F.layer_norm(out, (width,), norm_weight, norm_bias, eps)
        outs.append((F.gelu(out) if gelu else out).to(dtype))
    return outs


def _to_bytes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (N, C) -> (N, C), (N, 1), (N, 1)
    """Round each row to 256 levels between its least and its largest value, or zero if that lies outside."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    span = high - low
    usable = (span > 1e-30) & span.isfinite()
    inverse = torch.where(usable, 255 / span, 0.0)
    # Products in fp64 are exact, so that they are rounded once.
    zero = (-low.double() * inverse.double()).round().float()
    values = ((x.double() * inverse.double()).round().float() + zero).clamp(0, 255)
    probe = (x * 0).sum(1, keepdim=True)  # NaN if a value is not finite
    scale = torch.where(usable, span / 255, torch.where(span > 1e-30, torch.nan, 0.0))
    return values, scale + probe, zero


def _windows(x: Tensor, kernel: int, stride: int, padding: int, groups: int) -> Tensor:
    """Return the windows (G, T_out, K * C) of a sequence (T, G * C); with padding, as many as there are frames."""
    length, width = x.shape
    if padding:
        x = F.pad(x, (0, 0, padding, kernel - 1 - padding))
    if len(x) < kernel or not length:
        return x.new_empty(groups, 0, kernel * width // groups)
    windows = x.unfold(0, kernel, stride)  # (T_out, G * C, K)
    by_group: Tensor = windows.unflatten(1, (groups, width // groups)).permute(1, 0, 3, 2)
    return by_group.flatten(2)


def _matrix(panels: Tensor, scales: Tensor | None, kernel: int, channels: int) -> Tensor:  # (P * 64, K * C_in)
    """Return the weight of all output channels, those that fill up the last panels included."""
    values = panels.float()
    if scales is not None:
        values = values * scales[:, None, :, None]
    by_column: Tensor = values.unflatten(1, (kernel, -1)).permute(0, 3, 1, 2, 4)  # (P, 64, K, steps, U)
    return by_column.flatten(3)[..., :channels].flatten(2).flatten(0, 1)
