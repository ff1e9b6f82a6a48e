"""Random masks over a packed batch, and random negatives for each masked frame."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels import splitmix
from fastssl.nn.random import noise_seeds, uniform
from fastssl.packing import Layout

# Numbers of the random streams of an utterance's key. models/wav2vec2.py uses stream 3, models/best_rq.py stream 4.
_STREAM_COUNT, _STREAM_STARTS, _STREAM_NEGATIVES = range(3)


def sample_span_mask(
    layout: Layout,
    keys: Tensor,  # (B,)
    *,
    probability: float,
    length: int,
    min_spans: int = 0,
) -> Tensor:  # (N,)
    """Mask spans of frames as wav2vec 2.0 does (arXiv 2006.11477, section 3.1).

    An utterance of T frames gets floor(p T / L + u) spans with u uniform in (0, 1); spans may overlap. As in fairseq,
    their first frames are drawn without replacement from the first T - L frames. All masks are computed at once on the
    device of `keys`, and the host does not wait.

    Args:
        layout: Where each utterance begins.
        keys: (B,) int64 keys from `nn.random.utterance_keys` or `draw_keys`. The mask of an utterance depends only on
            its key and its length.
        probability: p, the share of frames that would be masked if spans did not overlap.
        length: L, the number of frames in a span.
        min_spans: Smallest number of spans per utterance; an utterance with fewer frames gets fewer.

    Returns:
        (N,) bool, True where a frame is masked.

    Raises:
        ValueError: `probability` is not in [0, 1] or `length` is below 1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: must be in [0, 1], got {probability}")
    if length < 1:
        raise ValueError(f"length: must be at least 1 frame, got {length}")
    frames = layout.device_lengths  # (B,)
    rounding = uniform(keys, torch.zeros_like(keys), stream=_STREAM_COUNT)
    spans = (probability / length * frames + rounding).to(torch.int64).clamp(min=min_spans)
    candidates = torch.maximum(frames - length, torch.minimum(spans + 1, frames))

    sequence, position = layout.sequence_ids, layout.positions
    score = uniform(keys[sequence], position, stream=_STREAM_STARTS)
    score = torch.where(position < candidates[sequence], score, 1.0)
    # Sort by sequence, then by score: each sequence stays in its own rows, with the lowest scores first.
    order = torch.argsort(sequence + score.to(torch.float64) * 0.5, stable=True)
    starts = torch.zeros_like(score, dtype=torch.int32)
    starts[order] = (position < torch.minimum(spans, candidates)[sequence]).to(torch.int32)

    started = torch.nn.functional.pad(starts.cumsum(0), (1, 0))  # (N + 1,) spans that start before each row
    row = torch.arange(layout.total, device=keys.device)
    return started[row + 1] > started[row + 1 - torch.clamp(position + 1, max=length)]


def sample_negatives(
    mask: Tensor,  # (N,)
    layout: Layout,
    keys: Tensor,  # (B,)
    *,
    count: int,
    rows: Tensor | None = None,  # (M,)
) -> Tensor:  # (M, count)
    """Draw K negatives for each masked frame, uniformly with replacement from the other masked frames of its utterance.

    Args:
        mask: (N,) bool, True at the M masked frames.
        layout: Where each utterance begins.
        keys: (B,) int64 keys from `nn.random.utterance_keys` or `draw_keys`. The draws of an utterance depend only on
            its key and the number of its masked frames.
        count: K, the number of negatives per masked frame.
        rows: (M,) int64 row numbers of the masked frames, if the caller has them. None computes them from `mask`, and
            then the host waits for the device.

    Returns:
        (M, K) int64 indices into the M masked frames; -1 if the frame is the only masked one of its utterance.
    """
    rows = mask.nonzero().squeeze(1) if rows is None else rows
    return choose_negatives(*negative_choices(mask, layout, keys, rows, count=count), count=count)


class NegativeChoices(NamedTuple):
    """What the negatives of each of M masked frames are drawn from, small enough to compute on the host.

    Attributes:
        first: (M,) int64, the first masked frame of the frame's utterance, as an index into the masked frames.
        own: (M,) int64, the frame's index among the masked frames of its utterance.
        others: (M,) int64, the number of other masked frames of its utterance.
        seeds: (M,) int64 seeds of the frame's draws.
    """

    first: Tensor  # (M,)
    own: Tensor  # (M,)
    others: Tensor  # (M,)
    seeds: Tensor  # (M,)


def negative_choices(
    mask: Tensor,  # (N,)
    layout: Layout,
    keys: Tensor,  # (B,)
    rows: Tensor,  # (M,)
    *,
    count: int,
) -> NegativeChoices:
    """Compute what `choose_negatives` needs; the arguments are those of `sample_negatives`."""
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))  # (N + 1,) masked frames before each row
    first = before[layout.cu_seqlens]  # (B + 1,) rows of each utterance among the masked
    sequence = layout.sequence_ids[rows]
    own = before[rows] - first[sequence]
    seeds = noise_seeds(keys[sequence], own * count, stream=_STREAM_NEGATIVES)
    return NegativeChoices(first[sequence], own, first.diff()[sequence] - 1, seeds)


def choose_negatives(first: Tensor, own: Tensor, others: Tensor, seeds: Tensor, *, count: int) -> Tensor:
    """Draw negatives (M, count) from the fields of `NegativeChoices`, on their device; see `sample_negatives`."""
    first, own, others, seeds = (each.unsqueeze(1) for each in (first, own, others, seeds))
    draw = splitmix.uniform(seeds, torch.arange(count, device=seeds.device))
    other = (draw * others).to(torch.int64)
    other = torch.minimum(other, others - 1)
    other = other + (other >= own).to(torch.int64)
    return torch.where(others > 0, other + first, -1)
