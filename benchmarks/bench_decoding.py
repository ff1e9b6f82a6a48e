"""Measure how fast crops are decoded: `python -m benchmarks.bench_decoding --device cpu [--output JSON] [--only ROW]`.

One thread, as in a worker that reads data. The file is in memory, so no time is spent on a disk.
"""

from functools import partial
from io import BytesIO

import numpy as np
import soundfile
import torch
from lhotse import AudioSource, Recording
from lhotse.utils import fastcopy
from torch import Tensor

from benchmarks.harness import Contenders, Outputs, Row, compare
from benchmarks.report import Rows, main
from fastssl.data.audio import SAMPLE_RATE_HZ, read_waveform
from fastssl.data.rules import RULES

_FILE_S, _CROP_S, _START_S = 30, 15.625, 10


def flac(rate_hz: int, device: torch.device) -> Row:
    """Measure a crop of a FLAC file, beside soundfile and torchaudio's resampler with the same filter.

    Args:
        rate_hz: Sampling rate of the file.
        device: Only the CPU decodes.
    """
    import torchaudio

    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    time_s = np.arange(_FILE_S * rate_hz) / rate_hz
    voice = 0.2 * np.sin(2 * np.pi * 150 * time_s) * np.sin(2 * np.pi * 2 * time_s) ** 2
    file = BytesIO()
    soundfile.write(file, voice + 0.01 * generator.standard_normal(len(time_s)), rate_hz, format="FLAC")
    source = AudioSource(type="memory", channels=[0], source=file.getvalue())
    recording = Recording("noise", [source], rate_hz, len(time_s), float(_FILE_S))

    def ours(rules: int) -> Outputs:
        cut = fastcopy(recording.to_cut(), start=_START_S, duration=_CROP_S, custom={"rules": rules})
        return {"waveform": torch.from_numpy(read_waveform(cut))}

    resample = torchaudio.transforms.Resample(rate_hz, SAMPLE_RATE_HZ, lowpass_filter_width=16)
    margin = rate_hz // 100

    def torchaudios() -> Outputs:
        with soundfile.SoundFile(BytesIO(source.source)) as audio:
            audio.seek(_START_S * rate_hz - margin)
            samples = torch.from_numpy(audio.read(round(_CROP_S * rate_hz) + 2 * margin, dtype="float32"))
        skipped = SAMPLE_RATE_HZ // 100
        waveform: Tensor = resample(samples)[skipped : skipped + round(_CROP_S * SAMPLE_RATE_HZ)]
        return {"waveform": waveform}

    contenders = Contenders()
    for rules in range(RULES, 0, -1):
        contenders.add(f"fastssl, rules {rules}", partial(ours, rules))
    contenders.add("soundfile, torchaudio's resampler", torchaudios)
    return compare(
        f"decode {_CROP_S} s of a FLAC file at {rate_hz} Hz to 16 kHz",
        contenders,
        reference=partial(ours, 1),
        tolerance=1e-5,
        device=device,
        audio_s=_CROP_S,
        budget_s=4,
    )


ROWS: Rows = {f"decode-{rate_hz}": partial(flac, rate_hz) for rate_hz in (16000, 44100, 48000)}

if __name__ == "__main__":
    main(ROWS, __doc__)
