"""MFCCs with their first and second differences, computed by Lhotse: features for HuBERT's first k-means targets."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastssl.data.audio import SAMPLE_RATE_HZ

MFCC_SHIFT_S = 0.01
#: Centre of frame 0; each frame covers 25 ms, and frame j is centred j shifts later.
MFCC_FIRST_CENTRE_S = MFCC_SHIFT_S / 2
#: Number of frames computed at a time, and number of frames added on each side for the windows at a block's edges.
_BLOCK_FRAMES, _MARGIN_FRAMES = 6000, 2


def mfcc(waveform: NDArray[np.float32]) -> Tensor:
    """Compute 13 MFCCs with their first and second differences (HuBERT, arXiv 2106.07447, section IV-B).

    The audio is mirrored beyond its ends, as in Kaldi with `snip_edges=False`.

    Args:
        waveform: (T,) float32 at 16 kHz, not normalised, at least 25 ms long (T >= 400).

    Returns:
        (frames, 39) fp32 with one frame every 10 ms, frames = (T + 80) // 160: the coefficients, then their first
        differences, then their second differences.
    """
    shift = round(MFCC_SHIFT_S * SAMPLE_RATE_HZ)
    frames = (len(waveform) + shift // 2) // shift
    parts = []
    # Compute in blocks, because the overlapping windows of a long recording take several times its memory.
    for first in range(0, frames, _BLOCK_FRAMES):
        last = min(frames, first + _BLOCK_FRAMES)
        before = min(first, _MARGIN_FRAMES)
        stop = len(waveform) if last + _MARGIN_FRAMES >= frames else (last + _MARGIN_FRAMES) * shift
        samples = torch.from_numpy(waveform[(first - before) * shift : stop])
        with torch.inference_mode(), torch.device("cpu"):  # Lhotse creates tensors on PyTorch's default device
            parts.append(_extractor()(samples[None])[0, before : before + last - first])
    coefficients = torch.cat(parts)
    first_differences = differences(coefficients)
    return torch.cat((coefficients, first_differences, differences(first_differences)), dim=1)


def differences(x: Tensor, *, reach: int = 2) -> Tensor:
    """Compute the slope of each column over 2 `reach` + 1 frames, known as "deltas" in speech recognition.

    The first and last frames are repeated beyond the ends.

    Args:
        x: (frames, width) floating-point features.
        reach: Number of frames on either side that a slope covers.

    Returns:
        (frames, width) in the dtype of `x`: sum_n n (x[t + n] - x[t - n]) / (2 sum_n n²), for n from 1 to `reach`.
    """
    if len(x) == 0:
        return x
    padded = F.pad(x.t()[None], (reach, reach), mode="replicate")[0].t()
    slope = torch.zeros_like(x)
    for n in range(1, reach + 1):
        slope += n * (padded[reach + n : reach + n + len(x)] - padded[reach - n : reach - n + len(x)])
    return slope / (2 * sum(n * n for n in range(1, reach + 1)))


@lru_cache(maxsize=1)
def _extractor() -> Any:
    from lhotse.features.kaldi.layers import Wav2MFCC

    return Wav2MFCC(sampling_rate=SAMPLE_RATE_HZ, frame_shift=MFCC_SHIFT_S, use_energy=False)
