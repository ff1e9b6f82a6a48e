"""The resampling filter: Lhotse's, and the same without most of its multiplications by zero."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lhotse.augmentation.resample import Resample
from numpy.typing import NDArray

# Zero crossings of the sinc filter on each side. With 16, a 7 kHz tone passes and a 9 kHz tone is attenuated by 50 dB.
FILTER_WIDTH = 16
# Outputs that are computed together, and in a row of all such products.
_BLOCK_OUTPUTS, _ROW_OUTPUTS = 16, 160


@lru_cache(maxsize=16)
def resampler(period: int, steps: int) -> Any:
    """Return Lhotse's `Resample` from `period` to `steps` samples."""
    with torch.device("cpu"):  # its filters go to PyTorch's default device
        return Resample(period, steps, lowpass_filter_width=FILTER_WIDTH)


def resample_in_blocks(samples: NDArray[np.float32], period: int, steps: int) -> NDArray[np.float32]:
    """Do what Lhotse's `Resample` does, without most of its multiplications by zero.

    It computes the `steps` outputs of a period as one product with all inputs that any of them sees. Here, each block
    of neighbouring outputs is multiplied with the inputs that this block sees.

    Args:
        samples: (T,) float32; samples beyond its ends count as zeros.
        period: Number of samples that become `steps` samples; without a common divisor with `steps`.
        steps: Number of samples that `period` samples become.

    Returns:
        (ceil(T * steps / period),) float32.
    """
    blocks, repeats, width = _blocks(period, steps)
    hop, outputs = repeats * period, repeats * steps
    rows = -(-len(samples) // hop)
    padded = torch.zeros(rows * hop + 2 * width + period + 1, device="cpu")
    padded[width : width + len(samples)] = torch.from_numpy(samples)
    result = torch.empty(rows, outputs, device="cpu")
    for begin, first, weights in blocks:
        seen, number = weights.shape
        torch.mm(padded.as_strided((rows, seen), (hop, 1), first), weights, out=result[:, begin : begin + number])
    length = -(-len(samples) * steps // period)
    return np.asarray(result.flatten()[:length].numpy(), dtype=np.float32)


@lru_cache(maxsize=16)
def _blocks(period: int, steps: int) -> tuple[list[tuple[int, int, torch.Tensor]], int, int]:
    """Divide the resampling filter into blocks of outputs.

    Returns:
        The blocks, each with the index of its first output, the first input that it sees (0 is `width` samples before
        the first sample) and its weights (inputs, outputs); the number of periods that the blocks cover together; and
        the width of the filter on either side.
    """
    filters, width = resampler(period, steps).kernel[:, 0], resampler(period, steps).width
    # With this many outputs in a row of the product, a block sees fewer inputs than lie between two rows, so the rows
    # are a view of the samples.
    repeats = -(-_ROW_OUTPUTS // steps)
    blocks = []
    for begin in range(0, repeats * steps, _BLOCK_OUTPUTS):
        end = min(begin + _BLOCK_OUTPUTS, repeats * steps)
        first = begin * period // steps
        weights = torch.zeros((end - 1) * period // steps - first + 2 * width + 1, end - begin, device="cpu")
        for output in range(begin, end):
            taps = filters[output % steps, output % steps * period // steps :][: 2 * width + 1]
            row = output * period // steps - first
            weights[row : row + len(taps), output - begin] = taps
        blocks.append((begin, first, weights))
    return blocks, repeats, width
