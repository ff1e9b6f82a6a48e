"""Measure the quality of an encoder's frames, layer by layer, on audio without labels (arXiv:2501.05966)."""

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
from fastssl.data.workers import end_if_unable_to_send
from fastssl.files import naming
from fastssl.metrics import GramMatrix, effective_rank, fit_kmeans, num_clusters, score_clusters
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.names import encoded
from fastssl.packing import Layout, Packed

#: Default number of frames for k-means: enough for 1024 clusters.
MAX_FRAMES = 102_400
#: Seconds of audio per batch; the features do not depend on it.
_BATCH_S = 60.0
#: Length in seconds of the segments that replace utterances as rows of RankMe if there are too few utterances.
_SEGMENT_S = 2.0


@dataclass(frozen=True)
class LayerQuality:
    """Rank and clustering measures of one layer's frames.

    Args:
        layer: Layer: 0 is the input of the first layer, L the output of the last.
        frames: Number of frames in all audio.
        utterances: Number of utterances with at least one frame.
        effective_rank: Effective rank (Roy and Vetterli, 2007) of the matrix of all frames, not centred.
        rankme: RankMe (arXiv:2210.02885): effective rank of the sums of frames over each utterance or segment.
        rankme_rows: Number of these sums; an upper limit of `rankme`.
        rankme_of: "utterances", or "segments" of about 2 s if there are fewer utterances than dimensions.
        clustered_frames: Number of frames given to k-means; the fields below are about these frames.
        clusters: Number of clusters, k.
        used_clusters: Number of clusters with at least one frame.
        inertia: Sum of squared distances of frames to their nearest centre.
        inertia_per_frame: `inertia` divided by `clustered_frames`.
        log_inertia_per_frame: Natural logarithm of `inertia_per_frame`; minus infinity if every frame equals a centre.
        davies_bouldin: Davies-Bouldin index, lower is better; NaN if fewer than two clusters have frames.
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
    """Choose cuts with at least `minutes` of audio in total, by a hash of their ids.

    The choice does not depend on the order of the cuts, and it changes little if cuts are added.
    Cuts stay whole, so the total may be longer than `minutes`.

    Args:
        cuts: Cuts to choose from.
        minutes: Audio to choose, in minutes; if there is less, all cuts are chosen.

    Raises:
        ValueError: `minutes` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes: must be positive, got {minutes}")
    ordered = sorted(cuts, key=lambda cut: (hashlib.blake2b(encoded(cut.id), digest_size=8).digest(), cut.id))
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
    """Return a loader of whole cuts in batches of about 60 s, which are the same in every pass.

    Args:
        cuts: Cuts to read, for example from `first_minutes`.
        normalize: Scale each waveform to zero mean and unit variance; pass the encoder's `normalizes`.
        channel: The channel to read, counted from 0; None averages all channels.
        num_workers: Number of processes that decode audio; 0 decodes in the calling process.
    """
    return DataLoader(
        WaveformDataset(normalize=normalize, channel=channel),
        sampler=fixed_batches(cuts, max_duration_s=_BATCH_S, crop_s=None, seed=0),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=end_if_unable_to_send,
        generator=torch.Generator(),  # without one, the loader draws a number from torch's global generator
    )


def measure_quality(
    encoder: nn.Module,
    waveforms: Iterable[Packed],
    *,
    layers: Sequence[int] | None = None,
    max_frames: int = MAX_FRAMES,
    seed: int = 0,
) -> list[LayerQuality]:
    """Measure rank and clusters of the frames of every layer, in one pass over the audio (arXiv:2501.05966).

    The same audio, weights, `max_frames` and seed give the same numbers. Frames for k-means are drawn uniformly from
    all frames, the same ones in every layer.

    Memory holds one batch, three (D, D) fp64 matrices per layer, and the k-means frames of one layer. The k-means
    frames of all layers are in a temporary folder, `max_frames` x D x 4 bytes per layer (0.3 GB at width 768).

    Args:
        encoder: Takes packed waveforms and returns an `EncoderOutput`; its config has `num_hidden_layers`,
            `hidden_size` and `samples_per_frame`. It is measured in evaluation mode; its training mode is restored.
        waveforms: Batches of waveforms, (N,) or (N, 1) at 16 kHz, as `quality_loader` reads them: normalised already
            if the encoder needs it. They are moved to the encoder's device.
        layers: Layers to measure; None measures all, 0 to L.
        max_frames: Largest number of frames for k-means.
        seed: Seed for drawing frames and for k-means.

    Returns:
        One `LayerQuality` for each layer, in rising order of layers.

    Raises:
        ValueError: A layer does not exist, `max_frames` is less than 1, there is too little audio for k-means, or a
            layer's frames are NaN, infinite or all zero.
    """
    config: Any = encoder.config
    depth = config.num_hidden_layers
    layers = range(depth + 1) if layers is None else sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] > depth:
        raise ValueError(f"layers: the model has layers 0 to {depth}, got {list(layers)}")
    if max_frames < 1:
        raise ValueError(f"max_frames: must be at least 1, got {max_frames}")
    device = next(encoder.parameters()).device
    given: dict[str, Any] = {"normalize": False} if isinstance(encoder, SpeechEncoder) else {}
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
                _, hidden_states, compressed = encoder(batch.to(device), **given)
                if compressed is not None and not ranks[layers[0]].frames.rows:
                    # Compressed frames have no fixed length: take the mean of the first batch for all batches.
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
    """Compute the measures of one layer; overwrites `frames` (n, D)."""
    few = ranks.utterances.rows < frames.shape[1]
    rows = ranks.segments if few else ranks.utterances
    rank, rankme = effective_rank(ranks.frames.singular_values()), effective_rank(rows.singular_values())
    clusters = num_clusters(len(frames))
    # Centre the frames: this does not change the clusters, and distances between small numbers lose fewer digits.
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
    """Gram matrices of one layer: of all frames, of their sums over utterances, and of their sums over segments.

    As in the published measure, rows are sums over frames, not means; both give the same rank if all utterances have
    the same length.
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
            # Divide the utterance into pieces of nearly equal length, so that no short piece remains.
            size, longer = divmod(length, count := max(1, round(length / self.segment)))
            pieces += [size + 1] * longer + [size] * (count - longer)
        for matrix, rows in ((self.utterances, lengths), (self.segments, pieces)):
            if rows:
                matrix.update(Layout.from_lengths(rows, device=frames.device).sums(frames))


class _Draw:
    """Reservoir sampling: draw a fixed number of frames uniformly from a stream of unknown length."""

    def __init__(self, max_frames: int, seed: int) -> None:
        self.max_frames = max_frames
        self._random = np.random.default_rng(seed)
        self._seen = 0

    def places(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw from the next `number` frames.

        Returns:
            Indices of the frames to keep, within these `number` frames, and the place of each in the sample; a place
            may already hold an earlier frame, which is replaced.
        """
        places = np.arange(self._seen, self._seen + number)
        late = places >= self.max_frames
        places[late] = self._random.integers(0, places[late] + 1)
        self._seen += number
        kept = np.flatnonzero(places < self.max_frames)
        return kept, places[kept]


class _FrameFile:
    """File with the sampled frames of one layer, (n, D) float32."""

    def __init__(self, path: Path, width: int, max_frames: int) -> None:
        self.path = path
        self.width = width
        self.max_frames = max_frames
        self._rows = 0
        path.touch()

    def write(self, values: Tensor, kept: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Write the frames `kept` of a batch to their `places` in the sample; a later frame replaces an earlier one."""
        frames = values[torch.from_numpy(kept).to(values.device)].float().cpu().numpy()
        new = min(len(values), self.max_frames - self._rows)  # these frames are first, and are appended in order
        if new:
            with naming(self.path, option="TMPDIR"), self.path.open("ab") as file:
                file.write(frames[:new].tobytes())
            self._rows += new
        if len(frames) > new:
            np.memmap(self.path, np.float32, "r+", shape=(self._rows, self.width))[places[new:]] = frames[new:]

    def read(self) -> NDArray[np.float32]:
        frames = np.fromfile(self.path, dtype=np.float32)
        return frames.reshape(-1, self.width)


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """Put an encoder into evaluation mode, and afterwards restore the mode of each of its modules."""
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
