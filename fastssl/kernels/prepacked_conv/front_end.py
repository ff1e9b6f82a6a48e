"""A stack of strided convolutions for inference: the first one from the waveform, the others with prepacked weights.

A block of frames passes through all layers before the next block starts, so the activations of a layer exist for one
block at a time. Blocks overlap by the frames that windows share; these are computed twice. Sequences are placed on the
grids of `strided_conv`, so that a block is one sequence to each layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.prepacked_conv.op import RowNorm, choose, prepacked_conv, run
from fastssl.kernels.prepacked_conv.weights import PrepackedWeight
from fastssl.kernels.strided_conv.blocks import Layer, grids
from fastssl.kernels.strided_conv.op import strided_conv_stack
from fastssl.kernels.strided_conv.plan import LayerPlan, StridedConvLayer
from fastssl.packing import Layout

#: Number of frames of the last layer in a block: fewer are slower because blocks overlap, more do not fit in cache.
_BLOCK_FRAMES = 96


class PrepackedConvLayer(NamedTuple):
    """One layer of `prepacked_front_end` after the first.

    Attributes:
        weight: Weight (C_out, C_in, K) from `prepack`.
        stride: Number of input frames from one output frame to the next.
        norm: Layer norm before GELU; None has none.
        dtype: dtype of the output, fp32 or bf16.
    """

    weight: PrepackedWeight
    stride: int
    norm: RowNorm | None
    dtype: torch.dtype


def prepacked_front_end(
    x: Tensor,  # (N, 1)
    first: StridedConvLayer,
    layers: Sequence[PrepackedConvLayer],
    layout: Layout,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Layout]:  # (N_out, C_out)
    """Run the front end of wav2vec 2.0 (arXiv 2006.11477, section 2) for inference, on the CPU and without gradients.

    Args:
        x: (N, 1) waveforms in fp32.
        first: The first convolution, in fp32, with one input channel.
        layers: One or more layers with prepacked weights, each with GELU.
        layout: Where each waveform begins.
        dtype: dtype of the first layer's output, fp32 or bf16.
        backend: Implementation of the layers after the first, see `prepacked_conv`.

    Returns:
        (N_out, C_out) in the dtype of the last layer, and its layout. A frame has the same bits in any batch.

    Raises:
        ValueError: A shape or dtype is invalid, or `backend` cannot run this call.
    """
    if not layers or x.dim() != 2 or x.shape != (layout.total, 1) or x.dtype != torch.float32:
        raise ValueError(f"x: expected ({layout.total}, 1) in float32 for this layout, got {tuple(x.shape)} {x.dtype}")
    if choose(x, backend) == "reference" or torch.compiler.is_exporting():  # the blocks depend on the lengths
        values, layout = strided_conv_stack(x, [first], layout)
        values = values.to(dtype)
        for layer in layers:
            values, layout = prepacked_conv(
                values,
                layer.weight,
                layout,
                stride=layer.stride,
                norm=layer.norm,
                gelu=True,
                dtype=layer.dtype,
                backend=backend,
            )
        return values, layout
    layouts = [layout.after_conv(first.weight.shape[2], first.stride)]
    for layer in layers:
        layouts.append(layouts[-1].after_conv(layer.weight.shape[2], layer.stride))
    with torch.no_grad():
        return _run_blocks(x.contiguous(), first, layers, [layout, *layouts], dtype), layouts[-1]


def _run_blocks(
    x: Tensor,  # (N, 1)
    first: StridedConvLayer,
    layers: Sequence[PrepackedConvLayer],
    layouts: Sequence[Layout],  # of the input, and of the output of each layer
    dtype: torch.dtype,
) -> Tensor:  # (N_out, C_out)
    """Run the layers block by block with compiled kernels; arguments as in `prepacked_front_end`."""
    begins = [layout.cu_seqlens for layout in layouts]
    shapes = [(first.weight.shape[2], first.stride), *((layer.weight.shape[2], layer.stride) for layer in layers)]
    _, *layer_grids = grids(begins[1:], shapes)
    plan = LayerPlan(
        False,
        begins[0],
        begins[1],
        first.weight,
        first.bias,
        first.norm_weight,
        first.norm_bias,
        layouts[1].total,
        first.stride,
        first.norm,
        first.eps,
        first.activation,
    )
    computed = Layer(plan, layer_grids[0], x, x.new_empty(0, plan.channels), plan.new_statistics(x), from_input=True)
    if plan.norm == "group":
        computed.statistics = computed.first_statistics()[0]
    rows, width = int(layer_grids[-1][-1]), layers[-1].weight.shape[0]
    out = x.new_empty(rows, width, dtype=layers[-1].dtype)
    for start in range(0, rows, _BLOCK_FRAMES):
        ranges = [(start, min(start + _BLOCK_FRAMES, rows))]
        for kernel, stride in reversed(shapes[1:]):
            low, high = ranges[-1]
            ranges.append((low * stride, (high - 1) * stride + kernel))
        low, high = ranges.pop()
        block = x.new_empty(high - low, plan.channels, dtype=dtype)
        torch.ops.fastssl_native.strided_conv_epilogue_fwd(
            *computed.operands, low, high - low, block, False, 1, 1, *computed.epilogue
        )
        for layer in layers:
            low, high = ranges.pop()
            (block,) = run(
                block,
                [layer.weight],
                None,
                None,
                high - low,
                stride=layer.stride,
                norm=layer.norm,
                gelu=True,
                dtype=layer.dtype,
                backend="native",
            )
        out[start : start + len(block)] = block
    last = layouts[-1]
    return out.index_select(0, layer_grids[-1][:-1].index_select(0, last.sequence_ids) + last.positions)
