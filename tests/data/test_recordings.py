from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from torch import Tensor

from fastssl.data.audio import AudioError, read_waveform
from fastssl.data.corpus import open_corpus
from fastssl.data.recordings import WAV2VEC2, Chunk, FrameGrid, read_chunks
from tests.data.making import noise, write

RATES = (8000, 11025, 16000, 22050, 44100, 44101)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Cut]:
    """Return a cut of 6 s for each sampling rate."""
    root = tmp_path_factory.mktemp("recordings")
    paths = {rate: write(root / f"{rate}.wav", noise(6.0, rate=rate), rate=rate, subtype="FLOAT") for rate in RATES}
    return {rate: next(iter(open_corpus(path, window_s=None).cuts)) for rate, path in paths.items()}


def encode(waveform: Tensor) -> Tensor:
    """Encode (T, 1) samples as (frames, 400) without a model: each frame is the 400 samples that it covers."""
    return waveform[:, 0].unfold(0, 400, 320)


def stitch(chunks: list[Chunk], frames: int) -> Tensor:
    """Join the chunks' frames into those of the whole recording; fail if a frame is missing or written twice."""
    whole = torch.full((frames, 400), torch.nan)
    for chunk in chunks:
        kept = encode(chunk.waveform)[chunk.keep]
        place = whole[chunk.first_frame : chunk.first_frame + len(kept)]
        assert place.shape == kept.shape
        assert place.isnan().all()
        place.copy_(kept)
    assert not whole.isnan().any()
    return whole


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from(RATES),
    duration_s=st.floats(0.1, 6.0),
    chunk_s=st.floats(0.5, 2.5),
    overlap_s=st.floats(0.01, 0.39),
    normalize=st.booleans(),
)
def test_chunks_are_stitched_to_the_frames_of_the_whole(
    recordings: dict[int, Cut], rate: int, duration_s: float, chunk_s: float, overlap_s: float, normalize: bool
) -> None:
    cut = fastcopy(recordings[rate], duration=round(duration_s * rate) / rate)
    whole = list(read_chunks(cut, chunk_s=100.0, overlap_s=1.0, normalize=normalize))
    assert len(whole) == 1
    expected = encode(whole[0].waveform)
    assert len(expected) == WAV2VEC2.count(len(whole[0].waveform))
    chunks = list(read_chunks(cut, chunk_s=chunk_s, overlap_s=overlap_s, normalize=normalize))
    assert all(chunk.start % 320 == 0 for chunk in chunks)
    # A chunk may exceed `chunk_s` by samples that do not complete another frame.
    assert max(len(chunk.waveform) for chunk in chunks) < round(chunk_s * 16000) + 320
    torch.testing.assert_close(stitch(chunks, len(expected)), expected, atol=2e-6, rtol=0)


def test_every_kept_frame_has_context_on_both_sides(recordings: dict[int, Cut]) -> None:
    chunks = list(read_chunks(recordings[16000], chunk_s=2.5, overlap_s=1.0, normalize=False))
    assert len(chunks) > 3
    for index, chunk in enumerate(chunks):
        frames = WAV2VEC2.count(len(chunk.waveform))
        assert chunk.keep.start == 0 if index == 0 else chunk.keep.start >= 24
        assert chunk.keep.stop == frames if index == len(chunks) - 1 else chunk.keep.stop <= frames - 24


def test_one_chunk_is_the_waveform(recordings: dict[int, Cut]) -> None:
    cut = recordings[22050]
    (chunk,) = read_chunks(cut, chunk_s=20.0, overlap_s=1.0, normalize=False)
    np.testing.assert_array_equal(chunk.waveform[:, 0].numpy(), read_waveform(cut))
    assert (chunk.start, chunk.first_frame, chunk.keep) == (0, 0, slice(0, 299))


def test_scaling_is_that_of_the_whole_recording(tmp_path: Path) -> None:
    samples = noise(10.0) * np.linspace(0.1, 5, 160000, dtype=np.float32)[:, None] + 0.2
    cut = next(iter(open_corpus(write(tmp_path / "a.wav", samples, subtype="FLOAT")).cuts))
    chunks = list(read_chunks(cut, chunk_s=2.0, overlap_s=0.5, normalize=True))
    assert len(chunks) > 4
    expected = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    for chunk in chunks:
        part = expected[chunk.start : chunk.start + len(chunk.waveform)]
        np.testing.assert_allclose(chunk.waveform.numpy(), part, atol=1e-5)


def test_silence_stays_silence(tmp_path: Path) -> None:
    cut = next(iter(open_corpus(write(tmp_path / "a.wav", np.zeros(64000, dtype=np.float32))).cuts))
    for chunk in read_chunks(cut, chunk_s=2.0, overlap_s=0.5, normalize=True):
        assert not chunk.waveform.any()


def test_another_stride_and_receptive_field(recordings: dict[int, Cut]) -> None:
    grid = FrameGrid(160, 1200)
    chunks = list(read_chunks(recordings[16000], chunk_s=2.0, overlap_s=0.2, normalize=False, grid=grid))
    frames = [range(chunk.first_frame, chunk.first_frame + chunk.keep.stop - chunk.keep.start) for chunk in chunks]
    assert [frame for kept in frames for frame in kept] == list(range(grid.count(96000)))


def test_windows_are_recordings_again(tmp_path: Path) -> None:
    write(tmp_path / "long.wav", noise(9.0))
    (cut,) = open_corpus(tmp_path, window_s=None).cuts
    assert len(encode(next(read_chunks(cut, chunk_s=20.0, overlap_s=1.0, normalize=False)).waveform)) == 449


@pytest.mark.parametrize(
    ("chunk_s", "overlap_s", "message"),
    [
        (2.0, 0.001, "overlap_s: must be at least 0.01"),
        (2.0, 2.0, "chunk_s: 2 s is too short for an overlap"),
        (-1.0, 0.5, "chunk_s"),
    ],
)
def test_chunks_that_cannot_be(recordings: dict[int, Cut], chunk_s: float, overlap_s: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(read_chunks(recordings[16000], chunk_s=chunk_s, overlap_s=overlap_s, normalize=False))


def test_too_short_for_a_frame(recordings: dict[int, Cut]) -> None:
    cut = fastcopy(recordings[16000], duration=399 / 16000)
    with pytest.raises(AudioError, match="shorter than one frame"):
        next(read_chunks(cut, chunk_s=2.0, overlap_s=0.5, normalize=False))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_file_that_ends_early(tmp_path: Path, normalize: bool) -> None:
    path = write(tmp_path / "a.flac", noise(10.0))
    cut = next(iter(open_corpus(path).cuts))
    path.write_bytes(path.read_bytes()[:-40000])
    with pytest.raises(AudioError, match=r"ends after|does not decode"):
        list(read_chunks(cut, chunk_s=2.0, overlap_s=0.5, normalize=normalize))
