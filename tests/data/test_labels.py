"""Test frame labels: which label each frame of a crop gets, and the errors for labels that do not fit the audio."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet, RecordingSet, SupervisionSet
from lhotse.cut import Cut, MonoCut

from fastssl.data.batches import BatchSpec, FrameLabels, WaveformDataset, crop
from fastssl.data.corpus import open_corpus, write_manifest
from fastssl.data.labels import LABELS_FILE, SETTINGS_FILE, LabelTable, as_line, labelled_part
from fastssl.data.mfcc import differences, mfcc
from fastssl.data.recordings import FrameGrid
from fastssl.data.segments import FrameSegments
from tests.data.making import noise, write


def _write(
    folder: Path, cuts: list[Cut], *, shift_s: float = 0.01, first_s: float = 0.005, classes: int = 1000
) -> None:
    """Write labels 0, 1, 2, ... for the frames of each recording."""
    shift_s, first_s = 0.01, 0.005
    folder.mkdir(exist_ok=True)
    settings = {"clusters": classes, "frame_shift_s": shift_s, "first_centre_s": first_s}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    with (folder / LABELS_FILE).open("w") as file:
        for cut in cuts:
            labels = range(round(cut.duration / shift_s))
            file.write(as_line(cut, labels, frame_shift_s=shift_s, first_centre_s=first_s))


@pytest.fixture
def corpus(tmp_path: Path) -> list[Cut]:
    """Return two short recordings, at 16 and 8 kHz, and a longer one in two windows."""
    folder = tmp_path / "audio"
    write(folder / "a.wav", noise(2.0, rate=16000), rate=16000)
    write(folder / "b.wav", noise(1.5, rate=8000), rate=8000)
    write(folder / "c.wav", noise(5.0, rate=16000), rate=16000)
    _write(tmp_path / "labels", list(open_corpus(folder, window_s=None, min_duration_s=1).cuts))
    return list(open_corpus(folder, window_s=3.0, min_duration_s=1).cuts)


def test_a_frame_gets_the_label_around_its_centre(corpus: list[Cut], tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels")
    dataset = WaveformDataset(normalize=False, labels=FrameLabels(table, FrameGrid(320, 400)))
    assert len(corpus) == 4
    for update in range(3):
        for crop_s in (None, 0.7):
            batch = dataset[BatchSpec(update, tuple(corpus), crop_s, seed=5)]
            assert batch.labels is not None
            expected = []
            for cut, length in zip(corpus, batch.waveforms.layout.lengths, strict=True):
                start_s = crop(cut, crop_s=crop_s, seed=5, update=update).start
                centres_s = start_s + (320 * np.arange((length - 400) // 320 + 1) + 200) / 16000
                # Label j belongs to the frame centred at 5 ms + j 10 ms of the recording, for windows too.
                expected += np.rint((centres_s - 0.005) / 0.01).tolist()
            found = batch.labels.numpy()
            assert np.abs(found - np.minimum(expected, 499)).max() <= 1  # a centre between two labels may get either
            assert len(found) == len(expected)


def _write_segments(folder: Path, cuts: list[Cut], lengths: list[int], *, shift_s: float) -> None:
    """Write labels that repeat segments of these lengths from the start of each recording."""
    folder.mkdir()
    settings = {"clusters": 2, "frame_shift_s": shift_s, "first_centre_s": shift_s / 2}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    with (folder / LABELS_FILE).open("w") as file:
        for cut in cuts:
            period = np.repeat(np.arange(len(lengths)) % 2, lengths)
            labels = np.resize(period, round(cut.duration / shift_s)).tolist()
            file.write(as_line(cut, labels, frame_shift_s=shift_s, first_centre_s=shift_s / 2))


def test_a_crop_knows_how_long_its_segments_are_outside_of_it(corpus: list[Cut], tmp_path: Path) -> None:
    whole = [cut for cut in corpus if cut.id in ("a.wav", "b.wav")]
    _write_segments(tmp_path / "segments", whole, [3, 5, 1, 7], shift_s=0.02)
    labels = FrameLabels(LabelTable(tmp_path / "segments"), FrameGrid(320, 320))
    dataset = WaveformDataset(normalize=False, segments=labels)
    # For whole recordings, whose frames coincide with the labels' frames.
    expected_weights = np.repeat(1 / np.array([3, 5, 1, 7]), [3, 5, 1, 7]).astype(np.float32)
    expected_ends = np.isin(np.arange(16), [2, 7, 8, 15])
    for cut in whole:
        batch = dataset[BatchSpec(0, (cut,), None, seed=0)]
        assert batch.segments is not None
        frames = len(batch.segments.weights)
        last = (frames - 1) // 16 * 16  # leave out the segments that the recording's end cuts short
        assert np.array_equal(batch.segments.weights[:last], np.resize(expected_weights, last))
        assert np.array_equal(batch.segments.ends[: frames - 1], np.resize(expected_ends, frames - 1))
        assert batch.segments.ends[-1]
        for update in range(5):
            cropped = dataset[BatchSpec(update, (cut,), 0.5, seed=0)].segments
            assert cropped is not None
            first = round(crop(cut, crop_s=0.5, seed=0, update=update).start / 0.02)
            # The crop may start between two frames.
            near = [slice(at, at + 25) for at in (first - 1, first, first + 1) if at >= 0]
            assert any(
                torch.equal(cropped.weights, batch.segments.weights[at])
                and torch.equal(cropped.ends, batch.segments.ends[at])
                for at in near
            )


def test_segments_add_up_to_one_at_other_frame_rates(corpus: list[Cut], tmp_path: Path) -> None:
    whole = [cut for cut in corpus if cut.id in ("a.wav", "b.wav")]
    _write_segments(tmp_path / "segments", whole, [8, 12, 14, 6], shift_s=0.01)
    dataset = WaveformDataset(
        normalize=False, segments=FrameLabels(LabelTable(tmp_path / "segments"), FrameGrid(320, 320))
    )
    batch = dataset[BatchSpec(0, (whole[0],), None, seed=0)]
    assert batch.segments is not None
    weights, ends = batch.segments
    assert np.array_equal(np.flatnonzero(ends)[:6], [3, 9, 16, 19, 23, 29])
    torch.testing.assert_close(weights.cumsum(0)[ends][:6], torch.arange(1.0, 7.0))
    moved = batch.to("cpu")
    assert isinstance(moved.segments, FrameSegments)
    assert torch.equal(moved.segments.ends, ends)
    empty = dataset[BatchSpec(0, (), None, seed=0)].segments
    assert empty is not None
    assert len(empty.weights) == len(empty.ends) == 0


@pytest.mark.parametrize("shift_s", [0.01, 0.02, 0.04])
def test_the_last_segment_of_a_recording_ends_once(corpus: list[Cut], tmp_path: Path, shift_s: float) -> None:
    whole = [cut for cut in corpus if cut.id in ("a.wav", "b.wav")]
    _write_segments(tmp_path / "segments", whole, [5, 5], shift_s=shift_s)
    dataset = WaveformDataset(
        normalize=False, segments=FrameLabels(LabelTable(tmp_path / "segments"), FrameGrid(320, 320))
    )
    for cut in whole:
        batch = dataset[BatchSpec(0, (cut,), None, seed=0)]
        assert batch.segments is not None
        segments = round(cut.duration / shift_s / 5)  # the recording's end may cut off the last one
        assert abs(int(batch.segments.ends.sum()) - segments) <= 1
        assert not (batch.segments.ends[1:] & batch.segments.ends[:-1]).any()


def test_windows_of_manifests_and_shards_have_labels(corpus: list[Cut], tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels")
    prepared = tmp_path / "prepared.jsonl.gz"
    write_manifest(open_corpus(tmp_path / "audio", window_s=3.0, min_duration_s=1), prepared)
    # Windows shorter than the manifest's still find the labels of the whole recording.
    windows = [cut for cut in open_corpus(prepared, window_s=1.3, min_duration_s=1).cuts if cut.start > 2.5]
    assert [labelled_part(cut)[0] for cut in windows] == ["c.wav"]
    assert table.problem(windows[0]) is None
    found = table.at(windows[0], start_s=windows[0].start, frames=2, grid=FrameGrid(320, 400))
    assert np.abs(found - [windows[0].start * 100 + 0.75, windows[0].start * 100 + 2.75]).max() <= 1
    # A window exported to a shard is a recording of its own, with its own labels.
    shards = tmp_path / "shards"
    shards.mkdir()
    open_corpus(prepared, min_duration_s=1).cuts.to_shar(shards, fields={"recording": "wav"}, shard_size=10)
    whole = list(open_corpus(shards, window_s=None, min_duration_s=1).cuts)
    _write(tmp_path / "of_shards", whole)
    table = LabelTable(tmp_path / "of_shards")
    assert len(table) == 4
    assert [table.problem(cut) for cut in open_corpus(shards, window_s=1.3, min_duration_s=1).cuts] == [None] * 8


def test_lhotse_reads_the_table(corpus: list[Cut], tmp_path: Path) -> None:
    supervisions = {item.id: item for item in SupervisionSet.from_file(tmp_path / "labels" / LABELS_FILE)}
    assert supervisions["b.wav"].labels == list(range(150))
    assert supervisions["b.wav"].duration == 1.5
    # A cut of one channel that starts within the recording.
    write(tmp_path / "stereo.wav", noise(3.0, channels=2))
    (recording,) = [cut.recording for cut in open_corpus(tmp_path / "stereo.wav").cuts]
    _write(tmp_path / "labels", [MonoCut("u", start=1.0, duration=1.2, channel=1, recording=recording)])
    supervisions = SupervisionSet.from_file(tmp_path / "labels" / LABELS_FILE)
    joined = CutSet.from_manifests(recordings=RecordingSet.from_recordings([recording]), supervisions=supervisions)
    (cut,) = joined.trim_to_supervisions()
    assert (cut.start, cut.duration, cut.channel) == (1.0, 1.2, 1)
    assert len(cut.supervisions[0].labels) == 120


def test_what_does_not_fit_is_named(corpus: list[Cut], tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels")
    assert [table.problem(cut) for cut in corpus] == [None] * 4
    first = corpus[0]

    def said_of(cut: Cut) -> str:
        problem = table.problem(cut)
        assert problem is not None
        assert problem.name.endswith("a.wav")
        return problem.reason

    assert "has no labels" in said_of(dataclasses.replace(first, id="new.wav"))
    assert "has labels for 2.00 s, but is 1.50 s long" in said_of(dataclasses.replace(first, duration=1.5))
    slower = dataclasses.replace(first.recording, sampling_rate=8000)
    assert "labelled at 16000 Hz, but is at 8000 Hz now" in said_of(dataclasses.replace(first, recording=slower))
    _change(tmp_path, "a.wav", lambda line: line["custom"]["labels"].__delitem__(slice(150, None)))
    table = LabelTable(tmp_path / "labels")
    assert "has 150 labels, but 2.00 s with a label every 10 ms require 200" in said_of(first)
    # A recording as short as the tolerance.
    _change(tmp_path, "a.wav", lambda line: line.update(duration=0.1) or line["custom"]["labels"].clear())
    table = LabelTable(tmp_path / "labels")
    assert "has 0 labels, but 0.10 s" in said_of(dataclasses.replace(first, duration=0.1))


def test_damaged_tables_are_refused(corpus: list[Cut], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no labels there"):
        LabelTable(tmp_path)
    _change(tmp_path, "a.wav", lambda line: line["custom"]["labels"].append(1000))
    with pytest.raises(ValueError, match=r"a\.wav has labels from 0 to 1000, expected 1000 classes"):
        LabelTable(tmp_path / "labels")
    path = tmp_path / "labels" / LABELS_FILE
    text = path.read_text()
    for damaged in (
        text.replace('"custom"', '"other"', 1),
        text.replace('"labels": [0', '"labels": ["a"', 1),
        text.replace('"labels": [0', '"labels": [0.5', 1),
        text.replace('"duration": 2.0', '"duration": null', 1),
        text.replace('"duration": 2.0', '"duration": 1e400', 1),
        text.replace('"duration": 2.0', f'"duration": {"9" * 4000}', 1),
        text.replace('"duration": 2.0', f'"duration": {"9" * 5000}', 1),
        text.replace('"duration": 2.0', '"duration": true', 1),
        text.replace('"sampling_rate": ', '"sampling_rate": 0.5, "was": ', 1),
        "[" * 100_000 + "\n",
        "\x00\n",
        "[]\n",
        "{\n",
    ):
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(ValueError, match="line 1 is not a supervision with labels"):
            LabelTable(tmp_path / "labels")
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="line 1 is not a supervision with labels"):
        LabelTable(tmp_path / "labels")
    path.write_text(text)
    numbers = '"frame_shift_s": 1, "first_centre_s": 1}'
    for damaged in (
        *("", "{", "[]", "[" * 100_000, '{"clusters": 5}'),
        *(f'{{"clusters": {value}, {numbers}' for value in ("null", "true", "0", "2.5", "1e400")),
        '{"clusters": 5, "frame_shift_s": NaN, "first_centre_s": 1}',
    ):
        (tmp_path / "labels" / SETTINGS_FILE).write_text(damaged)
        with pytest.raises(ValueError, match=r"settings\.json: is damaged"):
            LabelTable(tmp_path / "labels")


def test_more_classes_than_two_bytes_hold(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(0.5, rate=16000), rate=16000)
    cuts = list(open_corpus(tmp_path / "audio", min_duration_s=0.1).cuts)
    for classes, largest in ((40_000, 39_999), (100, 40_000)):
        _write(tmp_path / "labels", cuts, classes=classes)
        path = tmp_path / "labels" / LABELS_FILE
        path.write_text(path.read_text().replace("49]", f"{largest}]"))
        if largest < classes:
            found = LabelTable(tmp_path / "labels").at(cuts[0], start_s=0, frames=50, grid=FrameGrid(160, 160))
            assert found.tolist() == [*range(49), largest]
        else:
            with pytest.raises(ValueError, match="has labels from 0 to 40000, expected 100 classes"):
                LabelTable(tmp_path / "labels")


def test_labels_beyond_the_recording_are_named(corpus: list[Cut], tmp_path: Path) -> None:
    """Otherwise every frame would get the first label."""
    settings = json.loads((tmp_path / "labels" / SETTINGS_FILE).read_text())
    assert LabelTable(tmp_path / "labels").problem(corpus[0]) is None
    (tmp_path / "labels" / SETTINGS_FILE).write_text(json.dumps(settings | {"first_centre_s": 1e14}))
    assert "has labels up to 100000000000001" in str(LabelTable(tmp_path / "labels").problem(corpus[0]))


def test_a_huge_label_is_shown_on_one_short_line(corpus: list[Cut], tmp_path: Path) -> None:
    file = tmp_path / "labels" / LABELS_FILE
    file.write_text(file.read_text().replace("[0,", f"[{10**4000},", 1))
    with pytest.raises(ValueError, match=r"has labels from 1 to 10+\.\.\.0+, expected 1000 classes") as caught:
        LabelTable(tmp_path / "labels")
    assert len(str(caught.value)) < 1000


def test_classes_that_four_bytes_do_not_hold_are_refused(corpus: list[Cut], tmp_path: Path) -> None:
    _write(tmp_path / "labels", corpus[:1], classes=2**31)
    with pytest.raises(ValueError, match=r"settings\.json: is damaged; .* at most 2,147,483,647 clusters"):
        LabelTable(tmp_path / "labels")


def test_a_recording_labelled_twice_does_not_lengthen_its_neighbours_segments(
    corpus: list[Cut], tmp_path: Path
) -> None:
    """The last line of a recording counts; the first one still ends where the next recording begins."""
    a, b = corpus[:2]
    for folder, lines in (("once", [a, b]), ("twice", [a, b, a])):
        _write_segments(tmp_path / folder, [a, b], [30], shift_s=0.01)
        file = tmp_path / folder / LABELS_FILE
        first, second = file.read_text().splitlines()
        file.write_text("".join(f"{first if cut is a else second}\n" for cut in lines))
    once, twice = (
        LabelTable(tmp_path / folder).segments_at(b, start_s=0.0, frames=70, grid=FrameGrid(320, 400))
        for folder in ("once", "twice")
    )
    assert np.array_equal(once.weights, twice.weights)
    assert np.array_equal(once.ends, twice.ends)


def test_torn_last_line_is_ignored(corpus: list[Cut], tmp_path: Path) -> None:
    path = tmp_path / "labels" / LABELS_FILE
    path.write_text(path.read_text()[:-20])
    assert len(LabelTable(tmp_path / "labels")) == 2


def test_mfcc_and_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.arange(20, dtype=np.float32)[:, None] * [[1.0, -2.0]]
    slopes = differences(torch.from_numpy(ramp.astype(np.float32)))
    np.testing.assert_allclose(slopes[2:-2].numpy(), np.broadcast_to([1.0, -2.0], (16, 2)), rtol=1e-6)
    np.testing.assert_allclose(slopes[0].numpy(), [0.5, -1.0], rtol=1e-6)  # (1 * 1 + 2 * 2) / 10
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    frames = mfcc(noise)
    assert frames.shape == (100, 39)
    torch.testing.assert_close(frames[:, 13:26], differences(frames[:, :13]))
    # Long recordings are processed in blocks, which must not change any frame.
    monkeypatch.setattr("fastssl.data.mfcc._BLOCK_FRAMES", 7)
    for length in (15999, 15925, 11200, 11280, 400):
        blocks = mfcc(noise[:length])
        with monkeypatch.context() as whole:
            whole.setattr("fastssl.data.mfcc._BLOCK_FRAMES", 1000)
            torch.testing.assert_close(blocks, mfcc(noise[:length]), rtol=1e-4, atol=1e-4)
    # A louder recording changes only the first coefficient.
    torch.testing.assert_close(mfcc(4 * noise)[:, 1:13], frames[:, 1:13], rtol=1e-3, atol=1e-2)
    assert (mfcc(4 * noise)[:, 0] > frames[:, 0]).all()


def _change(folder: Path, key: str, change: Any) -> None:
    path = folder / "labels" / LABELS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["id"] == key:
            change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_labels_of_channels_that_cancel_are_refused(tmp_path: Path) -> None:
    samples = noise(4.0)
    write(tmp_path / "audio" / "a.wav", np.hstack([samples, -samples]), subtype="FLOAT")
    (cut,) = open_corpus(tmp_path / "audio").cuts
    _write(tmp_path / "labels", [cut])
    path = tmp_path / "labels" / "settings.json"
    assert "rules" not in json.loads(path.read_text())
    problem = LabelTable(tmp_path / "labels").problem(cut)
    assert problem is not None
    assert "was labelled from the mean of its channels, which cancel" in problem.reason
    (old,) = open_corpus(tmp_path / "audio", rules=1).cuts
    assert LabelTable(tmp_path / "labels").problem(old) is None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rules": 2}))
    assert LabelTable(tmp_path / "labels").problem(cut) is None
