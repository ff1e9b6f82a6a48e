"""Make audio files and cuts for the tests of `fastssl.data`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from lhotse import AudioSource, Recording
from lhotse.cut import Cut, MonoCut
from numpy.typing import NDArray


def noise(seconds: float, *, rate: int = 16000, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Return quiet noise of shape (T, channels)."""
    samples = 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
    return samples.astype(np.float32)


def tone(seconds: float, *, rate: int = 16000, hz: float = 1000.0) -> NDArray[np.float32]:
    """Return a sine wave of shape (T,)."""
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def write(path: Path, samples: NDArray[np.float32], *, rate: int = 16000, subtype: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def cuts_of(durations_s: Sequence[float], *, windows: bool = False) -> list[Cut]:
    """Return cuts whose audio files do not exist, for code that reads only metadata."""
    cuts = []
    for index, duration in enumerate(durations_s):
        source = AudioSource(type="file", channels=[0], source=f"/nowhere/{index}.wav")
        samples = round(duration * 16000)
        recording = Recording(f"r{index}", [source], 16000, samples, samples / 16000)
        custom = {"window_of": {"id": "long", "start": 0.0, "duration": 1e6}} if windows else None
        cuts.append(MonoCut(f"u{index}", 0.0, samples / 16000, 0, recording=recording, custom=custom))
    return cuts
