"""Read part of a recording as a mono waveform at 16 kHz: seek, decode, average the channels and resample."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from threading import Lock

import numpy as np
import soundfile
import torch
from lhotse import Recording
from lhotse.audio.backend import get_current_audio_backend, set_current_audio_backend
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples, fastcopy
from numpy.typing import NDArray

from fastssl.data.manifest import ForbiddenSourceError, check_sources
from fastssl.data.mp3 import whole
from fastssl.data.resampler import FILTER_WIDTH, resample_in_blocks, resampler
from fastssl.data.rules import OLDEST_RULES, rules_of
from fastssl.data.transforms import repeatable, sampling_rates, seeded
from fastssl.names import named_again, plain_path
from fastssl.regular import UnusableFileError, check_audio, check_part, size_of

SAMPLE_RATE_HZ = 16000

# The decoded length may differ from the header by a frame or two (MP3). A larger shortfall means a damaged file.
TOLERANCE_S = 0.1
# No speech is recorded more slowly. A lower rate comes from a damaged header, and would make hours of a few samples.
_LEAST_RATE_HZ = 4000
_LARGEST_FILTER_BYTES = 64 * 2**20
# Float files may hold the values of 16-bit, 24-bit or even 32-bit integers unscaled. Larger numbers are not audio, but
# other bytes read as floats. One of them decides the scale of its recording, and its square overflows from 1e19 on.
_LARGEST_SAMPLE = 2.0**32
# A frame of an MP3 uses data of up to 10 earlier ones (the bit reservoir), but after seeking the decoder has only 4.
_MP3_LEAD = 10 * 1152
_NOT_AUDIO = 7  # libsndfile's code of the error
#: Samples of all channels that are decoded at once, if there are more than two: 128 MB.
_LARGEST_PIECE = 2**25
_LHOTSE_BACKEND = Lock()
_Pick = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class AudioError(Exception):
    """A recording, or part of one, cannot be used.

    The message is a predicate without a subject ("does not decode: ..."); callers put the file name in front of it.
    """


def read_waveform(cut: Cut, *, channel: int | None = None) -> NDArray[np.float32]:
    """Decode a cut as a mono waveform at 16 kHz, reading only the cut and the margin that the resampling filter needs.

    Args:
        cut: A Lhotse cut of one recording, at any sampling rate.
        channel: Channel to read if the cut has several; None averages them, or reads the channel that the scan has
            chosen because they cancel. Ignored for a cut with one channel.

    Returns:
        (T,) float32 at 16 kHz with T = round(16000 * cut.duration). The result may be up to 0.1 s shorter if the
        decoder returns fewer samples than the header announced.

    Raises:
        AudioError: The audio does not decode, ends too early, lacks the channel, is at a sampling rate that
            `check_rate` refuses, or contains NaN, infinity or absurd values.
    """
    check_end(cut)
    first = compute_num_samples(cut.start, cut.recording.sampling_rate)
    return read_samples(cut, first=first, length=compute_num_samples(cut.duration, SAMPLE_RATE_HZ), channel=channel)


def read_samples(cut: Cut, *, first: int, length: int, channel: int | None) -> NDArray[np.float32]:
    """Decode any part of a cut's recording as a mono waveform at 16 kHz; the part may lie outside the cut.

    Args:
        cut: Names the recording and the channels to read. Its start and duration are ignored.
        first: Source sample that becomes sample 0 of the result, counted from the start of the recording at its own
            sampling rate.
        length: Number of samples to return, at 16 kHz.
        channel: As in `read_waveform`.

    Returns:
        (length,) float32 at 16 kHz, or fewer samples if the recording ends earlier. The values are those of the whole
        recording, resampled on a grid that contains source sample `first`.

    Raises:
        AudioError: As in `read_waveform`.
    """
    recording = cut.recording
    check_rate(recording.sampling_rate)
    columns = _columns(cut, channel)
    # Every `period` source samples become `steps` output samples.
    period, steps = resampling_ratio(recording.sampling_rate)
    margin = 0 if period == steps else resampler(period, steps).width
    lead = math.ceil(margin / period) * period
    stop = first + math.ceil(length / steps) * period + margin
    start, stop = max(0, first - lead), min(recording.num_samples, stop)
    if stop <= first:
        raise AudioError(f"ends before {first / recording.sampling_rate:.2f} s, where the requested part begins")

    mono = _decode(cut, start, stop - start, columns, lambda samples: _mono(samples, columns))
    end = start + len(mono)
    wanted = first + length * period // steps
    if end < min(stop, wanted) - TOLERANCE_S * recording.sampling_rate:
        rate = recording.sampling_rate
        raise AudioError(f"ends after {end / rate:.2f} s, but its header says {recording.duration:.2f} s")
    _check_samples(mono)
    # Round up to keep every output sample that begins before the end of the last source sample.
    length = max(0, min(length, -((first - end) * steps // period)))
    padded: NDArray[np.float32] = np.zeros(lead + math.ceil(length / steps) * period + margin, dtype=np.float32)
    offset = lead - (first - start)
    padded[offset : offset + len(mono)] = mono[: len(padded) - offset]
    skip = lead // period * steps
    return resample(padded, period, steps, rules=rules_of(cut))[skip : skip + length]


def read_block(cut: Cut, first: int, count: int, channels: Sequence[int]) -> NDArray[np.float32]:
    """Decode channels of a part of a cut's recording, as they are.

    Args:
        cut: Names the recording. Its start and duration are ignored.
        first: First sample, counted from the start of the recording.
        count: Number of samples.
        channels: Channels to read, as the manifest names them.

    Returns:
        (T, channels) float32 at the recording's own rate; T is less than `count` at the end of the recording.

    Raises:
        AudioError: The audio does not decode or lacks a channel.
    """
    columns = _available(cut, channels)
    return _decode(cut, first, count, columns, lambda samples: samples[:, columns])


def resampling_ratio(rate_hz: int) -> tuple[int, int]:
    """Return the ratio of a sampling rate to 16 kHz in lowest terms, for example (441, 160) for 44,100 Hz.

    The resampling filter has as many rows as the second number. To keep it small, a rate whose greatest common divisor
    with 16,000 is below 10 (such as 44,101 Hz) is rounded to the nearest multiple of 10 Hz.

    Args:
        rate_hz: Sampling rate of the recording in Hz.

    Returns:
        (period, steps): `period` source samples become `steps` samples at 16 kHz.
    """
    if math.gcd(rate_hz, SAMPLE_RATE_HZ) < 10:
        rate_hz = max(10, round(rate_hz / 10) * 10)
    ratio = Fraction(rate_hz, SAMPLE_RATE_HZ)
    return ratio.numerator, ratio.denominator


def check_rate(rate_hz: int) -> None:
    """Refuse a sampling rate that cannot be right, or that would need too large a filter to resample to 16 kHz.

    Args:
        rate_hz: Sampling rate of a recording in Hz.

    Raises:
        AudioError: The rate is below 4 kHz, or the filter would take more than 64 MB.
    """
    if rate_hz < _LEAST_RATE_HZ:
        raise AudioError(f"is at {rate_hz} Hz, expected at least {_LEAST_RATE_HZ} Hz; its header may be damaged")
    period, steps = resampling_ratio(rate_hz)
    check_filter(period * SAMPLE_RATE_HZ // steps, SAMPLE_RATE_HZ)


def check_end(cut: Cut) -> None:
    """Refuse a cut that ends more than 0.1 s after its recording, of which less would be read than it promises.

    Args:
        cut: A cut of one recording.

    Raises:
        AudioError: The recording ends before the cut.
    """
    length_s = cut.recording.num_samples / cut.recording.sampling_rate
    if cut.start + cut.duration > length_s + TOLERANCE_S:
        raise AudioError(f"lasts {length_s:.2f} s, but its cut ends at {cut.start + cut.duration:.2f} s")


def check_filter(from_hz: int, to_hz: int) -> None:
    """Refuse to resample between two rates if the filter would take more than 64 MB.

    Args:
        from_hz: Sampling rate before, in Hz.
        to_hz: Sampling rate after, in Hz.

    Raises:
        AudioError: The filter would be too large.
    """
    divisor = math.gcd(from_hz, to_hz)
    period, steps = from_hz // divisor, to_hz // divisor
    # The filter has a row for each step, and a row covers a period and the zero crossings on both sides. In integers,
    # because a number of a damaged header may exceed what fits into a float.
    size = 4 * steps * (period + 2 * FILTER_WIDTH * max(1, period // steps))
    if size > _LARGEST_FILTER_BYTES:
        raise AudioError(
            f"needs a filter of {size // 10**6} MB to be resampled from {from_hz} to {to_hz} Hz; resample it to a "
            "usual rate, such as 16000 Hz, first"
        )


def resample(
    samples: NDArray[np.float32], from_hz: int, to_hz: int, *, rules: int = OLDEST_RULES
) -> NDArray[np.float32]:
    """Resample a waveform with a windowed sinc filter; samples beyond its ends count as zeros.

    Args:
        samples: (T,) float32 waveform.
        from_hz: Sampling rate of `samples` in Hz.
        to_hz: Sampling rate of the result in Hz.
        rules: Version of the rules (`rules.py`); 1 and 2 differ only in speed and rounding.

    Returns:
        (ceil(T * to_hz / from_hz),) float32; `samples` itself if the rates are equal.
    """
    divisor = math.gcd(from_hz, to_hz)
    if from_hz == to_hz:
        return samples
    period, steps = from_hz // divisor, to_hz // divisor
    with torch.inference_mode():
        if rules >= 2:
            return resample_in_blocks(samples, period, steps)
        resampled = resampler(period, steps)(torch.from_numpy(samples)[None])[0]
    return np.asarray(resampled.numpy(), dtype=np.float32)


def _columns(cut: Cut, channel: int | None) -> list[int]:
    """Return the columns of the decoded array whose mean is the mono signal."""
    wanted = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    if channel is None and rules_of(cut) >= 2:
        channel = cut.custom.get("only_channel")
    if channel is not None and len(wanted) > 1:
        if channel not in wanted:
            raise AudioError(f"has channels {wanted}, but channel {channel} was requested")
        wanted = [channel]
    return _available(cut, wanted)


def _available(cut: Cut, wanted: Sequence[int]) -> list[int]:
    """Return the columns of channels in the decoded array."""
    available = [one for source in cut.recording.sources for one in source.channels]
    if not set(wanted) <= set(available):
        raise AudioError(f"has channels {available}, but its manifest asks for {list(wanted)}")
    return [available.index(one) for one in wanted]


def _check_samples(samples: NDArray[np.float32]) -> None:
    """Refuse samples that are not finite, or that cannot be audio."""
    if not len(samples):
        return
    largest = max(float(samples.max()), -float(samples.min()))  # NaN if any sample is
    if not math.isfinite(largest):
        raise AudioError("has samples that are not finite (NaN or infinite)")
    if largest > _LARGEST_SAMPLE:
        raise AudioError(
            f"has samples of {largest:.0e}, expected at most 1 (or {_LARGEST_SAMPLE:.0e}, if they are not scaled); its "
            "samples may be of another type than its header says"
        )


def _mono(samples: NDArray[np.float32], columns: Sequence[int]) -> NDArray[np.float32]:
    """Return the mean of some of the columns of (samples, channels)."""
    mono: NDArray[np.float32] = samples[:, columns[0]] if len(columns) == 1 else samples[:, columns].mean(axis=1)
    return mono


def _decode(cut: Cut, first: int, count: int, columns: Sequence[int], pick: _Pick) -> NDArray[np.float32]:
    """Decode up to `count` samples, beginning with source sample `first`, at the source rate.

    Returns what `pick` makes of them: it gets (samples, channels) with all `columns`, perhaps in several pieces.
    """

    def check(channels: int) -> None:
        if channels <= max(columns):
            raise AudioError(f"has {channels} channels, but its manifest says {recording.num_channels}")

    recording: Recording = cut.recording
    source = recording.sources[0]
    # Decoders raise exceptions of any type. They all mean that the file is bad, and none should end the run.
    try:
        if len(recording.sources) > 1 or recording.transforms or source.type not in ("file", "memory"):
            samples = _decode_by_lhotse(recording, first, count)
            check(samples.shape[1])
            return pick(samples)
        with _opened(cut) as file, _sound(file, cut) as audio:
            if audio.samplerate != recording.sampling_rate:
                raise AudioError(f"is at {audio.samplerate} Hz, but its manifest says {recording.sampling_rate} Hz")
            check(audio.channels)
            return _read(audio, first, count, rules_of(cut), pick)
    except AudioError:
        raise
    except UnusableFileError as error:
        raise AudioError(str(error)) from None
    except Exception as error:
        reason = named_again(str(error).strip(), source.source)
        raise AudioError(f"does not decode: {reason or type(error).__name__}") from error


@contextmanager
def _sound(file: str | BytesIO, cut: Cut) -> Iterator[soundfile.SoundFile]:
    """Open what `_opened` yields. An MP3 that is longer than libsndfile believes is opened so that it is read whole."""
    recording = cut.recording
    with open_sound(file, rules=rules_of(cut)) as audio:
        longer = recording.num_samples > audio.frames + TOLERANCE_S * recording.sampling_rate
        if not longer or audio.format != "MP3" or rules_of(cut) < 2:
            yield audio
            return
    with (
        Path(file).open("rb") if isinstance(file, str) else file as stream,
        soundfile.SoundFile(whole(stream)) as audio,
    ):
        yield audio


def open_sound(file: str | BytesIO, *, rules: int) -> soundfile.SoundFile:
    """Open an audio file by libsndfile, also if macOS has left a second file beside it.

    Args:
        file: Path of the file, or its contents.
        rules: Version of the rules.

    Raises:
        AudioError: The file is not audio.
        soundfile.LibsndfileError: libsndfile has another reason not to read the file.
    """
    try:
        return _open_sound(file, rules)
    except soundfile.LibsndfileError as error:
        if error.code != _NOT_AUDIO:
            raise
        # libsndfile says "File does not exist or is not a regular file", about an existing MP3 without frames.
        raise AudioError("does not decode: it contains no audio of a known format") from error


def _open_sound(file: str | BytesIO, rules: int) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(file)
    except soundfile.LibsndfileError:
        # Beside an MP3 without tags, libsndfile takes "._NAME" for a part of a Sound Designer file. It looks for one
        # only if it knows the name.
        if rules < 2 or not isinstance(file, str) or not Path(file).with_name(f"._{Path(file).name}").exists():
            raise
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return soundfile.SoundFile(descriptor)
        except soundfile.LibsndfileError:
            os.close(descriptor)
            raise


def _read(audio: soundfile.SoundFile, first: int, count: int, rules: int, pick: _Pick) -> NDArray[np.float32]:
    """Decode up to `count` samples from sample `first` on, and return what `pick` makes of (samples, channels).

    A minute of hundreds of channels would fill the memory, so it is picked from in pieces.
    """
    piece = _LARGEST_PIECE // audio.channels
    if count > piece and audio.channels > 2:
        pieces = [
            np.ascontiguousarray(_read(audio, at, min(piece, first + count - at), rules, pick))
            for at in range(first, first + count, piece)
        ]
        return np.concatenate(pieces)
    return pick(_read_all(audio, first, count, rules))


def _read_all(audio: soundfile.SoundFile, first: int, count: int, rules: int) -> NDArray[np.float32]:
    if rules < 2:
        audio.seek(first)
        return np.asarray(audio.read(count, dtype="float32", always_2d=True), dtype=np.float32)
    count = max(0, min(count, audio.frames - first))
    if audio.seekable():
        lead = min(first, _MP3_LEAD) if audio.subtype == "MPEG_LAYER_III" else 0
        audio.seek(first - lead)
        # All in one read: soundfile seeks after each, with the same loss.
        samples = audio.read(lead + count, dtype="float32", always_2d=True)[lead:]
    else:
        # Decode what comes before, and drop it.
        dropped = 0
        while dropped < first and len(block := audio.read(min(first - dropped, 1 << 18), dtype="float32")) > 0:
            dropped += len(block)
        samples = audio.read(count, dtype="float32", always_2d=True)
    return np.asarray(samples, dtype=np.float32)


def _decode_by_lhotse(recording: Recording, first: int, count: int) -> NDArray[np.float32]:
    """Do the same as `_decode` for recordings with several sources or with transforms."""
    try:
        check_sources(recording.to_dict())
    except ForbiddenSourceError as error:
        raise AudioError(str(error)) from None
    rate = recording.sampling_rate
    # Lhotse's other backends insert some file names into a shell command. The backend is a setting of the whole
    # process, so take a lock.
    with _LHOTSE_BACKEND:
        before = get_current_audio_backend()
        set_current_audio_backend("LibsndfileBackend")
        try:
            with _with_plain_paths(recording) as plain, seeded(recording):
                samples = plain.load_audio(offset=first / rate, duration=count / rate)
        except soundfile.LibsndfileError as error:  # Lhotse re-raises it in a form that cannot be printed
            raise AudioError(f"does not decode: {error.__context__ or error}") from error
        finally:
            set_current_audio_backend(before)
    return np.ascontiguousarray(samples.T, dtype=np.float32)


@contextmanager
def _opened(cut: Cut) -> Iterator[str | BytesIO]:
    """Yield what soundfile can open: a path, or the bytes of a recording in memory or in a tar file (`shar.py`)."""
    source = cut.recording.sources[0]
    member = (cut.custom or {}).get("tar_member")
    if source.type == "memory":
        yield BytesIO(source.source)
    elif member is None:
        check_audio(source.source)  # before it is opened, which would wait for ever if it is a FIFO now
        with plain_path(source.source) as path:
            yield path
    else:
        offset, size = member
        tar_path = Path(source.source.rsplit(".tar/", 1)[0] + ".tar")
        size_of(tar_path)
        with tar_path.open("rb") as tar:
            check_part(tar.fileno(), offset, size)
            tar.seek(offset)
            data = tar.read(size)
        yield BytesIO(data)


@contextmanager
def _with_plain_paths(recording: Recording) -> Iterator[Recording]:
    """Yield a recording whose files libsndfile can open by the names in it, and so for its impulse responses.

    Raises:
        AudioError: A file is at another rate than the manifest says. Lhotse does not compare them.
    """
    for one in recording.sources:
        if one.type == "file":
            check_audio(one.source)
    with ExitStack() as opened:
        sources = [
            fastcopy(one, source=opened.enter_context(plain_path(one.source))) if one.type == "file" else one
            for one in recording.sources
        ]
        rate = sampling_rates(recording)[0]
        for one in sources:
            found = soundfile.info(one.source if one.type == "file" else BytesIO(one.source)).samplerate
            if found != rate:
                raise AudioError(f"is at {found} Hz, but its manifest says {rate} Hz")

        def plain_response(response: Recording) -> Recording:
            try:
                return opened.enter_context(_with_plain_paths(response))
            except (AudioError, UnusableFileError) as error:
                raise AudioError(f"has a transform with an impulse response that {error}") from None

        yield fastcopy(recording, sources=sources, transforms=repeatable(recording, plain_response))
