"""Part of a recording as a mono waveform at 16 kHz: seek, decode, mix channels, resample."""

import math
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import Recording
from lhotse.audio.backend import get_current_audio_backend, set_current_audio_backend
from lhotse.augmentation.resample import Resample
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples
from numpy.typing import NDArray

from fastssl.data.manifest import ForbiddenSourceError, check_sources

SAMPLE_RATE_HZ = 16000

# Zero crossings of the sinc on each side: with 16, a tone at 7 kHz passes and one at 9 kHz is 50 dB down.
_FILTER_WIDTH = 16
# A decoder may disagree with its header by a frame or two (MP3); more is a damaged file.
_TOLERANCE_S = 0.1
_LHOTSE_BACKEND = Lock()


class AudioError(Exception):
    """A recording, or a part of it, cannot be used; the message says why and does not repeat the name."""


def read_waveform(cut: Cut, *, channel: int | None = None) -> NDArray[np.float32]:
    """Decode a cut, and nothing around it but what the resampling filter needs.

    Args:
        cut: A Lhotse cut of one recording.
        channel: Of several channels take this one (default: their mean). One channel is taken as it is.

    Returns:
        (T,) float32 at 16 kHz with T = round(16000 * cut.duration), or up to 0.1 s less where the decoder gives less
        than the header promised.

    Raises:
        AudioError: The audio does not decode, ends too early, has no such channel, or has samples that are not finite.
    """
    first = compute_num_samples(cut.start, cut.recording.sampling_rate)
    return read_samples(cut, first=first, length=compute_num_samples(cut.duration, SAMPLE_RATE_HZ), channel=channel)


def read_samples(cut: Cut, *, first: int, length: int, channel: int | None) -> NDArray[np.float32]:
    """Decode part of the recording of a cut.

    Args:
        cut: Says which recording, and which of its channels.
        first: The source sample that becomes the first of the result, counted from the beginning of the recording.
        length: Samples to return, at 16 kHz.
        channel: As in `read_waveform`.

    Returns:
        (length,) float32 at 16 kHz: that part of the whole recording resampled, with sample `first` on the grid.

    Raises:
        AudioError: As in `read_waveform`.
    """
    recording = cut.recording
    columns = _columns(cut, channel)
    # Every `period` source samples make `steps` output samples.
    period, steps = resampling_ratio(recording.sampling_rate)
    margin = 0 if period == steps else _resampler(period, steps).width
    lead = math.ceil(margin / period) * period
    stop = first + math.ceil(length / steps) * period + margin
    start, stop = max(0, first - lead), min(recording.num_samples, stop)
    if stop <= first:
        raise AudioError(f"ends before {first / recording.sampling_rate:.2f} s, where this part of it begins")

    samples = _decode(cut, start, stop - start)
    if samples.shape[1] <= max(columns):
        raise AudioError(f"has {samples.shape[1]} channels, its manifest says {recording.num_channels}")
    end = start + len(samples)
    wanted = first + length * period // steps
    if end < min(stop, wanted) - _TOLERANCE_S * recording.sampling_rate:
        rate = recording.sampling_rate
        raise AudioError(f"ends after {end / rate:.2f} s where its header says {recording.duration:.2f} s")
    mono = samples[:, columns[0]] if len(columns) == 1 else samples[:, columns].mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError("has samples that are not finite (NaN or infinite)")
    # Ceiling: the last output sample may lie up to one step before the end of the last source sample.
    length = max(0, min(length, -((first - end) * steps // period)))
    padded: NDArray[np.float32] = np.zeros(lead + math.ceil(length / steps) * period + margin, dtype=np.float32)
    offset = lead - (first - start)
    padded[offset : offset + len(mono)] = mono[: len(padded) - offset]
    skip = lead // period * steps
    return resample(padded, period, steps)[skip : skip + length]


def resampling_ratio(rate_hz: int) -> tuple[int, int]:
    """Source samples, and the samples at 16 kHz that they make: the smallest such numbers.

    The filter has a row for each of the latter, so a rate that shares no factor of 10 or more with 16 kHz (44,101 Hz)
    is taken for the nearest multiple of 10 Hz.
    """
    if math.gcd(rate_hz, SAMPLE_RATE_HZ) < 10:
        rate_hz = max(10, round(rate_hz / 10) * 10)
    ratio = Fraction(rate_hz, SAMPLE_RATE_HZ)
    return ratio.numerator, ratio.denominator


def resample(samples: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Band-limited resampling of (T,) float32 samples to ceil(T * to_hz / from_hz); zeros are assumed on both sides."""
    divisor = math.gcd(from_hz, to_hz)
    if from_hz == to_hz:
        return samples
    with torch.inference_mode():
        resampled = _resampler(from_hz // divisor, to_hz // divisor)(torch.from_numpy(samples)[None])[0]
    return np.asarray(resampled.numpy(), dtype=np.float32)


@lru_cache(maxsize=16)
def _resampler(from_hz: int, to_hz: int) -> Any:
    return Resample(from_hz, to_hz, lowpass_filter_width=_FILTER_WIDTH)


def _columns(cut: Cut, channel: int | None) -> list[int]:
    """Columns of the decoded array that make up the mono signal."""
    available = [one for source in cut.recording.sources for one in source.channels]
    wanted = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    if channel is not None and len(wanted) > 1:
        if channel not in wanted:
            raise AudioError(f"has channels {wanted}, not {channel}")
        wanted = [channel]
    if not set(wanted) <= set(available):
        raise AudioError(f"has channels {available}, and its manifest asks for {wanted}")
    return [available.index(one) for one in wanted]


def _decode(cut: Cut, first: int, count: int) -> NDArray[np.float32]:
    """(up to count, channels) float32 from source sample `first` on, at the rate of the recording."""
    recording: Recording = cut.recording
    source = recording.sources[0]
    # Decoders raise whatever they like, and whatever it is the file is at fault, not the run.
    try:
        if len(recording.sources) > 1 or recording.transforms or source.type not in ("file", "memory"):
            return _decode_by_lhotse(recording, first, count)
        with soundfile.SoundFile(_open(cut)) as audio:
            if audio.samplerate != recording.sampling_rate:
                raise AudioError(f"is at {audio.samplerate} Hz, its manifest says {recording.sampling_rate} Hz")
            audio.seek(first)
            return np.asarray(audio.read(count, dtype="float32", always_2d=True), dtype=np.float32)
    except AudioError:
        raise
    except Exception as error:
        raise AudioError(f"does not decode: {str(error).strip() or type(error).__name__}") from error


def _decode_by_lhotse(recording: Recording, first: int, count: int) -> NDArray[np.float32]:
    """As `_decode`, for recordings of several sources or with transforms."""
    try:
        check_sources(recording.to_dict())
    except ForbiddenSourceError as error:
        raise AudioError(str(error)) from None
    rate = recording.sampling_rate
    # Lhotse's other backends put the names of some files into a shell command. The choice is global to the process.
    with _LHOTSE_BACKEND:
        before = get_current_audio_backend()
        set_current_audio_backend("LibsndfileBackend")
        try:
            samples = recording.load_audio(offset=first / rate, duration=count / rate)
        except soundfile.LibsndfileError as error:  # Lhotse raises it again in a form that cannot be printed
            raise AudioError(f"does not decode: {error.__context__}") from error
        finally:
            set_current_audio_backend(before)
    return np.ascontiguousarray(samples.T, dtype=np.float32)


def _open(cut: Cut) -> str | BytesIO:
    """What soundfile reads from: a path, or the bytes of a recording in memory or in a tar file (see `shar.py`)."""
    source = cut.recording.sources[0]
    if source.type == "memory":
        return BytesIO(source.source)
    member = (cut.custom or {}).get("tar_member")
    if member is None:
        return str(source.source)
    offset, size = member
    with Path(source.source.rsplit(".tar/", 1)[0] + ".tar").open("rb") as tar:
        tar.seek(offset)
        return BytesIO(tar.read(size))
