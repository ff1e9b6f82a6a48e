import itertools
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import AudioSource, Recording
from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from fastssl.data.audio import read_waveform
from fastssl.data.batches import (
    AudioBatch,
    BatchSpec,
    UpdateSampler,
    WaveformDataset,
    crop,
    cropped_length,
    fixed_batches,
    utterance_id,
)
from fastssl.data.corpus import open_corpus
from tests.data.making import cuts_of, noise, write

DURATIONS = st.lists(st.floats(0.1, 40.0), min_size=1, max_size=60)
CROPS = st.sampled_from([None, 0.5, 4.0, 15.625])


def take(sampler: UpdateSampler, number: int) -> list[BatchSpec]:
    return list(itertools.islice(sampler, number))


def ids(spec: BatchSpec) -> tuple[str, ...]:
    return tuple(cut.id for cut in spec.cuts)


def epoch(sampler: UpdateSampler, number: int = 0) -> list[tuple[str, ...]]:
    """Return the ids in each micro-batch of an epoch, which draws as many utterances as the corpus has."""
    draws = len(sampler._lengths)
    batches = []
    for spec in sampler:
        batches.append(ids(spec))
        if sum(map(len, batches)) == draws:
            if number == 0:
                return batches
            batches, number = [], number - 1
    raise AssertionError("the sampler ended")


@settings(max_examples=50, deadline=None)
@given(DURATIONS, CROPS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**40))
def test_ranks_and_accumulation_share_out_one_plan(
    durations: list[float], crop_s: float | None, world_size: int, accumulation: int, seed: int
) -> None:
    cuts = cuts_of(durations)
    per_update = world_size * accumulation

    def sampler(**share: Any) -> UpdateSampler:
        return UpdateSampler(cuts, max_duration_s=20.0, crop_s=crop_s, seed=seed, **share)

    updates = 5
    alone = take(sampler(), updates * per_update)
    by_rank = [
        take(sampler(rank=rank, world_size=world_size, accumulation=accumulation), updates * accumulation)
        for rank in range(world_size)
    ]
    together = [by_rank[number % world_size][number // world_size] for number in range(updates * per_update)]
    assert [ids(spec) for spec in together] == [ids(spec) for spec in alone]
    assert [spec.update for spec in together] == [number // per_update for number in range(updates * per_update)]


@settings(max_examples=50, deadline=None)
@given(DURATIONS, CROPS, st.integers(0, 40), st.integers(1, 3), st.data())
def test_skipping_is_iterating(
    durations: list[float], crop_s: float | None, consumed: int, world_size: int, data: st.DataObject
) -> None:
    cuts = cuts_of(durations)
    rank = data.draw(st.integers(0, world_size - 1))
    share: dict[str, Any] = {"rank": rank, "world_size": world_size, "accumulation": 2}
    through = take(UpdateSampler(cuts, max_duration_s=30.0, crop_s=crop_s, seed=3, **share), consumed + 5)
    resumed = UpdateSampler(cuts, max_duration_s=30.0, crop_s=crop_s, seed=3, consumed=consumed, **share)
    assert take(resumed, 5) == through[consumed:]


def test_skipping_plans_each_epoch_once_and_makes_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = cuts_of(np.random.default_rng(0).uniform(1.0, 20.0, 5000).tolist())
    sampler = UpdateSampler(cuts, max_duration_s=90.0, crop_s=None, seed=0, consumed=100_000)
    plans: dict[int, int] = {}
    drawn: list[int] = []
    plan, draw = sampler._plan, sampler._drawn

    def count_plan(epoch: int) -> list[NDArray[np.int64]]:
        assert epoch not in plans
        batches = plan(epoch)
        plans[epoch] = len(batches)
        return batches

    def count_draw(number: int) -> Cut:
        drawn.append(number)
        return draw(number)

    monkeypatch.setattr(sampler, "_plan", count_plan)
    monkeypatch.setattr(sampler, "_drawn", count_draw)
    [spec] = itertools.islice(sampler, 1)
    assert sum(plans.values()) - plans[len(plans) - 1] <= 100_000 < sum(plans.values())
    assert len(drawn) == len(spec.cuts)


@settings(max_examples=50, deadline=None)
@given(DURATIONS, CROPS, st.floats(1.0, 60.0), st.integers(1, 50))
def test_an_epoch_draws_every_utterance_once(
    durations: list[float], crop_s: float | None, max_duration_s: float, num_buckets: int
) -> None:
    cuts = cuts_of(durations)
    sampler = UpdateSampler(cuts, max_duration_s=max_duration_s, crop_s=crop_s, seed=1, num_buckets=num_buckets)
    for number in range(2):
        drawn = Counter(itertools.chain.from_iterable(epoch(sampler, number)))
        assert drawn == Counter(cut.id for cut in cuts)


@settings(max_examples=50, deadline=None)
@given(DURATIONS, CROPS, st.floats(1.0, 60.0))
def test_no_batch_is_longer_than_allowed(durations: list[float], crop_s: float | None, max_duration_s: float) -> None:
    cuts = cuts_of(durations)
    sampler = UpdateSampler(cuts, max_duration_s=max_duration_s, crop_s=crop_s, seed=1)
    for spec in take(sampler, 100) + fixed_batches(cuts, max_duration_s=max_duration_s, crop_s=crop_s, seed=1):
        lengths = [cropped_length(cut, crop_s) for cut in spec.cuts]
        assert spec.duration_s == pytest.approx(sum(lengths) / 16000)
        assert len(lengths) == 1 or sum(lengths) <= round(max_duration_s * 16000)


def test_a_batch_has_no_more_utterances_than_allowed() -> None:
    cuts = cuts_of([1.0 + index / 7 for index in range(42)])
    sampler = UpdateSampler(cuts, max_duration_s=1000.0, crop_s=2.0, seed=0, max_utterances=4)
    batches = epoch(sampler)
    assert sorted(map(len, batches)) == [2] + [4] * 10
    # Without that limit, `max_duration_s` alone decides.
    assert {len(spec.cuts) for spec in take(UpdateSampler(cuts, max_duration_s=4.0, crop_s=2.0, seed=0), 20)} <= {2, 3}


def test_batches_are_filled() -> None:
    """Twelve crops of 4 s fill a batch of 48 s exactly."""
    sampler = UpdateSampler(cuts_of([10.0] * 120), max_duration_s=48.0, crop_s=4.0, seed=0)
    assert [len(spec.cuts) for spec in take(sampler, 20)] == [12] * 20


def test_windows_are_drawn_by_duration() -> None:
    cuts = cuts_of([60.0, 33.0, 3.0], windows=True) + cuts_of([60.0] * 4)[3:]
    sampler = UpdateSampler(cuts, max_duration_s=30.0, crop_s=10.0, seed=0)
    drawn = Counter(itertools.chain.from_iterable(epoch(sampler)))
    assert set(drawn.values()) == {1}
    assert Counter(name.split("#")[0] for name in drawn) == {"u0": 6, "u1": 3, "u2": 1, "u3": 1}
    whole = UpdateSampler(cuts, max_duration_s=30.0, crop_s=None, seed=0)
    assert Counter(itertools.chain.from_iterable(epoch(whole))) == {"u0": 1, "u1": 1, "u2": 1, "u3": 1}


def test_draws_of_one_window_are_cropped_apart() -> None:
    sampler = UpdateSampler(cuts_of([60.0], windows=True), max_duration_s=60.0, crop_s=10.0, seed=0)
    spec = take(sampler, 1)[0]
    assert len({crop(cut, crop_s=10.0, seed=0, update=0).start for cut in spec.cuts}) == 6


def test_epochs_and_seeds_differ() -> None:
    cuts = cuts_of(np.random.default_rng(0).uniform(1.0, 20.0, 200).tolist())
    sampler = UpdateSampler(cuts, max_duration_s=60.0, crop_s=None, seed=0)
    other = UpdateSampler(cuts, max_duration_s=60.0, crop_s=None, seed=1)
    first, second = epoch(sampler), epoch(sampler, 1)
    assert epoch(sampler) == first
    mates = [{frozenset(batch) for batch in batches} for batches in (first, second, epoch(other), epoch(other, 1))]
    for one, two in itertools.combinations(mates, 2):
        assert len(one & two) < 0.1 * len(one)


def test_equal_lengths_are_mixed_anew_every_epoch() -> None:
    """Crops give most utterances the same length; batches must still not follow their order in the corpus."""
    sampler = UpdateSampler(cuts_of([10.0] * 240), max_duration_s=48.0, crop_s=4.0, seed=0)
    first, second = ({frozenset(batch) for batch in epoch(sampler, number)} for number in (0, 1))
    assert not first & second
    places = [[int(name[1:]) for name in batch] for batch in first]
    assert np.mean([np.ptp(batch) for batch in places]) > 0.7 * 240


def test_lengths_in_a_batch_are_similar() -> None:
    durations = np.random.default_rng(0).uniform(1.0, 20.0, 2000).tolist()
    sampler = UpdateSampler(cuts_of(durations), max_duration_s=80.0, crop_s=None, seed=0, num_buckets=30)
    plan = sampler._plan(0)
    spread = np.mean([np.ptp(sampler._lengths[batch]) for batch in plan]) / 16000
    assert spread < 1.0
    means = [sampler._lengths[batch].mean() for batch in plan]
    # Long and short batches come in random order: length does not grow or shrink over the epoch.
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_a_tiny_corpus_goes_on_for_ever() -> None:
    sampler = UpdateSampler(cuts_of([3.0, 5.0]), max_duration_s=87.5, crop_s=4.0, seed=0, world_size=3, rank=2)
    specs = take(sampler, 50)
    assert [spec.update for spec in specs] == list(range(50))
    assert all(sorted(ids(spec)) == ["u0", "u1"] for spec in specs)


def test_fixed_batches_hold_every_cut_once_and_never_change() -> None:
    cuts = cuts_of(np.random.default_rng(0).uniform(1.0, 20.0, 100).tolist(), windows=True)
    specs = fixed_batches(cuts, max_duration_s=60.0, crop_s=4.0, seed=5)
    assert Counter(itertools.chain.from_iterable(map(ids, specs))) == Counter(cut.id for cut in cuts)
    assert {spec.update for spec in specs} == {0}
    assert fixed_batches(reversed(cuts), max_duration_s=60.0, crop_s=4.0, seed=5) == specs


@settings(max_examples=100, deadline=None)
@given(st.floats(0.5, 40.0), st.floats(0.1, 20.0), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_crop_is_a_function_of_seed_update_and_id(duration_s: float, crop_s: float, seed: int, update: int) -> None:
    cut = cuts_of([duration_s])[0]
    part = crop(cut, crop_s=crop_s, seed=seed, update=update)
    assert part == crop(fastcopy(cut), crop_s=crop_s, seed=seed, update=update)
    assert part.duration == min(crop_s, cut.duration)
    assert part.start >= 0
    assert part.end <= cut.end + 1e-6


def test_crops_differ_by_seed_update_and_id_and_reach_everywhere() -> None:
    cut = cuts_of([10.0])[0]
    starts = [crop(cut, crop_s=4.0, seed=0, update=update).start for update in range(500)]
    assert np.histogram(starts, bins=6, range=(0, 6))[0].min() > 50
    start = crop(cut, crop_s=4.0, seed=0, update=0).start
    assert crop(cut, crop_s=4.0, seed=1, update=0).start != start
    assert crop(fastcopy(cut, id="other"), crop_s=4.0, seed=0, update=0).start != start


def test_a_crop_stays_in_its_window() -> None:
    window = fastcopy(cuts_of([100.0])[0], start=50.0, duration=20.0)
    parts = [crop(window, crop_s=15.0, seed=0, update=update) for update in range(50)]
    assert min(part.start for part in parts) >= 50.0
    assert max(part.end for part in parts) <= 70.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cuts": []}, "cuts: expected at least one utterance"),
        ({"max_duration_s": 0.0}, "max_duration_s: must be positive"),
        ({"crop_s": 0.0}, "crop_s: must be positive"),
        ({"rank": 2, "world_size": 2}, "rank: must be from 0 to 1"),
        ({"max_utterances": 0}, "max_utterances: must be at least 1"),
        ({"accumulation": 0}, "accumulation"),
        ({"consumed": -1}, "consumed"),
    ],
)
def test_sampler_rejects(wrong: dict[str, object], message: str) -> None:
    arguments = {"cuts": cuts_of([3.0]), "max_duration_s": 10.0, "crop_s": 2.0, "seed": 0, **wrong}
    with pytest.raises(ValueError, match=message):
        UpdateSampler(**arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audio")
    for index in range(6):
        write(root / f"{index}.wav", noise(3.0 + index, seed=index))
    write(root / "low.wav", noise(8.0, rate=8000), rate=8000)
    write(root / "stereo.flac", noise(8.0, rate=44100, channels=2), rate=44100)
    return root


@pytest.fixture(scope="module")
def cuts(folder: Path) -> list[Cut]:
    return list(open_corpus(folder).cuts)


def test_a_batch(cuts: list[Cut], folder: Path) -> None:
    spec = BatchSpec(7, tuple(cuts), 4.0, 3)
    batch = WaveformDataset(normalize=False)[spec]
    assert batch.waveforms.values.shape == (16000 * (3 + 7 * 4), 1)
    assert batch.waveforms.values.dtype == torch.float32
    assert batch.waveforms.layout.lengths == (48000, *[64000] * 7)
    assert batch.duration_s == spec.duration_s == 31.0
    assert batch.names == tuple(str(folder / cut.id) for cut in cuts)
    assert batch.ids.tolist() == [utterance_id(cut.id) for cut in cuts]
    assert (batch.update, batch.problems) == (7, ())
    for waveform, cut in zip(batch.waveforms.unpack(), cuts, strict=True):
        expected = read_waveform(crop(cut, crop_s=4.0, seed=3, update=7))
        np.testing.assert_array_equal(waveform[:, 0].numpy(), expected)


def test_the_hash_of_an_id_never_changes() -> None:
    """Every run's random numbers depend on it: if it changed, a resumed run would draw different crops and masks."""
    assert utterance_id("speech/a.flac") == -6480256404420017588


def test_normalisation_is_that_of_transformers(cuts: list[Cut]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    spec = BatchSpec(0, tuple(cuts[:3]), 2.0, 0)
    plain, normalized = (WaveformDataset(normalize=normalize)[spec].waveforms for normalize in (False, True))
    for before, after in zip(plain.unpack(), normalized.unpack(), strict=True):
        expected = extractor(before[:, 0].numpy(), sampling_rate=16000)["input_values"][0]
        np.testing.assert_allclose(after[:, 0].numpy(), expected, atol=2e-5)


def test_a_channel_can_be_chosen(cuts: list[Cut]) -> None:
    stereo = next(cut for cut in cuts if cut.id == "stereo.flac")
    spec = BatchSpec(0, (stereo,), None, 0)
    mean, left = (WaveformDataset(normalize=False, channel=channel)[spec].waveforms.values for channel in (None, 0))
    assert left.std() > 1.3 * mean.std()


def broken(folder: Path) -> list[Cut]:
    """Return cuts whose files were damaged after their headers had been scanned."""
    paths = [write(folder / name, noise(4.0), subtype="FLOAT") for name in ("gone.wav", "nan.wav")]
    paths.append(write(folder / "cut-off.flac", noise(4.0)))
    cuts = list(open_corpus(folder, window_s=2.0).cuts)
    paths[0].unlink()
    samples = noise(4.0)
    samples[:] = np.nan
    write(paths[1], samples, subtype="FLOAT")
    paths[2].write_bytes(paths[2].read_bytes()[:5000])
    return cuts


def test_what_cannot_be_used_is_a_problem_of_the_batch(cuts: list[Cut], tmp_path: Path) -> None:
    bad = broken(tmp_path)
    batch = WaveformDataset(normalize=True)[BatchSpec(0, (*bad, cuts[0]), None, 0)]
    assert batch.names == (cut_path(cuts[0]),)
    assert batch.waveforms.layout.lengths == (48000,)
    assert [problem.name for problem in batch.problems] == [
        f"{tmp_path / name}{window}" for name in ("cut-off.flac", "gone.wav", "nan.wav") for window in ("", "@2.0s")
    ]
    assert "not finite" in batch.problems[-1].reason


def cut_path(cut: Cut) -> str:
    return str(cut.recording.sources[0].source)


def test_a_batch_of_problems_alone_is_empty(tmp_path: Path) -> None:
    bad = broken(tmp_path)
    batch = WaveformDataset(normalize=True)[BatchSpec(3, tuple(bad), 4.0, 0)]
    assert batch.waveforms.values.shape == (0, 1)
    assert batch.waveforms.layout.lengths == ()
    assert batch.ids.shape == (0,)
    assert len(batch.problems) == 6
    assert batch.duration_s == 0.0


def loaded(cuts: Sequence[Cut], number: int, *, workers: int, context: str | None = None) -> list[AudioBatch]:
    loader = DataLoader(
        WaveformDataset(normalize=True),
        sampler=UpdateSampler(cuts, max_duration_s=12.0, crop_s=3.0, seed=0),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
    )
    return list(itertools.islice(loader, number))


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_give_what_the_process_gives(cuts: list[Cut], context: str) -> None:
    assert context in multiprocessing.get_all_start_methods()
    here, there = loaded(cuts, 8, workers=0), loaded(cuts, 8, workers=2, context=context)
    for one, two in zip(here, there, strict=True):
        assert torch.equal(one.waveforms.values, two.waveforms.values)
        assert torch.equal(one.waveforms.layout.cu_seqlens, two.waveforms.layout.cu_seqlens)
        assert torch.equal(one.ids, two.ids)
        assert (one.names, one.update, one.problems) == (two.names, two.update, two.problems)


def test_problems_travel_from_workers(cuts: list[Cut], tmp_path: Path) -> None:
    bad = broken(tmp_path)
    batches = loaded([*bad, *cuts], 6, workers=1)
    assert {problem.name for batch in batches for problem in batch.problems} >= {str(tmp_path / "gone.wav")}
    assert sum(len(batch.names) for batch in batches) > 0


def test_specs_are_pickled_small(cuts: list[Cut]) -> None:
    spec = take(UpdateSampler(cuts, max_duration_s=12.0, crop_s=3.0, seed=0), 1)[0]
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len(pickle.dumps(spec)) < 1000 * len(spec.cuts)


def test_to(cuts: list[Cut]) -> None:
    batch = WaveformDataset(normalize=True)[BatchSpec(2, tuple(cuts), 2.0, 0)].to("meta")
    devices = (batch.waveforms.values.device, batch.waveforms.layout.cu_seqlens.device)
    assert {device.type for device in devices} == {"meta"}
    assert batch.ids.device.type == "cpu"
    assert batch.update == 2
    assert len(batch.names) == len(cuts)


@pytest.mark.gpu
def test_pinned_batches(cuts: list[Cut]) -> None:
    sampler = UpdateSampler(cuts, max_duration_s=12.0, crop_s=3.0, seed=0)
    loader = DataLoader(WaveformDataset(normalize=True), sampler=sampler, batch_size=None, pin_memory=True)
    batch = next(iter(loader))
    assert batch.waveforms.values.is_pinned()
    assert batch.waveforms.layout.cu_seqlens.is_pinned()
    moved = batch.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(moved.waveforms.values.cpu(), batch.waveforms.values)


def test_the_demo_corpus_end_to_end(spoken_corpus: Path) -> None:
    corpus = open_corpus(spoken_corpus, min_duration_s=1.0)
    assert corpus.problems == []
    for batch in loaded(list(corpus.cuts), 5, workers=0):
        assert batch.problems == ()
        for waveform in batch.waveforms.unpack():
            assert abs(waveform.mean()) < 1e-4
            assert abs(waveform.std() - 1) < 1e-3


def test_channels_that_a_recording_does_not_have_are_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "mono.wav", noise(3.0))
    recording = Recording.from_file(path)
    absent = MonoCut("absent", 0.0, 3.0, 1, recording=recording)
    source = AudioSource(type="file", channels=[0, 1], source=str(path))
    promised = Recording("promised", [source], 16000, recording.num_samples, recording.duration)
    cuts = (absent, MonoCut("promised", 0.0, 3.0, 1, recording=promised), recording.to_cut())
    batch = WaveformDataset(normalize=False)[BatchSpec(0, cuts, None, 0)]
    assert [problem.reason for problem in batch.problems] == [
        "has channels [0], but its manifest asks for [1]",
        "has 1 channels, but its manifest says 2",
    ]
    assert len(batch.names) == 1


def test_fixed_crops_are_those_of_the_first_update(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    for name in ("a", "b"):
        write(folder / f"{name}.wav", noise(3.0, rate=16000), rate=16000)
    cuts = list(open_corpus(folder, min_duration_s=1).cuts)
    dataset = WaveformDataset(normalize=False)
    fixed = UpdateSampler(cuts, max_duration_s=2, crop_s=1.0, seed=1, fixed_crops=True)
    drawn: dict[str, torch.Tensor] = {}
    for spec in take(fixed, 6):
        batch = dataset[spec]
        for cut, samples in zip(spec.cuts, batch.waveforms.unpack(), strict=True):
            expected, _ = soundfile.read(folder / cut.id, dtype="float32")
            start = round(crop(cut, crop_s=1.0, seed=1, update=0).start * 16000)
            assert torch.equal(samples[:, 0], torch.from_numpy(expected[start : start + 16000]))
            assert torch.equal(drawn.setdefault(cut.id, samples), samples)
    assert [cut.id for cut in fixed.drawn_cuts()] == [cut.id for cut in cuts]
    moving = UpdateSampler(cuts, max_duration_s=2, crop_s=1.0, seed=1)
    starts = {crop(cuts[0], crop_s=1.0, seed=1, update=spec.update).start for spec in take(moving, 6)}
    assert len(starts) == 6
