"""Split whole recordings into overlapping chunks whose frames join exactly, for feature extraction.

A frame of a convolutional encoder sees `receptive_field` samples, and frames begin every `stride` samples (400 and 320
for wav2vec 2.0 and its relatives), so frame t of a recording covers samples [320 t, 320 t + 400). Every chunk begins at
a multiple of the stride, so frame j of a chunk that begins at sample s is frame s / 320 + j of the recording. Where two
chunks overlap, the earlier one supplies the frames up to the middle of the overlap and the later one the rest. Each
frame of the recording therefore comes from exactly one chunk, with half the overlap as context on that side.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples
from torch import Tensor

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, check_end, read_samples, resampling_ratio
from fastssl.data.waveforms import EPS


@dataclass(frozen=True, eq=False)
class Chunk:
    """Part of a recording, and where its frames belong: `whole[first_frame : ...] = encode(waveform)[keep]`.

    Args:
        waveform: (T, 1) float32 at 16 kHz, ready for `Packed.pack`.
        start: Position of the chunk's first sample in the recording, in samples at 16 kHz; a multiple of the stride.
        keep: Frames of this chunk to keep; neighbouring chunks supply the others.
        first_frame: Index in the recording of the first kept frame.
    """

    waveform: Tensor  # (T, 1)
    start: int
    keep: slice
    first_frame: int


class FrameGrid(NamedTuple):
    """The samples that each frame of an encoder sees: frame t covers [t * stride, t * stride + receptive_field).

    The defaults are those of wav2vec 2.0 and its relatives.

    Args:
        stride: Samples at 16 kHz from the start of one frame to the start of the next.
        receptive_field: Number of samples at 16 kHz that one frame sees.
    """

    stride: int = 320
    receptive_field: int = 400

    @property
    def shortest_s(self) -> float:
        """Shortest audio that yields a frame, in seconds."""
        return self.receptive_field / SAMPLE_RATE_HZ

    def count(self, length: int) -> int:
        """Return the number of frames in `length` samples at 16 kHz; 0 if the audio is shorter than one frame."""
        return max(0, (length - self.receptive_field) // self.stride + 1)


WAV2VEC2 = FrameGrid()


def chunk_hop(rate_hz: int, *, chunk_s: float, overlap_s: float, grid: FrameGrid = WAV2VEC2) -> int:
    """Return the distance from the start of one chunk to the start of the next, in samples at 16 kHz.

    Args:
        rate_hz: Sampling rate of the recording in Hz.
        chunk_s: Length of a chunk in seconds.
        overlap_s: Shortest overlap of neighbouring chunks, in seconds.
        grid: Frames of the encoder.

    Raises:
        ValueError: `chunk_s` is too short for the overlap, or `overlap_s` is too short for the receptive field.
    """
    _, steps = resampling_ratio(rate_hz)
    # Every chunk begins where a sample at 16 kHz coincides with a source sample, so all share one resampling grid.
    step = math.lcm(grid.stride, steps)
    overlap = max(0, math.ceil(overlap_s * SAMPLE_RATE_HZ))
    hop = (round(chunk_s * SAMPLE_RATE_HZ) - overlap) // step * step
    if hop < step:
        raise ValueError(
            f"chunk_s: {chunk_s:g} s is too short for an overlap of {overlap_s:g} s; raise chunk_s or lower overlap_s"
        )
    least = 2 * (grid.receptive_field - grid.stride)
    if overlap < least:
        raise ValueError(f"overlap_s: must be at least {least / SAMPLE_RATE_HZ:g}, got {overlap_s:g}")
    return hop


def read_chunks(
    cut: Cut,
    *,
    chunk_s: float,
    overlap_s: float,
    normalize: bool,
    channel: int | None = None,
    grid: FrameGrid = WAV2VEC2,
) -> Iterator[Chunk]:
    """Read a recording chunk by chunk, with only one chunk in memory at a time.

    Args:
        cut: A whole recording, from `open_corpus(..., window_s=None)`.
        chunk_s: Length of a chunk in seconds; a shorter recording is one chunk.
        overlap_s: Shortest overlap of neighbouring chunks, in seconds; alignment may add up to 0.1 s.
        normalize: Whether to scale to zero mean and unit variance over the whole recording. A recording of several
            chunks is then decoded twice.
        channel: Channel to read if the cut has several; None averages them.
        grid: Frames of the encoder.

    Yields:
        At least one chunk, in order. Together the chunks keep frames 0 to `grid.count(length)` - 1, each once. A few
        frames are missing at the end if the decoder returns up to 0.1 s less than the header announced.

    Raises:
        ValueError: As in `chunk_hop`.
        AudioError: The audio cannot be used or is shorter than one frame. May be raised after some chunks.
    """
    check_end(cut)
    period, steps = resampling_ratio(cut.recording.sampling_rate)
    size = round(chunk_s * SAMPLE_RATE_HZ)
    hop = chunk_hop(cut.recording.sampling_rate, chunk_s=chunk_s, overlap_s=overlap_s, grid=grid)
    origin = compute_num_samples(cut.start, cut.recording.sampling_rate)
    total = round(compute_num_samples(cut.duration, cut.recording.sampling_rate) * steps / period)
    too_short = f"is shorter than one frame ({grid.shortest_s:g} s)"
    num_frames = grid.count(total)
    if num_frames == 0:
        raise AudioError(too_short)

    def read(start: int, length: int) -> Tensor:
        first = origin + start // steps * period
        return torch.from_numpy(read_samples(cut, first=first, length=length, channel=channel))

    # The last chunk is the first one that contains the recording's last frame.
    frames_before_last = num_frames - grid.count(size)
    last = max(0, -(-frames_before_last * grid.stride // hop))
    whole = read(0, total) if last == 0 else None
    mean, deviation = 0.0, 1.0
    if normalize:
        pieces = (read(start, min(hop, total - start)) for start in range(0, total, hop))
        mean, deviation = _mean_and_deviation(pieces if whole is None else iter([whole]))
    trim = (size - hop) // 2 // grid.stride
    for index in range(last + 1):
        start = index * hop
        waveform = whole if whole is not None else read(start, min(size, total - start))
        frames = grid.count(len(waveform))
        if index < last:
            frames = min(frames, hop // grid.stride + trim)
        keep = slice(trim if index > 0 else 0, frames)
        if frames == 0 and index == 0:
            raise AudioError(too_short)
        if keep.start < keep.stop:
            yield Chunk(((waveform - mean) / deviation)[:, None], start, keep, start // grid.stride + keep.start)


def _mean_and_deviation(pieces: Iterator[Tensor]) -> tuple[float, float]:
    """Return the mean and standard deviation of all samples in one pass.

    The deviation is sqrt(variance + 1e-7), as in Transformers' `Wav2Vec2FeatureExtractor`.
    """
    count, mean, squares = 0, 0.0, 0.0
    for piece in pieces:
        if len(piece) == 0:
            continue
        values = piece.numpy().astype(np.float64)
        shift = float(values.mean()) - mean
        mean += shift * len(values) / (count + len(values))
        squares += float(((values - values.mean()) ** 2).sum()) + shift**2 * count * len(values) / (count + len(values))
        count += len(values)
    return mean, math.sqrt(squares / count + EPS)
