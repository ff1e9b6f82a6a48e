import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from numpy.typing import NDArray

from fastssl.data import audio
from fastssl.data.audio import AudioError, read_waveform, resample
from fastssl.data.corpus import open_corpus
from tests.data.making import noise, tone, write


def cut_of(path: Path) -> Cut:
    return next(iter(open_corpus(path, min_duration_s=0, window_s=None).cuts))


def part(cut: Cut, start_s: float, duration_s: float) -> Cut:
    return fastcopy(cut, start=start_s, duration=duration_s)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000])
def test_a_tone_is_the_same_tone_at_16_khz(tmp_path: Path, rate: int) -> None:
    cut = cut_of(write(tmp_path / "a.wav", 0.5 * tone(2.0, rate=rate), rate=rate, subtype="FLOAT"))
    waveform = read_waveform(cut)
    assert waveform.dtype == np.float32
    assert waveform.shape == (32000,)
    # Near both ends the resampling filter mixes in the silence outside the recording, so the ends are not compared.
    assert np.abs(waveform - 0.5 * tone(2.0))[200:-200].max() < 2e-3


def test_what_16_khz_cannot_hold_is_filtered_out() -> None:
    passed, aliased = (np.std(resample(tone(1.0, rate=44100, hz=hz), 44100, 16000)) for hz in (7000, 9000))
    assert passed > 0.69
    assert aliased < 0.01


@pytest.mark.parametrize("rate", [6000, 8000, 11025, 22050, 24000, 44100, 44110, 48000, 96000])
@pytest.mark.parametrize("seconds", [0.003, 0.5, 2.3])
def test_resampling_in_blocks_is_the_same(rate: int, seconds: float) -> None:
    samples = noise(seconds, rate=rate)[:, 0]
    plain, blocks = (resample(samples, rate, 16000, rules=rules) for rules in (1, 2))
    assert blocks.shape == plain.shape
    np.testing.assert_allclose(blocks, plain, atol=3e-7)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("start_s", [0.0, 0.02, 1.3, 2.98])
def test_a_part_is_that_part_of_the_whole(tmp_path: Path, rate: int, start_s: float) -> None:
    cut = cut_of(write(tmp_path / "a.wav", noise(4.0, rate=rate), rate=rate, subtype="FLOAT"))
    whole = read_waveform(cut)
    first = round(start_s * 16000)
    waveform = read_waveform(part(cut, start_s, 1.0))
    assert waveform.shape == (16000,)
    np.testing.assert_allclose(waveform, whole[first : first + 16000], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.flac", None), ("a.ogg", "VORBIS"), ("a.ogg", "OPUS"), ("a.mp3", None)]
)
def test_every_format_seeks_to_the_sample(tmp_path: Path, name: str, subtype: str | None) -> None:
    cut = cut_of(write(tmp_path / name, noise(4.0), subtype=subtype))
    whole = read_waveform(cut)
    np.testing.assert_allclose(read_waveform(part(cut, 2.5, 1.0)), whole[40000:56000], atol=1e-5)


@pytest.mark.parametrize("rate", [15999, 44101])
def test_odd_rates_are_read_as_the_nearest_round_one(tmp_path: Path, rate: int) -> None:
    cut = cut_of(write(tmp_path / "a.wav", tone(3.0, rate=rate), rate=rate))
    waveform = read_waveform(cut)
    assert abs(len(waveform) - 48000) < 10
    frequency = np.abs(np.fft.rfft(waveform[:32000])).argmax() / 2
    assert abs(frequency - 1000) <= 0.5


def test_channels_are_averaged_or_chosen(tmp_path: Path) -> None:
    samples = noise(2.0, channels=3)
    cut = cut_of(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    np.testing.assert_allclose(read_waveform(cut), samples.mean(axis=1), atol=1e-7)
    np.testing.assert_array_equal(read_waveform(cut, channel=2), samples[:, 2])
    with pytest.raises(AudioError, match=r"has channels \[0, 1, 2\], but channel 3 was requested"):
        read_waveform(cut, channel=3)


def test_many_channels_are_decoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cut_of(write(tmp_path / "a.wav", noise(2.0, channels=5)))
    whole, alone = read_waveform(cut), read_waveform(cut, channel=3)
    sizes = []
    read = soundfile.SoundFile.read

    def watched(*arguments: Any, **named: Any) -> Any:
        samples = read(*arguments, **named)
        sizes.append(samples.size)
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", watched)
    monkeypatch.setattr(audio, "_LARGEST_PIECE", 5003)
    np.testing.assert_array_equal(read_waveform(cut), whole)
    np.testing.assert_array_equal(read_waveform(cut, channel=3), alone)
    assert max(sizes) == 5000


def test_one_channel_is_taken_whatever_is_chosen(tmp_path: Path) -> None:
    cut = cut_of(write(tmp_path / "a.wav", noise(2.0), subtype="FLOAT"))
    np.testing.assert_array_equal(read_waveform(cut, channel=1), noise(2.0)[:, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    samples = noise(2.0)
    samples[9000] = bad
    cut = cut_of(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    with pytest.raises(AudioError, match="not finite"):
        read_waveform(cut)
    assert read_waveform(part(cut, 1.0, 1.0)).shape == (16000,)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    garbage = np.random.default_rng(0).bytes(3000)
    path.write_bytes({"cut off": data[:middle], "overwritten": data[:middle] + garbage + data[middle + 3000 :]}[how])


@pytest.mark.parametrize("how", ["cut off", "overwritten"])
@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_damage_behind_a_good_header(tmp_path: Path, name: str, how: str) -> None:
    path = write(tmp_path / name, noise(8.0))
    cut = cut_of(path)
    damage(path, how)
    with pytest.raises(AudioError, match=r"ends after \d|does not decode"):
        read_waveform(cut)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(2.0))
    cut = cut_of(path)
    path.unlink()
    with pytest.raises(AudioError, match="does not exist"):
        read_waveform(cut)


@pytest.mark.parametrize("louder", [False, True])
def test_a_file_that_has_become_a_pipe_is_not_opened(tmp_path: Path, louder: bool) -> None:
    path = write(tmp_path / "a.wav", noise(2.0))
    cut = cut_of(path).perturb_volume(2.0) if louder else cut_of(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AudioError, match="is not a regular file"):
        read_waveform(cut)


def test_an_error_names_the_file_and_not_how_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(2.0)).rename(tmp_path / os.fsdecode(b"\xff.wav"))
    cut = cut_of(path)
    path.write_bytes(b"no audio")
    with pytest.raises(AudioError, match=re.escape(str(path))) as raised:
        read_waveform(cut)
    assert "/proc/self" not in str(raised.value)


def test_a_manifest_with_another_rate_than_the_file(tmp_path: Path) -> None:
    cut = cut_of(write(tmp_path / "a.wav", noise(2.0)))
    lying = fastcopy(cut, recording=fastcopy(cut.recording, sampling_rate=8000, duration=4.0))
    with pytest.raises(AudioError, match="is at 16000 Hz, but its manifest says 8000 Hz"):
        read_waveform(lying)


def test_what_lhotse_has_to_read(tmp_path: Path) -> None:
    """Lhotse reads recordings with transforms, and returns the same samples as for the plain file."""
    samples: NDArray[np.float32] = noise(3.0)
    cut = cut_of(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    louder = cut.perturb_volume(2.0)
    np.testing.assert_allclose(read_waveform(part(louder, 1.0, 1.5)), 2 * samples[16000:40000, 0], atol=1e-6)
