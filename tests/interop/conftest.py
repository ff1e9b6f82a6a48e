"""Define the fixtures that the tests of other libraries' models share."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def speech(speech_folder: Path) -> list[Any]:
    """Return the two shortest and the three longest recordings, as samples at 16 kHz."""
    soundfile = pytest.importorskip("soundfile")
    from fastssl.data.audio import resample

    decoded = []
    for path in sorted([*speech_folder.rglob("*.flac"), *speech_folder.rglob("*.wav")])[:40]:
        samples, rate_hz = soundfile.read(path, dtype="float32")
        decoded.append(resample(samples, rate_hz, 16_000))
    decoded.sort(key=len)
    return [*decoded[:2], *decoded[-3:]]
