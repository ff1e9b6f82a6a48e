"""Pack the waveforms of a batch in a data worker, in C++ if the module `_host` is built, else in NumPy."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fastssl.packing import Layout, Packed

Waveform = npt.NDArray[np.float32]
#: Added to the variance of a waveform when it is normalised, as in Transformers' `Wav2Vec2FeatureExtractor`.
EPS = 1e-7


def pack_waveforms(waveforms: Sequence[Waveform], *, normalize: bool, eps: float = EPS) -> Waveform:
    """Concatenate waveforms, and scale each to zero mean and unit variance if `normalize` is set.

    Scaling computes (x - mean) / sqrt(variance + eps), as Transformers' `Wav2Vec2FeatureExtractor` does. The statistics
    come from each waveform alone, in fp64, so the other waveforms of a batch do not change a single bit of the result.

    Args:
        waveforms: B arrays (T_b,) float32, which may be empty. NaN or infinity in one does not affect the others.
        normalize: Whether to scale each waveform to zero mean and unit variance.
        eps: Value added to the variance, so that digital silence becomes zeros instead of NaN.

    Returns:
        A new (N,) float32 array with the waveforms one after another; N is the sum of all T_b.

    Raises:
        ValueError: A waveform is not one-dimensional or not float32.
    """
    for index, waveform in enumerate(waveforms):
        if waveform.ndim != 1 or waveform.dtype != np.float32:
            raise ValueError(f"waveforms: item {index} is {waveform.dtype} {waveform.shape}, expected float32 (T,)")
    return _pack(waveforms, normalize, eps)


def waveform_batch(waveforms: Sequence[Waveform], *, normalize: bool) -> Packed:
    """Pack waveforms into the batch that an encoder takes: values (N, 1) float32, lengths in samples.

    Args:
        waveforms: As in `pack_waveforms`.
        normalize: As in `pack_waveforms`.

    Raises:
        ValueError: As in `pack_waveforms`.
    """
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
except ImportError:  # `_host` was not built; `fastssl info` says why
    _pack = _pack_with_numpy
