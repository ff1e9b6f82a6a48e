"""Test what a manifest's transforms do: the same at each read, and at the rate that they were made for."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import Recording
from lhotse.augmentation.transform import AudioTransform
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from fastssl.data.audio import AudioError, read_waveform
from fastssl.data.corpus import open_corpus
from fastssl.data.transforms import sampling_rates
from tests.data.making import noise, write

Item = dict[str, Any]


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """Return a recording of 3 s."""
    return Recording.from_file(write(tmp_path / "a.wav", noise(3.0)))


def reverb(**options: Any) -> Item:
    return {"name": "ReverbWithImpulseResponse", "kwargs": options}


def drawn(**options: Any) -> Item:
    return reverb(rir=None, rir_generator={"sr": 16000, **options})


def with_transforms(recording: Recording, *transforms: Item, **fields: Any) -> Item:
    return json.loads(json.dumps(recording.to_dict() | {"transforms": list(transforms)} | fields))  # type: ignore[no-any-return]


def opened(item: Item, folder: Path) -> Cut:
    (folder / "recordings.jsonl").write_text(json.dumps(item) + "\n")
    (cut,) = open_corpus(folder / "recordings.jsonl").cuts
    return cut


def refusal(item: Item, good: Recording, folder: Path) -> str:
    """Return what is wrong with the second line of a manifest."""
    (folder / "recordings.jsonl").write_text(f"{json.dumps(good.to_dict())}\n{json.dumps(item)}\n")
    (problem,) = open_corpus(folder / "recordings.jsonl", max_bad_fraction=0.9).problems
    return str(problem)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "reading changes the number of threads"
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("seeds", [{}, {"room_seed": 1}, {"room_seed": 1, "source_seed": 2}])
def test_a_drawn_impulse_response_is_the_same_at_each_read(
    seeds: dict[str, int], recording: Recording, tmp_path: Path
) -> None:
    item = with_transforms(recording, drawn(**seeds), drawn(**seeds))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    cut = opened(item, tmp_path)
    first = read_waveform(cut)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    np.testing.assert_array_equal(read_waveform(cut), first)
    np.testing.assert_array_equal(read_waveform(opened(item, tmp_path)), first)
    assert not np.array_equal(read_waveform(opened(item | {"id": "other"}, tmp_path)), first)
    assert cut.recording.to_dict()["transforms"][0]["kwargs"]["rir_generator"].get("room_seed") == seeds.get(
        "room_seed"
    )


def test_drawn_impulse_responses_of_an_impulse_response_are_the_same_too(recording: Recording, tmp_path: Path) -> None:
    room = Recording.from_file(write(tmp_path / "room.wav", noise(0.2)))
    for response in (with_transforms(room, drawn()), _as_cut(with_transforms(room, drawn()))):
        cut = opened(with_transforms(recording, reverb(rir=response)), tmp_path)
        np.testing.assert_array_equal(read_waveform(cut), read_waveform(cut))


def _as_cut(item: Item) -> Item:
    return Recording.from_dict(item).to_cut().to_dict()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("one_thread")
def test_a_fixed_impulse_response_is_applied_as_lhotse_does(recording: Recording, tmp_path: Path) -> None:
    room = Recording.from_file(write(tmp_path / "room.wav", noise(0.2)))
    reverberated = recording.reverb_rir(room)
    samples = read_waveform(opened(json.loads(json.dumps(reverberated.to_dict())), tmp_path))
    np.testing.assert_array_equal(samples, reverberated.load_audio()[0])


@pytest.mark.parametrize("as_cut", [False, True])
def test_an_impulse_response_is_at_the_rate_of_what_it_is_applied_to(
    as_cut: bool, recording: Recording, tmp_path: Path
) -> None:
    room = Recording.from_file(write(tmp_path / "room.wav", noise(0.2, rate=8000), rate=8000))
    response = _as_cut(room.to_dict()) if as_cut else room.to_dict()
    expected = "has a transform with an impulse response at 8000 Hz, expected 16000 Hz"
    assert expected in refusal(with_transforms(recording, reverb(rir=response)), recording, tmp_path)
    assert expected in refusal(with_transforms(recording, drawn(sr=8000)), recording, tmp_path)
    # Before resampling, the samples are at the rate of the response.
    slow = Recording.from_file(write(tmp_path / "slow.wav", noise(3.0, rate=8000), rate=8000))
    chain = slow.reverb_rir(room).resample(16000)
    assert len(read_waveform(opened(json.loads(json.dumps(chain.to_dict())), tmp_path))) == 48000


def test_a_transform_to_another_rate_than_the_next_one_expects_is_refused(recording: Recording, tmp_path: Path) -> None:
    resample = {"name": "Resample", "kwargs": {"source_sampling_rate": 16000, "target_sampling_rate": 8000}}
    options = {"codec": "mulaw", "source_sampling_rate": 16000, "restore_orig_sr": False}
    for transform in (resample, {"name": "Narrowband", "kwargs": options}):
        item = with_transforms(recording, transform, num_samples=24000, duration=1.5)
        assert "has a transform to 8000 Hz, but what follows expects 16000 Hz" in refusal(item, recording, tmp_path)
    restored = options | {"source_sampling_rate": 8000, "restore_orig_sr": True}
    item = with_transforms(recording, {"name": "Narrowband", "kwargs": restored})
    assert "has a transform to 8000 Hz, but what follows expects 16000 Hz" in refusal(item, recording, tmp_path)


def test_rates_along_a_chain(recording: Recording) -> None:
    assert sampling_rates(recording) == [16000]
    chain = recording.resample(8000).perturb_speed(1.1).resample(12000).narrowband("mulaw", restore_orig_sr=False)
    assert sampling_rates(chain) == [16000, 8000, 8000, 12000, 8000]


@pytest.mark.parametrize("where", ["recording", "impulse response"])
def test_a_file_at_another_rate_than_its_manifest_says_is_refused(
    where: str, recording: Recording, tmp_path: Path
) -> None:
    """Lhotse takes the samples as they are, if their number is right."""
    fast = Recording.from_file(write(tmp_path / "fast.wav", noise(1.0, rate=48000), rate=48000))
    lying = fastcopy(fast, sampling_rate=16000, num_samples=48000, duration=3.0)
    volume = {"name": "Volume", "kwargs": {"factor": 0.5}}
    if where == "recording":
        item = with_transforms(lying, volume)
    else:
        item = with_transforms(recording, reverb(rir=lying.to_dict()))
    with pytest.raises(AudioError, match="is at 48000 Hz, but its manifest says 16000 Hz") as error:
        read_waveform(opened(item, tmp_path))
    assert ("with an impulse response that" in str(error.value)) == (where != "recording")


def test_an_impulse_response_that_became_a_pipe_is_not_opened(recording: Recording, tmp_path: Path) -> None:
    room = Recording.from_file(write(tmp_path / "room.wav", noise(0.2)))
    cut = opened(with_transforms(recording, reverb(rir=room.to_dict())), tmp_path)
    (tmp_path / "room.wav").unlink()
    os.mkfifo(tmp_path / "room.wav")
    with pytest.raises(AudioError, match="with an impulse response that is not a regular file"):
        read_waveform(cut)


def test_an_impulse_response_may_have_a_name_that_is_not_utf8(recording: Recording, tmp_path: Path) -> None:
    room = Recording.from_file(write(tmp_path / "room.wav", noise(0.2)))
    expected = read_waveform(opened(with_transforms(recording, reverb(rir=room.to_dict())), tmp_path))
    renamed = (tmp_path / "room.wav").rename(tmp_path / "r\udcff.wav")
    room.sources[0].source = str(renamed)
    cut = opened(with_transforms(recording, reverb(rir=room.to_dict())), tmp_path)
    np.testing.assert_array_equal(read_waveform(cut), expected)
    assert all(isinstance(one, AudioTransform) for one in cut.recording.transforms)
