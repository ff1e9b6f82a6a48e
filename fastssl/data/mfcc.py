"""MFCC with their differences over time, by Lhotse: what HuBERT's first targets are clustered from."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastssl.data.audio import SAMPLE_RATE_HZ

MFCC_SHIFT_S = 0.01
#: Frame j covers 25 ms around this plus j shifts.
MFCC_FIRST_CENTRE_S = MFCC_SHIFT_S / 2
#: Frames computed at a time, and frames beside them of which those at the edges of a block see.
_BLOCK_FRAMES, _MARGIN_FRAMES = 6000, 2


def mfcc(waveform: NDArray[np.float32]) -> Tensor:
    """13 coefficients, their first and their second differences (arXiv 2106.07447, section IV-B).

    Args:
        waveform: (T,) at 16 kHz, as it is, not normalised; 25 ms or more.

    Returns:
        (frames, 39) fp32, a frame every 10 ms; the audio is mirrored beyond its ends.
    """
    shift = round(MFCC_SHIFT_S * SAMPLE_RATE_HZ)
    frames = (len(waveform) + shift // 2) // shift
    parts = []
    # Block by block, for a long recording's overlapping frames take several times its memory.
    for first in range(0, frames, _BLOCK_FRAMES):
        last = min(frames, first + _BLOCK_FRAMES)
        before = min(first, _MARGIN_FRAMES)
        stop = len(waveform) if last + _MARGIN_FRAMES >= frames else (last + _MARGIN_FRAMES) * shift
        samples = torch.from_numpy(waveform[(first - before) * shift : stop])
        with torch.inference_mode():
            parts.append(_extractor()(samples[None])[0, before : before + last - first])
    coefficients = torch.cat(parts)
    first_differences = differences(coefficients)
    return torch.cat((coefficients, first_differences, differences(first_differences)), dim=1)


def differences(x: Tensor, *, reach: int = 2) -> Tensor:
    """Slope of each column over the frames from `reach` before to `reach` behind, the end frames repeated outwards.

    Args:
        x: (frames, width).
        reach: Frames on either side.

    Returns:
        (frames, width): sum over n of n (x[t + n] - x[t - n]) / (2 sum of n^2), "deltas" in speech recognition.
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
