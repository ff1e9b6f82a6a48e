"""What the Triton kernels of `strided_conv` share: blocks of packed frames, windows of samples, GELU.

Blocks are counted from the beginning of their sequence, so a sequence has the same bits in any batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.strided_conv.plan import LayerPlan

#: Longest window, in samples, that is multiplied again rather than kept: with a column of ones it fits 32.
_LONGEST_WINDOW = 31
#: Widest output for which layer norm fits the kernels that make frames from windows.
_WIDEST_LAYER_NORM = 1024
#: Frames of one sequence that one program sums up before a second kernel takes over.
WINDOW_CHUNK, FRAME_CHUNK = 2048, 256


class RowGradients(NamedTuple):
    """What the backward of norm and activation leaves."""

    conv_out: Tensor | None = None  # (N_out, C_out), but for a layer made from windows, which has `weight` instead
    activated: Tensor | None = None  # (N_out, C_out), the layer's output again, on request
    weight: Tensor | None = None  # (C_out, C_in, K)
    bias: Tensor | None = None  # (C_out,)
    norm_weight: Tensor | None = None  # (C_out,)
    norm_bias: Tensor | None = None  # (C_out,)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Those of `LayerPlan.parameters`."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias


@triton.jit
def normal_at(x, EXACT: tl.constexpr):
    """Standard normal: the probability below x, and the density times sqrt(2 pi).

    Where 2e-7 is enough, as csrc/common/vector_math.h with coefficients halved: with rsqrt squared for the reciprocal
    and one exponential for both results, that is half the instructions of `tl.erf` and `tl.exp`.
    """
    bell = tl.exp2(x * x * -0.72134752044)
    if EXACT:
        below = 0.5 + 0.5 * tl.erf(x * 0.70710678119)
    else:
        root = tl.rsqrt(1.0 + 0.282842712 * tl.abs(x))
        t = root * root
        p = 0.02513105050
        p = p * t - 0.091450736
        p = p * t + 0.0845428185
        p = p * t - 0.00280394475
        p = p * t + 0.070715852
        p = p * t + 0.084270939
        p = p * t + 0.1039213615
        p = p * t + 0.1128347965
        p = p * t + 0.112837933
        tail = p * t * bell
        below = tl.where(x < 0, tail, 1.0 - tail)
    return below, bell


@triton.jit
def gelu_derivative(x, below, bell):
    """From what `normal_at` gives."""
    return below + x * bell * 0.3989422804


@triton.jit
def block_of(tile, cu_ptr, batch, BLOCK: tl.constexpr):
    """Sequence of a block, first frame of the block within it, and frames from there to its end, perhaps none.

    Sequence b has the blocks from cu[b] // BLOCK + b on. That leaves each enough of them, and at most one too many; so
    a grid of N // BLOCK + B programs needs to know nothing of the lengths.
    """
    sequence = -1
    for start in range(0, batch, 128):
        index = start + tl.arange(0, 128)
        begins = tl.load(cu_ptr + index, mask=index < batch, other=0)
        sequence += tl.sum(((index < batch) & (begins // BLOCK + index <= tile)).to(tl.int32))
    begin = tl.load(cu_ptr + sequence)
    first = (tile - begin // BLOCK - sequence) * BLOCK
    return sequence, first, tl.load(cu_ptr + sequence + 1) - begin - first


@triton.jit
def chunks_of(sequence, cu_ptr, CHUNK: tl.constexpr):
    """First block of a sequence, and the number of its blocks that have frames."""
    begin = tl.load(cu_ptr + sequence)
    frames = tl.load(cu_ptr + sequence + 1) - begin
    return begin // CHUNK + sequence, (frames + CHUNK - 1) // CHUNK, frames


@triton.jit
def load_windows(x_ptr, rows, valid, STEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K): the window of each frame, then a one, then zeros."""
    k = tl.arange(0, BLOCK_K)[None, :]
    windows = tl.load(x_ptr + rows[:, None] * STEP + k, mask=valid[:, None] & (k < WINDOW), other=0.0)
    return tl.where((k == WINDOW) & valid[:, None], 1.0, windows.to(tl.float32)).to(windows.dtype)


@triton.jit
def per_channel(ptr, channels, C, default: tl.constexpr):
    """(1, channels) of a vector in fp32, or of a default where there is none."""
    if ptr is None:
        values = tl.full(channels.shape, default, tl.float32)
    else:
        values = tl.load(ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    return values[None, :]


def block_for(size: int, largest: int) -> int:
    """Side of a tile: a power of two that holds `size`, from 16 to `largest`."""
    return min(largest, max(16, 1 << max(size - 1, 0).bit_length()))


def has_windows(layer: LayerPlan) -> bool:
    """Whether the kernels can make the frames of a layer from windows of the input, so that nothing is kept."""
    wide = layer.norm == "layer" and layer.channels > _WIDEST_LAYER_NORM
    return not layer.is_kept and layer.window <= _LONGEST_WINDOW and not wide


def window_block(layer: LayerPlan) -> int:
    """Side of a tile that holds a window and a one."""
    return block_for(layer.window + 1, 32)


def chunk_programs(layer: LayerPlan, chunk: int) -> int:
    """Programs that take a chunk each, as `block_of` counts them."""
    return layer.total // chunk + layer.batch


def precision_of(dtype: torch.dtype) -> str:
    """How products of fp32 numbers are made: TF32 where torch was told that it may, exactly otherwise."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
