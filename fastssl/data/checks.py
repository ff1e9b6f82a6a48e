"""Check each recording once, when it enters a corpus: manifests and headers may be damaged, or lie.

What comes after may rely on every field that it uses: its type, a finite value, and values that agree with each other
and with the size of the file. Only decoding can still fail.
"""

import os
from pathlib import Path
from typing import Any, TypeGuard

from lhotse import AudioSource, Recording
from lhotse.augmentation import Narrowband, ReverbWithImpulseResponse, Speed, Tempo, Volume
from lhotse.augmentation import Resample as ResampleTransform
from lhotse.augmentation.transform import AudioTransform
from lhotse.augmentation.utils import FastRandomRIRGenerator
from lhotse.cut import Cut, MonoCut, MultiCut

from fastssl.data.audio import TOLERANCE_S, AudioError, check_end, check_filter, check_rate
from fastssl.data.manifest import count_transforms, shortened
from fastssl.data.rules import OLDEST_RULES, RULES
from fastssl.data.transforms import NARROWBAND_HZ, sampling_rates
from fastssl.regular import UnusableFileError, check_audio, size_of

_LONGEST_DAYS = 10
_LONGEST_ID = 4096  # characters
# The most that any format packs into a byte: FLAC stores 65,535 samples of silence in 12 bytes, Opus and Vorbis
# between 1,000 and 4,000 in 1 to 3 bytes.
_SAMPLES_PER_BYTE = 8192
#: Those of impulse responses are counted too. Each takes time whenever a crop is read; augmentation needs a handful.
_MOST_TRANSFORMS = 20
#: The longest echoes of real rooms last some ten seconds. A longer response would make each crop as long.
_LONGEST_RESPONSE_S = 60.0
#: Lhotse draws an impulse response at 64 times its sampling rate.
_LONGEST_DRAWN = 200_000  # samples


def check_fields(cut: Cut) -> None:
    """Check the fields of a cut and its recording, without looking at any file.

    Args:
        cut: What a manifest or a header says; its fields may have any type.

    Raises:
        AudioError: A field cannot be used; the message names it, with its value and what was expected.
    """
    if not isinstance(cut, MonoCut | MultiCut) or not isinstance(cut.recording, Recording):
        raise AudioError("is not a cut of exactly one recording")
    recording = cut.recording
    for name, value in (("id", cut.id), ("recording id", recording.id)):
        _check(_is_id(value), name, value, f"text of 1 to {_LONGEST_ID} characters")
    _check(_is_whole(recording.sampling_rate, 1), "sampling_rate", recording.sampling_rate, "a whole number of Hz")
    check_rate(recording.sampling_rate)
    _check(_is_whole(recording.num_samples, 1), "num_samples", recording.num_samples, "a whole number above 0")
    for name, value in (("recording duration", recording.duration), ("duration", cut.duration)):
        _check(_is_number(value) and value > 0, name, value, "a finite number above 0")
    _check(_is_number(cut.start) and cut.start >= 0, "start", cut.start, "a finite number from 0 on")
    if recording.num_samples > _LONGEST_DAYS * 86400 * recording.sampling_rate:
        raise AudioError(
            f"is said to last more than {_LONGEST_DAYS} days; correct its length, or split it into shorter files"
        )
    length_s = recording.num_samples / recording.sampling_rate
    if abs(recording.duration - length_s) > TOLERANCE_S:
        raise AudioError(
            f"has a recording duration of {recording.duration:.2f} s, but num_samples and sampling_rate give "
            f"{length_s:.2f} s"
        )
    check_end(cut)
    _check_channels(cut)
    _check_transforms(recording)
    _check_custom(cut)


def check_source(cut: Cut, source: AudioSource) -> None:
    """Check that a source of a cut exists and can contain the samples that the recording is said to have.

    Args:
        cut: A cut that `check_fields` accepts.
        source: One of the sources of its recording.

    Raises:
        AudioError: There is no such file, it is not a regular file or has large holes, or it is too short.
    """
    recording = cut.recording
    if source.type == "shar":
        raise AudioError("has no audio in its shard")
    try:
        if source.type == "memory":
            size = len(source.source)
        elif (member := (cut.custom or {}).get("tar_member")) is not None:
            size = member[1]
            if sum(member) > size_of(tar_of(source.source)):
                raise AudioError(f"is said to end after {sum(member):,} bytes of its tar file, which is shorter")
        else:
            size = check_audio(source.source)
    except UnusableFileError as error:
        raise AudioError(str(error)) from None
    if size == 0:
        raise AudioError("is empty")
    if recording.num_samples > _SAMPLES_PER_BYTE * size * _growth(recording):
        raise AudioError(f"is said to have {recording.num_samples:,} samples, more than {size:,} bytes can contain")


def tar_of(source: str) -> Path:
    """Return the tar file of a source `SHARD.tar/NAME`."""
    return Path(source.rsplit(".tar/", 1)[0] + ".tar")


def _check(is_right: bool, name: str, value: object, expected: str) -> None:
    if not is_right:
        shown = f"{shortened(value)!r}" if isinstance(value, str) else shortened(value)
        raise AudioError(f"has {name} {shown}, expected {expected}")


def _is_whole(value: object, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number; NaN fails the comparison, and no duration is as large as 1e15."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


def _is_id(value: object) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can contain it, but no file name can
        return False
    return True


def _check_channels(cut: Cut) -> None:
    recording = cut.recording
    _check(isinstance(recording.sources, list) and recording.sources != [], "sources", recording.sources, "a list")
    available: list[int] = []
    for source in recording.sources:
        _check_whole_numbers("channels of a source", source.channels)
        available += source.channels
        if source.type == "memory":
            _check(isinstance(source.source, bytes), "audio in memory", source.source, "bytes")
        else:
            is_path = isinstance(source.source, str) and source.source != ""
            _check(is_path or source.type == "shar", "source", source.source, "a path")
    if len(set(available)) < len(available):
        raise AudioError(f"has a channel twice among {shortened(available)}")
    _check_whole_numbers("channel_ids", recording.channel_ids)
    wanted = [cut.channel] if isinstance(cut.channel, int) else cut.channel
    _check_whole_numbers("channel", wanted)
    if not set(wanted) <= set(available):
        raise AudioError(f"has channels {shortened(available)}, but its manifest asks for {shortened(wanted)}")


def _check_whole_numbers(name: str, values: object) -> None:
    is_right = isinstance(values, list | tuple) and len(values) > 0 and all(_is_whole(value, 0) for value in values)
    _check(is_right, name, values, "a list of whole numbers from 0 on")


def _check_transforms(recording: Recording) -> None:
    transforms = recording.transforms if recording.transforms is not None else []
    _check(isinstance(transforms, list), "transforms", transforms, "a list")
    if (found := count_transforms(recording)) > _MOST_TRANSFORMS:
        raise AudioError(f"has {found} transforms, expected at most {_MOST_TRANSFORMS}")
    for transform in transforms:
        _check(isinstance(transform, AudioTransform), "transform", transform, "one of Lhotse's")
        if isinstance(transform, Speed | Tempo):
            factor = transform.factor
            _check(_is_number(factor) and 0.01 <= factor <= 100, "factor of a transform", factor, "0.01 to 100")
            check_filter(round(recording.sampling_rate * factor), recording.sampling_rate)
        elif isinstance(transform, Volume):
            _check(_is_number(transform.factor), "factor of a transform", transform.factor, "a finite number")
        elif isinstance(transform, ResampleTransform):
            _check_rates(transform.source_sampling_rate, transform.target_sampling_rate)
        elif isinstance(transform, Narrowband):
            _check_rates(transform.source_sampling_rate, NARROWBAND_HZ)
            _check_rates(NARROWBAND_HZ, transform.source_sampling_rate)
        elif isinstance(transform, ReverbWithImpulseResponse):
            _check_whole_numbers("rir_channels", transform.rir_channels)
            _check_impulse_response(transform.rir)
            _check_generator(transform.rir_generator)
    if _growth(recording) > 100:
        raise AudioError("has transforms that multiply its samples by more than 100")
    _check_chain(recording)


def _check_chain(recording: Recording) -> None:
    """Check that each transform works at the rate of the samples that it gets; Lhotse would use it at any other."""
    rates = sampling_rates(recording)
    for transform, before, after in zip(recording.transforms or [], rates, rates[1:], strict=False):
        result = after
        if isinstance(transform, ResampleTransform):
            result = transform.target_sampling_rate
        elif isinstance(transform, Narrowband):
            result = transform.source_sampling_rate if transform.restore_orig_sr else NARROWBAND_HZ
        if result != after:
            raise AudioError(f"has a transform to {result} Hz, but what follows expects {after} Hz")
        if isinstance(transform, ReverbWithImpulseResponse):
            drawn = transform.rir is None
            rate = transform.rir_generator.sr if drawn else transform.rir.sampling_rate
            if rate != before:
                raise AudioError(
                    f"has a transform with an impulse response at {rate} Hz, expected {before} Hz, the rate of the "
                    "samples that it is applied to"
                )


def _check_rates(before: object, after: object) -> None:
    for rate in (before, after):
        _check(_is_whole(rate, 1), "sampling rate of a transform", rate, "a whole number of Hz")
    assert isinstance(before, int)
    assert isinstance(after, int)
    check_filter(before, after)


def _growth(recording: Recording) -> float:
    """Return the most that the number of samples has been multiplied by after any of a recording's transforms."""
    growth = most = 1.0
    for transform in recording.transforms or []:
        if isinstance(transform, Speed | Tempo):
            growth /= transform.factor
        elif isinstance(transform, ResampleTransform):
            growth *= transform.target_sampling_rate / transform.source_sampling_rate
        elif isinstance(transform, Narrowband):
            most = max(most, growth * NARROWBAND_HZ / transform.source_sampling_rate)
            if not transform.restore_orig_sr:
                growth *= NARROWBAND_HZ / transform.source_sampling_rate
        elif isinstance(transform, ReverbWithImpulseResponse):
            growth *= len(transform.rir_channels)  # one channel becomes as many
        most = max(most, growth)
    return most


def _check_impulse_response(response: Recording | Cut | None) -> None:
    if response is None:  # Lhotse makes one up
        return
    try:
        cut: Cut = response.to_cut() if isinstance(response, Recording) else response
        check_fields(cut)
        if cut.recording.duration > _LONGEST_RESPONSE_S:
            raise AudioError(f"lasts {cut.recording.duration:.2f} s, expected at most {_LONGEST_RESPONSE_S:g} s")
        for source in cut.recording.sources:
            check_source(cut, source)
    except AudioError as error:
        raise AudioError(f"has a transform with an impulse response that {error}") from None


def _check_generator(generator: object) -> None:
    """Check what Lhotse needs to draw an impulse response."""
    if generator is None:
        return
    _check(isinstance(generator, FastRandomRIRGenerator), "rir_generator", generator, "an object with sr and max_T60")
    assert isinstance(generator, FastRandomRIRGenerator)
    rate, length_s = generator.sr, generator.max_T60
    _check(_is_whole(rate, 1), "sr of rir_generator", rate, "a whole number of Hz")
    _check(_is_number(length_s) and length_s > 0, "max_T60 of rir_generator", length_s, "a number of seconds above 0")
    if rate * max(1, length_s) > _LONGEST_DRAWN:
        raise AudioError(f"has a transform whose impulse response may have more than {_LONGEST_DRAWN:,} samples")


def _check_custom(cut: Cut) -> None:
    custom = cut.custom if cut.custom is not None else {}
    _check(isinstance(custom, dict), "custom", custom, "an object")
    rules = custom.get("rules", OLDEST_RULES)
    expected = f"a whole number up to {RULES}; a larger one needs a newer fastssl"
    _check(_is_whole(rules, OLDEST_RULES) and rules <= RULES, "rules", rules, expected)
    if "only_channel" in custom:
        channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
        only = custom["only_channel"]
        _check(_is_whole(only, 0) and only in channels, "only_channel", only, f"one of {shortened(channels)}")
    if "window_of" in custom:
        _check(
            _is_parent(custom["window_of"]), "window_of", custom["window_of"], "an object with id, start and duration"
        )
    if "tar_member" in custom:
        _check(_is_place(custom["tar_member"]), "tar_member", custom["tar_member"], "[offset, size] in bytes")
        for source in cut.recording.sources:
            in_tar = source.type == "shar" or (isinstance(source.source, str) and ".tar/" in source.source)
            _check(in_tar, "source", source.source, "SHARD.tar/NAME, because it has tar_member")


def _is_parent(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_id(value.get("id")):
        return False
    start, duration = value.get("start"), value.get("duration")
    return _is_number(start) and start >= 0 and _is_number(duration) and duration > 0


def _is_place(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is_whole(value[0], 0) and _is_whole(value[1], 1)
