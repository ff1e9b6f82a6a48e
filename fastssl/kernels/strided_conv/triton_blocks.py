"""Helpers of the Triton kernels of `strided_conv`: blocks of packed frames, windows of samples.

Blocks are counted from the start of their sequence, so a sequence has the same bits in any batch.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.strided_conv.plan import LayerPlan

#: Longest window (samples) whose product is recomputed rather than stored. With a column of ones, it fits in 32
#: columns.
_LONGEST_WINDOW = 31
#: Largest number of channels for which the kernels that compute frames from windows support layer norm. With 1024, a
#: tile of fp32 would need 131 KiB of shared memory, more than the 99 KiB of sm_86, and bf16 would spill 1.5 KB.
_WIDEST_LAYER_NORM = 512
#: Number of frames of one sequence that one program sums; a second kernel adds the sums of these chunks.
WINDOW_CHUNK, FRAME_CHUNK = 2048, 256


class RowGradients(NamedTuple):
    """Gradients that the backward of norm and activation computes."""

    conv_out: Tensor | None = None  # (N_out, C_out); None if computed from windows; `weight` is then set
    activated: Tensor | None = None  # (N_out, C_out) the layer's output, recomputed on request
    weight: Tensor | None = None  # (C_out, C_in, K)
    bias: Tensor | None = None  # (C_out,)
    norm_weight: Tensor | None = None  # (C_out,)
    norm_bias: Tensor | None = None  # (C_out,)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Gradients of weight, bias, norm weight and norm bias, in the order of `LayerPlan.parameters`."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias


@triton.jit
def block_of(tile, cu_ptr, batch, BLOCK: tl.constexpr):
    """Locate block `tile`: return its sequence, its first frame there, and the number of frames from it to the end.

    The blocks of sequence b start at number cu[b] // BLOCK + b. They cover its frames, and at most one of them has
    no frames. So N // BLOCK + B programs cover all sequences, and the host need not know the lengths.
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
    """Return a sequence's first block, the number of its blocks that have frames, and the number of its frames."""
    begin = tl.load(cu_ptr + sequence)
    frames = tl.load(cu_ptr + sequence + 1) - begin
    return begin // CHUNK + sequence, (frames + CHUNK - 1) // CHUNK, frames


@triton.jit
def load_windows(x_ptr, rows, valid, STEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load (rows, BLOCK_K): each row has the window of a frame, then a one, then zeros."""
    k = tl.arange(0, BLOCK_K)[None, :]
    windows = tl.load(x_ptr + rows[:, None] * STEP + k, mask=valid[:, None] & (k < WINDOW), other=0.0)
    return tl.where((k == WINDOW) & valid[:, None], 1.0, windows.to(tl.float32)).to(windows.dtype)


@triton.jit
def per_channel(ptr, channels, C, default: tl.constexpr):
    """Load some channels of a vector as (1, channels) fp32; all `default` if the pointer is None."""
    if ptr is None:
        values = tl.full(channels.shape, default, tl.float32)
    else:
        values = tl.load(ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    return values[None, :]


def block_for(size: int, largest: int) -> int:
    """Return the side of a tile: the smallest power of two that is at least `size`, clamped to 16 to `largest`."""
    return min(largest, max(16, 1 << max(size - 1, 0).bit_length()))


def has_windows(layer: LayerPlan) -> bool:
    """Return whether the kernels can compute a layer's frames from windows of the input, so that none are stored."""
    wide = layer.norm == "layer" and layer.channels > _WIDEST_LAYER_NORM
    return not layer.is_kept and layer.window <= _LONGEST_WINDOW and not wide


def window_block(layer: LayerPlan) -> int:
    """Return the side of a tile that has room for a window and a one."""
    return block_for(layer.window + 1, 32)


def chunk_programs(layer: LayerPlan, chunk: int) -> int:
    """Return the number of programs if each gets one of the chunks that `block_of` numbers."""
    return layer.total // chunk + layer.batch
