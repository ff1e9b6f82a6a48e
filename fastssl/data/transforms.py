"""Lhotse's transforms of a recording: the rates they work at, and impulse responses that are the same at each read."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lhotse import Recording
from lhotse.augmentation import Narrowband, ReverbWithImpulseResponse
from lhotse.augmentation import Resample as ResampleTransform
from lhotse.augmentation.transform import AudioTransform
from lhotse.augmentation.utils import FastRandomRIRGenerator
from lhotse.utils import fastcopy

from fastssl.names import encoded

#: The sampling rate of a telephone line, which Lhotse's `Narrowband` imitates.
NARROWBAND_HZ = 8000


def transforms_of(recording: Recording) -> list[AudioTransform]:
    """Return the transforms of a recording as objects; Lhotse also keeps some as dictionaries.

    Args:
        recording: Any recording.
    """
    transforms = recording.transforms or []
    return [AudioTransform.from_dict(one) if isinstance(one, dict) else one for one in transforms]


def sampling_rates(recording: Recording) -> list[int]:
    """Return the sampling rate of a recording's files, and then that after each of its transforms, in Hz.

    Args:
        recording: A recording. Its own rate is the last one; the others follow from it.
    """
    rates = [recording.sampling_rate]
    for transform in reversed(transforms_of(recording)):
        changes = isinstance(transform, ResampleTransform) or (
            isinstance(transform, Narrowband) and not transform.restore_orig_sr
        )
        rates.append(transform.source_sampling_rate if changes else rates[-1])
    return rates[::-1]


def repeatable(recording: Recording, change: Callable[[Recording], Recording]) -> list[AudioTransform]:
    """Return transforms that do to a recording the same at each read, and leave those of the recording as they are.

    Lhotse draws an impulse response from generators that go on from one read to the next. Here they begin anew, from
    the seeds in the manifest or, where it has none, from the recording's id and the transform's place.

    Args:
        recording: The recording to read.
        change: Function that replaces the recording of an impulse response.
    """
    return [
        _repeatable(one, change, seed=_seed_of(recording, place))
        for place, one in enumerate(transforms_of(recording), start=1)
    ]


def _repeatable(transform: AudioTransform, change: Callable[[Recording], Recording], *, seed: int) -> AudioTransform:
    if not isinstance(transform, ReverbWithImpulseResponse):
        return transform
    response = transform.rir
    if response is None:
        assert isinstance(transform.rir_generator, FastRandomRIRGenerator)
        options = transform.rir_generator.to_dict()
        seeds = {name: seed if options[name] is None else options[name] for name in ("room_seed", "source_seed")}
        return dataclasses.replace(transform, rir_generator=FastRandomRIRGenerator(**options | seeds))
    if isinstance(response, Recording):
        return dataclasses.replace(transform, rir=change(response))
    return dataclasses.replace(transform, rir=fastcopy(response, recording=change(response.recording)))


@contextmanager
def seeded(recording: Recording) -> Iterator[None]:
    """Let PyTorch's generator of the CPU, from which Lhotse draws too, begin with a recording's seed; restore it after.

    PyTorch uses one thread: with several, the order in which Lhotse's reflections are added up changes.

    Args:
        recording: Its id determines the seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed_of(recording, 0))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _seed_of(recording: Recording, place: int) -> int:
    name = encoded(f"transform {place} of {recording.id}")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
