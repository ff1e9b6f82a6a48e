"""How good an encoder's frames are, layer by layer, from audio without labels (arXiv:2501.05966)."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastssl.data.audio import SAMPLE_RATE_HZ
from fastssl.data.batches import AudioBatch, WaveformDataset, fixed_batches
from fastssl.metrics import GramMatrix, effective_rank, fit_kmeans, num_clusters, score_clusters
from fastssl.packing import Layout, Packed

#: Frames for the clusters: as many as 1024 of them take.
MAX_FRAMES = 102_400
#: Audio that goes through the encoder at a time; features do not depend on it.
_BATCH_S = 60.0
#: RankMe's rows where there are too few utterances.
_SEGMENT_S = 2.0


@dataclass(frozen=True)
class LayerQuality:
    """What one layer's frames say.

    Args:
        layer: 0 is the input of the first layer, L the output of the last.
        frames: Of all audio.
        utterances: That have a frame.
        effective_rank: Of all frames, not centred.
        rankme: Effective rank of the sums over the frames of each utterance, or segment.
        rankme_rows: How many of these there are; `rankme` cannot be more.
        rankme_of: Segments of about 2 s where the utterances are fewer than the width.
        clustered_frames: Frames that k-means saw and the rest is about.
        clusters: k.
        used_clusters: Those with a member.
        inertia: Sum of squared distances to the nearest centre.
        inertia_per_frame: Their mean.
        log_inertia_per_frame: Its logarithm; minus infinity where all frames lie on centres.
        davies_bouldin: NaN where fewer than two clusters have members.
    """

    layer: int
    frames: int
    utterances: int
    effective_rank: float
    rankme: float
    rankme_rows: int
    rankme_of: Literal["utterances", "segments"]
    clustered_frames: int
    clusters: int
    used_clusters: int
    inertia: float
    inertia_per_frame: float
    log_inertia_per_frame: float
    davies_bouldin: float


def first_minutes(cuts: Iterable[Cut], minutes: float) -> list[Cut]:
    """The first so many minutes of audio, in an order that follows from the cuts' ids alone.

    The same recordings come out however they were listed, and few change when others are added. Nothing is cropped: the
    last one may exceed the time.

    Raises:
        ValueError: `minutes` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes: must be positive, got {minutes}")
    ordered = sorted(cuts, key=lambda cut: (hashlib.blake2b(cut.id.encode(), digest_size=8).digest(), cut.id))
    taken: list[Cut] = []
    duration_s = 0.0
    for cut in ordered:
        if duration_s >= 60 * minutes - 1e-6:
            break
        taken.append(cut)
        duration_s += cut.duration
    return taken


def quality_loader(
    cuts: Iterable[Cut], *, normalize: bool, channel: int | None = None, num_workers: int = 0
) -> DataLoader[AudioBatch]:
    """Whole cuts in fixed batches, the same every time it is iterated.

    Args:
        cuts: Such as `first_minutes` gives.
        normalize: Zero mean and unit variance for each, as the encoder's config says.
        channel: Of several channels take this one (default: their mean).
        num_workers: Processes that decode; 0 decodes in this one.
    """
    return DataLoader(
        WaveformDataset(normalize=normalize, channel=channel),
        sampler=fixed_batches(cuts, max_duration_s=_BATCH_S, crop_s=None, seed=0),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # else it takes a number from the global one
    )


def measure_quality(
    encoder: nn.Module,
    waveforms: Iterable[Packed],
    *,
    layers: Sequence[int] | None = None,
    max_frames: int = MAX_FRAMES,
    seed: int = 0,
) -> list[LayerQuality]:
    """Rank and clusters of the frames of every layer, in one pass over the audio.

    The same audio, weights, `max_frames` and seed give the same numbers. In memory is what one batch takes, three
    matrices (D, D) fp64 per layer, and one layer's frames for k-means; the other layers' lie in a temporary folder,
    `max_frames` x D x 4 bytes each (0.3 GB at width 768). Frames for k-means are drawn evenly from all, the same of
    every layer.

    Args:
        encoder: Takes packed waveforms and returns an `EncoderOutput`; its config has `num_hidden_layers`,
            `hidden_size` and `samples_per_frame`. It is measured in evaluation mode, and left as it was.
        waveforms: Batches; they are moved to the encoder's device.
        layers: Which; None measures all, 0 to L.
        max_frames: Frames for k-means at most.
        seed: Of the frames drawn, and of k-means.

    Raises:
        ValueError: There is no such layer, too little audio for clusters, or a layer's frames are NaN, infinite, or all
            zero.
    """
    config: Any = encoder.config
    depth = config.num_hidden_layers
    layers = range(depth + 1) if layers is None else sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] > depth:
        raise ValueError(f"layers: the model has 0 to {depth}, got {list(layers)}")
    if max_frames < 1:
        raise ValueError(f"max_frames: must be at least 1, got {max_frames}")
    device = next(encoder.parameters()).device
    segment = _SEGMENT_S * SAMPLE_RATE_HZ / config.samples_per_frame

    def new_ranks(left: float = 1.0) -> dict[int, _Ranks]:
        size = max(1, round(left * segment))
        return {layer: _Ranks(config.hidden_size, size, device) for layer in layers}

    ranks = new_ranks()
    with tempfile.TemporaryDirectory(prefix="fastssl-quality-") as folder:
        drawn = {layer: _FrameFile(Path(folder) / f"{layer}.f32", config.hidden_size, max_frames) for layer in layers}
        draw = _Draw(max_frames, seed)
        with _evaluating(encoder), torch.no_grad():
            for batch in waveforms:
                _, hidden_states, compressed = encoder(batch.to(device))
                if compressed is not None and not ranks[layers[0]].frames.rows:
                    # Frames of a compressor have no fixed length; those of the first batch are taken for all.
                    ranks = new_ranks(compressed.frames.layout.total / max(1, compressed.layout.total))
                chosen = draw.places(hidden_states[0].layout.total)
                for layer in layers:
                    ranks[layer].update(hidden_states[layer])
                    drawn[layer].write(hidden_states[layer].values, *chosen)
        results = []
        for layer in layers:
            try:
                results.append(_assess(layer, ranks[layer], drawn[layer].read(), seed=seed, device=device))
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from error
        return results


def _assess(
    layer: int, ranks: "_Ranks", frames: NDArray[np.float32], *, seed: int, device: torch.device
) -> LayerQuality:
    """The numbers of one layer; `frames` is overwritten."""
    few = ranks.utterances.rows < frames.shape[1]
    rows = ranks.segments if few else ranks.utterances
    rank, rankme = effective_rank(ranks.frames.singular_values()), effective_rank(rows.singular_values())
    clusters = num_clusters(len(frames))
    # Clusters are the same wherever the origin is, and distances of numbers near it lose fewer digits.
    frames -= frames.mean(0, dtype=np.float64).astype(np.float32)
    centres = fit_kmeans(frames, clusters, seed=seed)
    scores = score_clusters([torch.from_numpy(frames)], centres.to(device))
    return LayerQuality(
        layer=layer,
        frames=ranks.frames.rows,
        utterances=ranks.utterances.rows,
        effective_rank=rank,
        rankme=rankme,
        rankme_rows=rows.rows,
        rankme_of="segments" if few else "utterances",
        clustered_frames=scores.frames,
        clusters=clusters,
        used_clusters=scores.clusters,
        inertia=scores.inertia,
        inertia_per_frame=scores.inertia_per_frame,
        log_inertia_per_frame=scores.log_inertia_per_frame,
        davies_bouldin=scores.davies_bouldin,
    )


class _Ranks:
    """Of one layer: all frames, and their sums over utterances and over segments of these.

    Sums, not means, are the published rows; it is the same where all are of one length.
    """

    def __init__(self, width: int, segment: int, device: torch.device) -> None:
        self.segment = segment
        self.frames = GramMatrix(width, device=device)
        self.utterances = GramMatrix(width, device=device)
        self.segments = GramMatrix(width, device=device)

    def update(self, hidden: Packed) -> None:
        frames = hidden.values.double()
        self.frames.update(frames)
        lengths = [length for length in hidden.layout.lengths if length]
        pieces = []
        for length in lengths:
            # Equal pieces, of which none is a short rest.
            size, longer = divmod(length, count := max(1, round(length / self.segment)))
            pieces += [size + 1] * longer + [size] * (count - longer)
        for matrix, rows in ((self.utterances, lengths), (self.segments, pieces)):
            if rows:
                matrix.update(Layout.from_lengths(rows, device=frames.device).sums(frames))


class _Draw:
    """Which frames to keep of a stream, so that a fixed number is drawn evenly from all of it (reservoir sampling)."""

    def __init__(self, max_frames: int, seed: int) -> None:
        self.max_frames = max_frames
        self._random = np.random.default_rng(seed)
        self._seen = 0

    def places(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the next so many frames, those to keep, and the places they take, perhaps from earlier ones."""
        places = np.arange(self._seen, self._seen + number)
        late = places >= self.max_frames
        places[late] = self._random.integers(0, places[late] + 1)
        self._seen += number
        kept = np.flatnonzero(places < self.max_frames)
        return kept, places[kept]


class _FrameFile:
    """Drawn frames of one layer, (n, D) float32 in a file."""

    def __init__(self, path: Path, width: int, max_frames: int) -> None:
        self.path = path
        self.width = width
        self.max_frames = max_frames
        self._rows = 0
        path.touch()

    def write(self, values: Tensor, kept: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Write frames `kept` of a batch to their places, a later one over an earlier one."""
        frames = values[torch.from_numpy(kept).to(values.device)].float().cpu().numpy()
        new = min(len(values), self.max_frames - self._rows)  # these come first, one behind the other
        if new:
            with self.path.open("ab") as file:
                file.write(frames[:new].tobytes())
            self._rows += new
        if len(frames) > new:
            np.memmap(self.path, np.float32, "r+", shape=(self._rows, self.width))[places[new:]] = frames[new:]

    def read(self) -> NDArray[np.float32]:
        frames = np.fromfile(self.path, dtype=np.float32)
        return frames.reshape(-1, self.width)


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again."""
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
