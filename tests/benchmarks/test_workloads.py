"""Test the lengths of the utterances in the benchmarks' batches."""

import pytest
import torch

from benchmarks import workloads
from benchmarks.recipes import recipe_model
from fastssl.packing import Layout

CPU = torch.device("cpu")


@pytest.mark.parametrize("utterances", [4, 8, 65])
def test_read_speech_is_like_librispeech(utterances: int) -> None:
    lengths_s = workloads.read_speech(utterances)
    assert lengths_s == workloads.read_speech(utterances)
    assert len(lengths_s) == utterances
    assert all(1.5 <= s <= 17 for s in lengths_s)
    assert sum(12 <= s <= 16 for s in lengths_s) >= utterances / 2  # most
    assert min(lengths_s) < 8  # and a tail of short ones
    assert 11.5 < sum(lengths_s) / utterances < 13
    assert 1.15 < workloads.padding_factor(lengths_s) < 1.45


def test_the_other_workloads_are_what_they_say() -> None:
    assert all(1 <= s <= 5 for s in workloads.short(16))
    assert workloads.padding_factor(workloads.equal(4)) == pytest.approx(1)
    assert set(workloads.long(2)) == {60.0}
    even = workloads.even(8)
    assert (min(even), max(even)) == (1.5, 17)
    assert 1.7 < workloads.padding_factor(even) < 2
    assert all(25 <= n <= 200 for n in workloads.frames(workloads.after_compression(32)))
    assert sum(workloads.FOUR_UNEVEN) == 38
    assert sum(workloads.CROPS) == 48


def test_frames_are_those_of_the_encoder() -> None:
    lengths_s = [1.0, 1.0201, 15.6, 16.999]
    config = recipe_model("wav2vec2-base")
    layout = Layout.from_lengths(workloads.samples_of(lengths_s))
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        layout = layout.after_conv(kernel, stride)
    assert workloads.frames(lengths_s) == list(layout.lengths)


def test_padded_and_packed_are_the_same_audio() -> None:
    batch = workloads.waveforms([0.01, 0.03], CPU)
    audio, mask = workloads.padded(batch)
    assert audio.shape == mask.shape == (2, 480)
    assert mask.sum(1).tolist() == [160, 480]
    assert torch.equal(audio[mask.bool()], batch.values[:, 0])
