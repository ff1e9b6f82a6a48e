"""The public functions of `prepacked_conv`, its operator and its checks."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.dispatch import INFERENCE_BACKENDS, NATIVE, Op
from fastssl.kernels.prepacked_conv import reference
from fastssl.kernels.prepacked_conv.weights import PrepackedWeight
from fastssl.packing import Layout

_SCHEMA = (
    "(Tensor x, Tensor? cu_in, Tensor? cu_out, SymInt total, int kernel, int stride, int padding, int groups,"
    " Tensor[] panels, Tensor[] scales, Tensor[] sums, Tensor[] biases, int[] channels, Tensor? norm_weight,"
    " Tensor? norm_bias, float eps, bool gelu, ScalarType dtype) -> Tensor[]"
)
_DTYPES = (torch.float32, torch.bfloat16)


def _fake(
    x: Tensor,
    cu_in: Tensor | None,
    cu_out: Tensor | None,
    total: int,
    kernel: int,
    stride: int,
    padding: int,
    groups: int,
    panels: list[Tensor],
    scales: list[Tensor],
    sums: list[Tensor],
    biases: list[Tensor],
    channels: list[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    return [x.new_empty((total, width), dtype=dtype) for width in channels]


_OP = Op("prepacked_conv", _fake, schemas=(_SCHEMA, None))
NATIVE.define("prepacked_conv_multiplies_bytes() -> bool")


@cache
def multiplies_bytes() -> bool:
    """Return whether the compiled kernel multiplies bytes on this processor; the reference does anywhere, slowly."""
    return (
        "native" in INFERENCE_BACKENDS["prepacked_conv"]["cpu"]
        and torch.ops.fastssl_native.prepacked_conv_multiplies_bytes()
    )


class RowNorm(NamedTuple):
    """A layer norm of the result's rows, before GELU.

    Attributes:
        weight: (C_out,) fp32 scale.
        bias: (C_out,) fp32 shift.
        eps: Added to the variance.
    """

    weight: Tensor  # (C_out,)
    bias: Tensor  # (C_out,)
    eps: float


def prepacked_linear(
    x: Tensor,  # (N, C_in)
    weights: Sequence[PrepackedWeight],
    *,
    gelu: bool = False,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> list[Tensor]:  # each (N, C_out)
    """Apply one or more linear layers with prepacked weights to the same rows, on the CPU and without gradients.

    A row has the same bits in any batch. In "int8", each row is rounded to 256 levels between its least and its largest
    value; zero is one of them.

    Args:
        x: (N, C_in) rows in fp32 or bf16.
        weights: Weights (C_out, C_in) from `prepack`, all in the same format.
        gelu: Whether GELU follows. In formats other than "fp32" it has an error of up to 5e-5.
        dtype: dtype of the results, fp32 or bf16.
        backend: "native" or "reference", see `fastssl.ops`; None picks the fastest available.

    Returns:
        (N, C_out) for each weight. Sums, bias and GELU are computed in fp32; "bf16" first rounds `x` to bf16.

    Raises:
        ValueError: A shape or dtype is invalid, `x` is not on the CPU, or `backend` cannot run this call.
    """
    if not weights or any(weight.shape[2] != 1 or weight.groups != 1 for weight in weights):
        raise ValueError("weights: expected one or more weights of linear layers")
    if x.dim() != 2:
        raise ValueError(f"x: expected (N, {weights[0].shape[1]}), got {tuple(x.shape)}")
    return run(x, weights, None, None, x.shape[0], gelu=gelu, dtype=dtype, backend=backend)


def prepacked_conv(
    x: Tensor,  # (N, C_in)
    weight: PrepackedWeight,
    layout: Layout,
    *,
    stride: int = 1,
    keep_length: bool = False,
    norm: RowNorm | None = None,
    gelu: bool = False,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Layout]:  # (N_out, C_out)
    """Convolve packed sequences with a prepacked weight, on the CPU and without gradients.

    Without `keep_length`, it is the convolution of `strided_conv`, and with it that of `positional_conv`. A frame has
    the same bits in any batch. In "int8", each input frame is rounded as `prepacked_linear` rounds a row.

    Args:
        x: (N, C_in) packed frames in fp32 or bf16.
        weight: Weight (C_out, C_in / G, K) from `prepack`.
        layout: Where each sequence of `x` begins.
        stride: Number of input frames from one output frame to the next.
        keep_length: Whether sequences keep their length, with zeros beyond their ends; `stride` must be 1.
        norm: Layer norm before GELU; None has none. G must be 1.
        gelu: Whether GELU follows. In formats other than "fp32" it has an error of up to 5e-5.
        dtype: dtype of the result, fp32 or bf16.
        backend: "native" or "reference", see `fastssl.ops`; None picks the fastest available.

    Returns:
        (N_out, C_out), and its layout. Sums, bias, norm and GELU are computed in fp32; "bf16" first rounds `x` to bf16.

    Raises:
        ValueError: A shape, dtype or option is invalid, `x` is not on the CPU, or `backend` cannot run this call.
    """
    kernel = weight.shape[2]
    if stride < 1 or (keep_length and stride != 1):
        raise ValueError(f"stride: must be {'1 with keep_length' if keep_length else 'at least 1'}, got {stride}")
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, C_in) for this layout, got {tuple(x.shape)}")
    out = layout if keep_length else layout.after_conv(kernel, stride)
    (values,) = run(
        x,
        [weight],
        layout.cu_seqlens,
        out.cu_seqlens,
        out.total,
        stride=stride,
        padding=kernel // 2 if keep_length else 0,
        norm=norm,
        gelu=gelu,
        dtype=dtype,
        backend=backend,
    )
    return values, out


def choose(x: Tensor, backend: str | None) -> str:
    """Return the backend of a call, see `Op.choose`; `x` must be on the CPU."""
    if x.device.type != "cpu":
        raise ValueError(f"x: prepacked weights run on the CPU only, got {x.device}")
    return _OP.choose(x, backend)


def run(
    x: Tensor,
    weights: Sequence[PrepackedWeight],
    cu_in: Tensor | None,
    cu_out: Tensor | None,
    total: int,
    *,
    stride: int = 1,
    padding: int = 0,
    norm: RowNorm | None = None,
    gelu: bool,
    dtype: torch.dtype,
    backend: str | None,
) -> list[Tensor]:
    """Check the arguments that all functions share, and run the operator; arguments as in the schema.

    Args:
        x: (N, G * C_in) rows.
        weights: Weights that multiply the same rows.
        cu_in: (B + 1,) where each sequence of `x` begins; None for a single one.
        cu_out: (B + 1,) where each sequence of the result begins; None for a single one.
        total: Number of rows of the result.
        stride: Number of input rows from one window to the next.
        padding: Number of rows of zeros before each sequence, and as many as windows need after it.
        norm: Layer norm of the result's rows.
        gelu: Whether GELU follows.
        dtype: dtype of the result.
        backend: As in `prepacked_conv`.
    """
    first = weights[0]
    width = first.shape[1] * first.groups
    if x.dim() != 2 or x.shape[1] != width or x.dtype not in _DTYPES:
        raise ValueError(f"x: expected (N, {width}) in float32 or bfloat16, got {tuple(x.shape)} {x.dtype}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: must be float32 or bfloat16, got {dtype}")
    if any(one.shape[1] != first.shape[1] or one.panels.dtype != first.panels.dtype for one in weights):
        raise ValueError("weights: must have the same input channels and the same format")
    if norm is not None:
        _check_norm(norm, weights)
    chosen = choose(x, backend)
    if chosen == "native" and first.format == "int8" and not multiplies_bytes():
        raise ValueError("weights: int8 needs a processor with AVX512-VNNI, which this one lacks; use bf16 or fp32")
    operator: Callable[..., list[Tensor]] = reference.prepacked_conv if chosen == "reference" else _OP.forward[chosen]
    with torch.no_grad():
        return operator(
            x.contiguous(),
            cu_in,
            cu_out,
            total,
            first.shape[2],
            stride,
            padding,
            first.groups,
            [one.panels for one in weights],
            [one.scales for one in weights if one.scales is not None],
            [one.sums for one in weights if one.sums is not None],
            [one.bias for one in weights],
            [one.shape[0] for one in weights],
            None if norm is None else norm.weight.contiguous(),
            None if norm is None else norm.bias.contiguous(),
            0.0 if norm is None else norm.eps,
            gelu,
            dtype,
        )


def _check_norm(norm: RowNorm, weights: Sequence[PrepackedWeight]) -> None:
    """Raise ValueError if a norm does not fit the results of all weights; the kernel reads it without a check."""
    for weight in weights:
        expected = (weight.shape[0],)
        if weight.groups > 1 or any(
            vector.shape != expected or vector.dtype != torch.float32 for vector in (norm.weight, norm.bias)
        ):
            raise ValueError(
                f"norm: expected vectors {expected} in float32 and a weight without groups, got "
                f"{tuple(norm.weight.shape)} {norm.weight.dtype}, {tuple(norm.bias.shape)} {norm.bias.dtype} and "
                f"{weight.groups} groups"
            )
