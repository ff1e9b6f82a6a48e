"""Fit k-means to frames, and find the price that gives segments of a wanted length."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from fastssl.data.audio import AudioError
from fastssl.data.batches import utterance_id
from fastssl.data.labels import CENTRES_FILE, read_settings
from fastssl.data.segments import smooth_classes
from fastssl.eval.label.frames import Classes, Features
from fastssl.eval.label.settings import LabelSettings
from fastssl.metrics import centre_costs
from fastssl.models.folder import read_safetensors
from fastssl.reading import printable

logger = logging.getLogger(__name__)

#: The search for a segment's price uses this many frames and halves its interval this many times.
_PRICE_FRAMES, _HALVINGS = 50_000, 30


def fit(features: Features, cuts: Sequence[Cut], settings: LabelSettings) -> Classes:
    """Fit k-means to a sample of the recordings, as HuBERT does (fairseq, simple_kmeans), and find a segment's price.

    Args:
        features: The frames to cluster.
        cuts: Recordings to choose the sample from.
        settings: How to make labels.

    Raises:
        ValueError: The sample has fewer frames than there are clusters, or no price gives segments of `segment_ms`.
    """
    from sklearn.cluster import MiniBatchKMeans

    order = sorted(cuts, key=lambda cut: (utterance_id(f"{settings.seed}/{cut.id}"), cut.id))
    sample, expected = [], 0.0
    for cut in order:
        if expected >= settings.fit_frames:
            break
        sample.append(cut)
        expected += cut.duration / features.frame_shift_s
    found = {cut.id: frames.numpy() for cut, frames in features.of(sample) if not isinstance(frames, AudioError)}
    # Restore the order of the sample: recordings arrive in an order that depends on the workers, and k-means depends
    # on the order of frames.
    parts = [found[cut.id] for cut in sample if cut.id in found]
    frames = np.concatenate(parts)[: settings.fit_frames] if parts else np.empty((0, 1), np.float32)
    if len(frames) < settings.clusters:
        raise ValueError(
            f"--clusters: must be at most the number of frames ({len(frames)}), got {settings.clusters}; "
            "give more audio or fewer clusters"
        )
    logger.info("k-means: fitting %d clusters to %d frames of width %d", settings.clusters, *frames.shape)
    fitted = MiniBatchKMeans(
        settings.clusters,
        init="k-means++",
        max_iter=100,
        batch_size=10_000,
        tol=0.0,
        max_no_improvement=100,
        n_init=20,
        reassignment_ratio=0.0,
        random_state=settings.seed,
    ).fit(frames)
    centres = torch.from_numpy(np.ascontiguousarray(fitted.cluster_centers_, dtype=np.float32))
    if settings.segment_ms is None:
        return Classes(centres, settings.segment_price)
    return Classes(centres, _price(parts, centres, wanted=settings.segment_ms / 1000 / features.frame_shift_s))


def _price(recordings: Sequence[NDArray[np.float32]], centres: Tensor, *, wanted: float) -> float:
    """Find by bisection the price at which segments have `wanted` frames on average.

    Args:
        recordings: Frames (T, D) of each recording; about the first 50,000 frames are used.
        centres: (K, D) k-means centres.
        wanted: Mean length of a segment, in frames.

    Raises:
        ValueError: No price makes segments that short or that long.
    """
    costs, frames = [], 0
    for recording in recordings:
        if frames >= _PRICE_FRAMES:
            break
        costs.append(centre_costs(torch.from_numpy(recording), centres).numpy())
        frames += len(recording)

    def mean_frames(price: float) -> float:
        classes = [smooth_classes(cost, price=price) for cost in costs]
        return frames / sum(1 + int(np.count_nonzero(np.diff(of_recording))) for of_recording in classes)

    shortest, longest = mean_frames(0.0), frames / len(costs)
    if not shortest <= wanted < longest:
        raise ValueError(
            f"--segment_ms: must lie between {shortest:.2g} frames (each frame takes its nearest class) and "
            f"{longest:.3g} frames (each recording is one segment), but asks for {wanted:.3g} frames"
        )
    low, high = 0.0, 1.0
    while mean_frames(high) < wanted:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_frames(middle) < wanted else (low, middle)
    logger.info("price per segment: %.4g, which gives segments of %.3g frames on average", high, mean_frames(high))
    return high


def read_centres(folder: Path) -> Tensor:
    """Read the k-means centres of a folder of labels: (K, D) fp32.

    Args:
        folder: Folder that `fastssl label` wrote.

    Raises:
        ValueError: The file of centres is missing or damaged, or does not fit the settings.
    """
    path = folder / CENTRES_FILE
    if not path.is_file():
        raise ValueError(f"{path}: is missing; it contains the k-means model, so restore it or make the labels again")
    try:
        centres = read_safetensors(path)["centres"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({printable(error)}); restore it or make the labels again") from None
    clusters = read_settings(folder)["clusters"]
    if centres.dim() != 2 or len(centres) != clusters or centres.dtype != torch.float32:
        raise ValueError(f"{path}: is damaged (centres are not fp32, ({clusters}, width)); make the labels again")
    if not centres.isfinite().all():
        raise ValueError(f"{path}: is damaged (centres are NaN or infinite); restore it or make the labels again")
    return centres
