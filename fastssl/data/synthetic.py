"""Generate a demo corpus without a download: sentences spoken by espeak-ng, with their text and phonemes.

    python -m fastssl.data.synthetic OUT --minutes 10 --seed 0 --speakers 16

The voices are made by formant synthesis. They are good enough for tests, for watching an encoder learn, and for telling
speakers and phonemes apart, but they do not replace recordings.
"""

import argparse
import csv
import ctypes
import math
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from fastssl.data.audio import SAMPLE_RATE_HZ, resample
from fastssl.data.sentences import sentence
from fastssl.files import make_folder, replacing
from fastssl.names import shown, shown_lines

_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
_TIMBRES = ("m1", "f2", "m3", "f4", "m5", "f1", "m7", "f3", "m2", "f5", "m4", "m6", "m8")
_SHORTEST_S, _LONGEST_S = 1.0, 20.0
# Values of the enumerations in espeak-ng's speak_lib.h.
_RETRIEVAL_SYNCHRONOUS, _POSITION_CHARACTER, _UTF8, _IPA = 2, 1, 1, 2
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4


class Voice(NamedTuple):
    """A synthetic speaker: the settings of espeak-ng that define its voice.

    Args:
        name: espeak-ng's name for the accent and timbre, such as "en-us+m1".
        rate: Speaking rate in words per minute.
        pitch: Pitch of the voice, from 0 to 99.
        pitch_range: Range of the intonation, from 0 (monotone) to 99.
    """

    name: str
    rate: int
    pitch: int
    pitch_range: int


def voice(number: int) -> Voice:
    """Return the voice of a speaker, which depends only on the speaker's number and not on the seed of the corpus.

    Args:
        number: Number of the speaker, from 0.
    """
    draw = random.Random(f"voice {number}")
    # 8 and 13 share no factor, so the 104 pairs of accent and timbre all occur before one repeats (with another pitch).
    name = f"{_ACCENTS[number % len(_ACCENTS)]}+{_TIMBRES[number % len(_TIMBRES)]}"
    return Voice(name, draw.randint(135, 200), draw.randint(25, 75), draw.randint(30, 80))


def speak_corpus(output: Path, *, minutes: float, seed: int = 0, speakers: int = 16) -> Path:
    """Write a corpus of synthetic read speech in a temporary folder, and rename it to `output` once it is complete.

    The files are mono at 16 kHz, four in five FLAC and the rest WAV. They last 1 to 20 s: many are near 14 s, and the
    rest are shorter. The columns of `utterances.tsv` are path, speaker, text, phonemes and seconds; phonemes are in IPA
    with stress marks, a space between phonemes and ` | ` between words. The same arguments give the same bytes, and
    more minutes with the same seed only add utterances.

    Args:
        output: Folder to write; it must be empty or not exist yet.
        minutes: Total duration of the utterances in minutes; the last utterance may end after it.
        seed: Seed of the sentences and of how each is spoken.
        speakers: Number of voices, which take turns.

    Returns:
        `output`.

    Raises:
        ValueError: `minutes` or `speakers` is out of range, or `output` exists and is not an empty folder.
        ImportError: espeakng_loader is not installed.
    """
    if not 0 < minutes < math.inf or speakers < 1:
        raise ValueError(f"minutes and speakers: must be positive, got {minutes} and {speakers}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: {output} exists and is not an empty folder; choose another or remove it")
    make_folder(output.parent)
    with replacing(output) as partial:
        partial.mkdir()
        _write(partial, minutes * 60, random.Random(seed), [voice(number) for number in range(speakers)])
    return output


def _write(folder: Path, wanted_s: float, draw: random.Random, voices: list[Voice]) -> None:
    synthesizer = _Synthesizer()
    written_s, index = 0.0, 0
    with (folder / "utterances.tsv").open("w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table, delimiter="\t", lineterminator="\n")
        rows.writerow(["path", "speaker", "text", "phonemes", "seconds"])
        while written_s < wanted_s:
            speaker = index % len(voices)
            text, phonemes, waveform = _utterance(synthesizer, voices[speaker], draw)
            name = f"{index:05d}.wav" if index % 5 == 4 else f"{index:05d}.flac"
            # As bytes, because soundfile cannot encode the name of a folder that is not valid UTF-8.
            soundfile.write(os.fsencode(folder / name), waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
            seconds = len(waveform) / SAMPLE_RATE_HZ
            rows.writerow([name, f"s{speaker:02d}", text, phonemes, f"{seconds:.3f}"])
            written_s += seconds
            index += 1
    synthesizer.close()


def _utterance(synthesizer: "_Synthesizer", base: Voice, draw: random.Random) -> tuple[str, str, NDArray[np.float32]]:
    """Return the text, phonemes and waveform (T,) of an utterance whose length is typical of read speech."""
    while True:
        target_s = draw.gauss(14, 2) if draw.random() < 0.6 else draw.uniform(_SHORTEST_S, 14)
        target_s = min(max(target_s, _SHORTEST_S), _LONGEST_S - 1)
        rate = round(base.rate * draw.uniform(0.93, 1.07))
        spoken = base._replace(rate=rate, pitch=base.pitch + draw.randint(-4, 4))
        text = _text(draw, characters=round(target_s * rate * 0.098))
        samples = synthesizer.speak(text, spoken)
        waveform = resample(samples, synthesizer.rate_hz, SAMPLE_RATE_HZ)
        if _SHORTEST_S <= len(waveform) / SAMPLE_RATE_HZ <= _LONGEST_S:
            break
    # Like real recordings, each utterance has its own level and is never digitally silent.
    waveform *= draw.uniform(0.3, 0.9) / np.abs(waveform).max()
    noise = np.random.default_rng(draw.getrandbits(64)).standard_normal(len(waveform), dtype=np.float32)
    return text, synthesizer.phonemes(text, spoken), np.clip(waveform + 1e-3 * noise, -1, 1)


def _text(draw: random.Random, *, characters: int) -> str:
    """Return sentences that together have about `characters` characters."""
    text = ""
    for _ in range(100):
        longer = f"{text} {sentence(draw)}".strip()
        if abs(len(longer) - characters) < abs(len(text) - characters):
            text = longer
        elif len(text) > 0.9 * characters:
            break
    return text


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class _Synthesizer:
    """A fresh copy of espeak-ng, so that the output does not depend on earlier use of the library in this process.

    The library keeps state such as the phase of its oscillators from one utterance to the next, even when it is closed
    and opened again. Only a library loaded from a new copy of its file starts in the initial state.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            message = (
                "the demo corpus needs espeak-ng from the package espeakng_loader, which is not installed: run "
                "`pip install '.[demo]'` in a clone of the project"
            )
            raise ImportError(message) from error
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(espeakng_loader.get_library_path(), folder)
            self._library: Any = ctypes.CDLL(str(copy))
        data = os.fsencode(espeakng_loader.get_data_path())
        self.rate_hz: int = self._library.espeak_Initialize(_RETRIEVAL_SYNCHRONOUS, 0, data, 0)
        if self.rate_hz <= 0:
            raise RuntimeError(
                f"espeak-ng did not start with its data in {os.fsdecode(data)}; reinstall the package espeakng_loader"
            )
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._pieces: list[bytes] = []
        # Keep a reference: ctypes does not, and the library would call freed memory.
        self._callback = _Callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: Voice) -> NDArray[np.float32]:
        """Speak a text with a voice; return the waveform (T,) float32 in [-1, 1) at `rate_hz`."""
        self._select(voice)
        self._pieces.clear()
        data = text.encode()
        self._check(self._library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None), text)
        samples = np.frombuffer(b"".join(self._pieces), dtype=np.int16)
        scaled: NDArray[np.float32] = samples.astype(np.float32) / np.float32(32768)
        return scaled

    def phonemes(self, text: str, voice: Voice) -> str:
        """Return the phonemes of a text: IPA with stress marks, a space between phonemes, ` | ` between words."""
        self._select(voice)
        data = ctypes.create_string_buffer(text.encode())
        rest = ctypes.c_void_p(ctypes.addressof(data))
        words: list[str] = []
        # Each call converts one clause and moves the pointer past it.
        while rest.value:
            clause = self._library.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA | ord("_") << 8)
            words += clause.decode().split()
        return " | ".join(" ".join(word.strip("_").split("_")) for word in words)

    def close(self) -> None:
        """Shut down the library and free its memory."""
        self._library.espeak_Terminate()

    def _select(self, voice: Voice) -> None:
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._check(self._library.espeak_SetVoiceByName(voice.name.encode()), voice.name)
        settings = ((_RATE, voice.rate), (_VOLUME, 100), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range))
        for parameter, value in settings:
            self._check(self._library.espeak_SetParameter(parameter, value, 0), voice.name)

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            raise RuntimeError(f"espeak-ng returned error {status} for {what!r}")


def main() -> None:
    """Run `python -m fastssl.data.synthetic`; exit with status 1 and a message if an argument is invalid."""
    parser = argparse.ArgumentParser(description="Speak a demo corpus with espeak-ng.")
    parser.add_argument("output", type=Path, help="folder to write; must be empty or not exist yet")
    parser.add_argument("--minutes", type=float, default=10.0, help="total duration in minutes (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sentences (default: 0)")
    parser.add_argument("--speakers", type=int, default=16, help="number of voices (default: 16)")
    arguments = parser.parse_args()
    try:
        speak_corpus(arguments.output, minutes=arguments.minutes, seed=arguments.seed, speakers=arguments.speakers)
    except (ValueError, ImportError) as error:
        parser.exit(1, f"{shown_lines(str(error))}\n")
    print(f"wrote {arguments.minutes:g} minutes of {arguments.speakers} speakers to {shown(arguments.output)}")


if __name__ == "__main__":
    main()
