"""Make sound with the structure of speech, to run an encoder without recordings."""

import numpy as np
from numpy.typing import NDArray

_RATE_HZ = 16_000
_SHORTEST, _LONGEST = 960, 4000  # samples of a sound: 60 to 250 ms
_SOUNDS, _SHARES = ("voiced", "unvoiced", "pause"), (0.6, 0.25, 0.15)
#: Ranges of the first three formants, and their bandwidth, in Hz.
_FORMANTS_HZ, _BANDWIDTH_HZ = ((250, 800), (800, 2300), (2300, 3200)), 90.0
_HIGHEST_HZ = 4000.0
_FLOOR = 1e-3  # of recordings: never digitally silent


def speech_like(samples: int, *, seed: int) -> NDArray[np.float32]:
    """Return vowels with gliding pitch, fricatives and pauses; equal arguments give equal samples.

    Args:
        samples: Number of samples T at 16 kHz.
        seed: Seed of the sounds.

    Returns:
        (T,) with mean 0 and standard deviation 1, as processors of speech encoders normalise recordings.
    """
    draw = np.random.default_rng(seed)
    pitch_hz = draw.uniform(90, 240)
    sounds: list[NDArray[np.float64]] = []
    while sum(map(len, sounds)) < samples:
        length = int(draw.integers(_SHORTEST, _LONGEST))
        kind = draw.choice(_SOUNDS, p=_SHARES) if sounds else "voiced"
        if kind == "voiced":
            sound = _vowel(length, pitch_hz * draw.uniform(0.85, 1.15, size=2), draw)
        else:
            sound = (0.3 if kind == "unvoiced" else 0.0) * np.diff(draw.standard_normal(length + 1))
        sounds.append(sound * np.sqrt(np.hanning(length)))
    waveform = np.concatenate(sounds)[:samples] + _FLOOR * draw.standard_normal(samples)
    normalised: NDArray[np.float32] = ((waveform - waveform.mean()) / waveform.std()).astype(np.float32)
    return normalised


def _vowel(length: int, pitches_hz: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    """Add up the harmonics of a pitch that glides from one frequency to another, with three formants."""
    phase = 2 * np.pi * np.cumsum(np.linspace(pitches_hz[0], pitches_hz[1], length)) / _RATE_HZ
    harmonics = np.arange(1, int(_HIGHEST_HZ / pitches_hz.max()) + 1)
    frequencies_hz = harmonics * pitches_hz.mean()
    centres_hz = np.array([draw.uniform(*bounds) for bounds in _FORMANTS_HZ])
    gains = 1 / (1 + ((frequencies_hz[:, None] - centres_hz) / _BANDWIDTH_HZ) ** 2)
    voiced = (gains.sum(1) / np.sqrt(harmonics)) @ np.sin(harmonics[:, None] * phase)
    loudest_is_one: NDArray[np.float64] = voiced / np.abs(voiced).max()
    return loudest_is_one
