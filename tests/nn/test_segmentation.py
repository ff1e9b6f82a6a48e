"""Test the losses that guide a compressor's boundaries: they equal loops over frames, and right weights give zero."""

import pytest
import torch
from torch import Tensor

from fastssl.nn.compression import SequenceCompressor
from fastssl.nn.segmentation import quantity_loss, segmentation_losses
from fastssl.packing import Layout, Packed
from tests.scans import Scans


def of_segments(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return target weights and ends of segments with these lengths."""
    weights = torch.cat([torch.full((length,), 1 / length) for length in lengths])
    ends = torch.zeros(len(weights), dtype=torch.bool)
    ends[torch.tensor(lengths).cumsum(0) - 1] = True
    return weights, ends


def test_equal_the_formulas_of_the_authors_in_a_loop() -> None:
    torch.manual_seed(0)
    segments = [[3, 5, 1, 7], [4, 4], [9]]
    frames = [sum(lengths) for lengths in segments]
    layout = Layout.from_lengths([*frames, 0])
    learned = torch.rand(layout.total)
    weights, ends = (torch.cat(parts) for parts in zip(*map(of_segments, segments), strict=True))
    found = segmentation_losses(learned, layout, weights=weights, ends=ends)
    for index, (lengths, alpha, target) in enumerate(
        zip(segments, learned.split(frames), weights.split(frames), strict=True)
    ):
        apart, at = [], 0
        for number, length in enumerate(lengths, start=1):
            at += length
            apart.append(abs(alpha[:at].sum() - number))  # the paper's csum(alpha) at b_j - 1, compared with j
        torch.testing.assert_close(found.segment[index], torch.stack(apart).mean())
        torch.testing.assert_close(found.frame[index], (alpha - target).abs().mean())
    assert found.segment[3] == found.frame[3] == 0


def test_learned_and_target_weights_share_a_scan() -> None:
    learned = torch.rand(11, requires_grad=True)
    weights, ends = of_segments([2, 6, 3])
    with Scans() as seen:
        found = segmentation_losses(learned, Layout.from_lengths([11]), weights=weights, ends=ends)
    assert seen.scans == 1
    assert seen.unordered == []
    with Scans() as seen:
        found.segment.sum().backward()
    assert seen.scans == 1
    assert seen.unordered == []


def test_weights_of_the_segments_lose_nothing() -> None:
    weights, ends = of_segments([2, 6, 3])
    found = segmentation_losses(weights, Layout.from_lengths([11]), weights=weights, ends=ends)
    assert found.segment.item() < 1e-6
    assert found.frame.item() == 0
    # The loss is also zero for a crop that begins and ends within segments.
    part = slice(4, 10)
    found = segmentation_losses(weights[part], Layout.from_lengths([6]), weights=weights[part], ends=ends[part])
    assert found.segment.item() < 1e-6


def test_an_utterance_does_not_see_its_batch_mates() -> None:
    torch.manual_seed(0)
    lengths = [17, 40, 3]
    learned, weights = torch.rand(60), torch.rand(60)
    ends = torch.rand(60) < 0.3
    together = segmentation_losses(learned, Layout.from_lengths(lengths), weights=weights, ends=ends)
    kept = quantity_loss(learned, Layout.from_lengths(lengths), share=0.25)
    for index, (a, w, e) in enumerate(zip(*(x.split(lengths) for x in (learned, weights, ends)), strict=True)):
        alone = Layout.from_lengths([lengths[index]])
        found = segmentation_losses(a, alone, weights=w, ends=e)
        assert torch.equal(found.segment[0], together.segment[index])
        assert torch.equal(found.frame[0], together.frame[index])
        assert torch.equal(quantity_loss(a, alone, share=0.25)[0], kept[index])
        torch.testing.assert_close(kept[index], abs(a.mean() - 0.25))


def test_a_compressor_learns_segments_that_its_frames_show() -> None:
    """Frames within a segment are alike, so the compressor can learn to fire at the borders."""
    torch.manual_seed(0)
    lengths = torch.randint(2, 7, (60,)).tolist()
    weights, ends = of_segments(lengths)
    values = torch.randn(60, 16).repeat_interleave(torch.tensor(lengths), 0) + 0.1 * torch.randn(len(weights), 16)
    frames = Packed(values, Layout.from_lengths([len(values)]))
    compressor = SequenceCompressor(16, kind="integrate-and-fire")
    optimizer = torch.optim.Adam(compressor.parameters(), lr=3e-3)
    history = []
    for _ in range(150):
        learned = compressor(frames).learned_weights
        assert learned is not None
        losses = segmentation_losses(learned, frames.layout, weights=weights, ends=ends)
        loss = 0.05 * losses.segment.sum() + 0.5 * losses.frame.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 4
    kept = compressor.eval()(frames).frames.layout.total
    assert abs(kept - 60) <= 4


def test_rejects_bad_input() -> None:
    layout = Layout.from_lengths([4])
    good = torch.rand(4)
    for name in ("learned", "weights", "ends"):
        values = {"learned": good, "weights": good, "ends": good > 0} | {name: torch.rand(3)}
        with pytest.raises(ValueError, match=f"{name}: expected"):
            segmentation_losses(values["learned"], layout, weights=values["weights"], ends=values["ends"])


def test_an_empty_batch() -> None:
    layout = Layout.from_lengths([])
    nothing = torch.empty(0)
    assert segmentation_losses(nothing, layout, weights=nothing, ends=nothing > 0).frame.shape == (0,)
    assert quantity_loss(nothing, layout, share=0.5).shape == (0,)
