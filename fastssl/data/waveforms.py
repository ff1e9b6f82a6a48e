"""What is done to the samples of a batch before they leave a data worker: in C++ where it is built, else in numpy."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fastssl.packing import Layout, Packed

Waveform = npt.NDArray[np.float32]


def pack_waveforms(waveforms: Sequence[Waveform], *, normalize: bool, eps: float = 1e-7) -> Waveform:
    """Concatenate waveforms, each scaled to zero mean and unit variance on the way if asked.

    The statistics are of each waveform alone, in fp64: what a waveform is batched with changes no bit of it. With
    `normalize` this is what Transformers' `Wav2Vec2FeatureExtractor` does, (x - mean) / sqrt(variance + eps).

    Args:
        waveforms: B arrays (T_b,) float32; empty ones are allowed. NaN and infinity spoil their own waveform only.
        normalize: Scale every waveform to zero mean and unit variance.
        eps: Added to the variance, so that silence stays silence.

    Returns:
        (N,) float32, the waveforms back to back in one buffer of their own.

    Raises:
        ValueError: A waveform is not one-dimensional, or not float32.
    """
    for index, waveform in enumerate(waveforms):
        if waveform.ndim != 1 or waveform.dtype != np.float32:
            raise ValueError(f"waveforms: number {index} is {waveform.dtype} {waveform.shape}, expected float32 (T,)")
    return _pack(waveforms, normalize, eps)


def waveform_batch(waveforms: Sequence[Waveform], *, normalize: bool) -> Packed:
    """The (N, 1) packed batch that an encoder takes; arguments and errors as in `pack_waveforms`."""
    values = torch.from_numpy(pack_waveforms(waveforms, normalize=normalize))
    return Packed(values.unsqueeze(1), Layout.from_lengths([len(waveform) for waveform in waveforms]))


def _pack_with_numpy(waveforms: Sequence[Waveform], normalize: bool, eps: float) -> Waveform:
    packed = np.empty(sum(len(waveform) for waveform in waveforms), np.float32)
    begin = 0
    for waveform in waveforms:
        end = begin + len(waveform)
        packed[begin:end] = waveform
        if normalize and len(waveform):
            samples = waveform.astype(np.float64)
            packed[begin:end] = (samples - samples.mean()) / np.sqrt(samples.var() + eps)
        begin = end
    return packed


try:
    from fastssl._host import pack_waveforms as _pack
except ImportError:  # not built: the reason is in `fastssl info`
    _pack = _pack_with_numpy
