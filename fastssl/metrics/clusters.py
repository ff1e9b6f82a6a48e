"""How frames cluster: k-means, its inertia, and the Davies-Bouldin index (arXiv:2501.05966, section 3.1.1)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Most clusters, and the frames that each needs on average.
_MAX_CLUSTERS, _FRAMES_PER_CLUSTER = 1024, 100
#: Rows whose distances are in memory at a time.
_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class ClusterScores:
    """What clusters say of the frames in them.

    Args:
        frames: How many were assigned.
        clusters: How many have a member.
        inertia: Sum over frames of the squared distance to the nearest centre; it grows with the frames and with the
            square of their norm.
        davies_bouldin: Mean over clusters of how much it overlaps with the neighbour it overlaps most with; lower is
            better separated. NaN where fewer than two clusters have a member.
    """

    frames: int
    clusters: int
    inertia: float
    davies_bouldin: float

    @property
    def inertia_per_frame(self) -> float:
        """Mean squared distance of a frame to its centre."""
        return self.inertia / self.frames

    @property
    def log_inertia_per_frame(self) -> float:
        """Its natural logarithm; minus infinity for frames that all lie on their centres."""
        return math.log(self.inertia_per_frame) if self.inertia > 0 else -math.inf


def num_clusters(frames: int) -> int:
    """The k of k-means for so many frames: one for each hundred, at most 1024.

    Raises:
        ValueError: That is fewer than two.
    """
    if frames < 2 * _FRAMES_PER_CLUSTER:
        raise ValueError(f"frames: clusters take at least {2 * _FRAMES_PER_CLUSTER}, got {frames}")
    return min(_MAX_CLUSTERS, frames // _FRAMES_PER_CLUSTER)


def fit_kmeans(frames: NDArray[np.float32], clusters: int, *, seed: int, passes: int = 5) -> Tensor:
    """Centres by scikit-learn's mini-batch k-means, started by k-means++.

    Mini-batches have max(1024, 4 k) frames, drawn at random from all; as many are drawn as make `passes` over the
    frames, whatever the inertia does, so that cost and centres are a function of frames and seed. On the frames of a
    small speech encoder (two layers, 24 k of width 192) the inertia was then 1.5 % above that of 50 passes in batches
    of 4096, and another seed changed it by up to 0.4 %.

    Args:
        frames: (n, D) float32 or float64; near zero mean, or the distances lose digits.
        clusters: k.
        seed: Of k-means++ and the mini-batches.
        passes: Over the frames.

    Returns:
        (k, D), of the dtype of `frames`.

    Raises:
        ValueError: There are fewer frames than clusters, or one of them is NaN or infinite.
    """
    from sklearn.cluster import MiniBatchKMeans

    if not 1 <= clusters <= len(frames):
        raise ValueError(f"clusters: must be from 1 to the number of frames, {len(frames)}, got {clusters}")
    if not np.isfinite(frames).all():
        raise ValueError("frames: some are NaN or infinite")
    kmeans = MiniBatchKMeans(
        clusters,
        init="k-means++",
        n_init=1,
        batch_size=max(1024, 4 * clusters),
        # k-means++ would else cost more than the fit.
        init_size=max(3072, 3 * clusters),
        max_iter=passes,
        max_no_improvement=None,
        tol=0.0,
        compute_labels=False,
        random_state=seed,
    )
    return torch.from_numpy(kmeans.fit(frames).cluster_centers_)


def nearest_centres(frames: Tensor, centres: Tensor) -> Tensor:
    """(n,) int64: the centre with the least distance to each frame. Arguments as in `centre_costs`."""
    return centre_costs(frames, centres).argmin(1)


def centre_costs(frames: Tensor, centres: Tensor) -> Tensor:
    """(n, k): squared distances of frames to centres, less the same number for all centres of a frame.

    Args:
        frames: (n, D).
        centres: (k, D), of the same dtype.
    """
    # Distances do not change when both are moved, and products of small numbers lose fewer digits.
    origin = centres.mean(0)
    frames, centres = frames - origin, centres - origin
    # The frame's own norm is the same for all centres.
    return torch.addmm(centres.square().sum(1), frames, centres.T, alpha=-2)


def score_clusters(frames: Iterable[Tensor], centres: Tensor) -> ClusterScores:
    """Inertia and Davies-Bouldin of frames that are each assigned to the nearest of the centres.

    Inertia is about `centres`, as in scikit-learn's `KMeans`; Davies-Bouldin about the means of the members, as in its
    `davies_bouldin_score`, which leaves out clusters without members too. Distances are added up in fp64.

    Args:
        frames: Portions (n, D) that can be iterated twice, such as a list, and may be read as they are asked for; what
            is kept is 4 bytes a frame.
        centres: (k, D); frames are moved to its device and dtype to be assigned.

    Raises:
        ValueError: There is no frame, one is NaN or infinite, or the second iteration gave another number of frames.
    """
    count = torch.zeros(len(centres), dtype=torch.int64)
    total = torch.zeros(centres.shape, dtype=torch.float64)
    exact_centres = centres.cpu().double()
    inertia = 0.0
    labels: list[Tensor] = []
    for portion in _portions(frames):
        nearest = nearest_centres(portion.to(centres), centres).cpu()
        exact = portion.cpu().double()
        inertia += float((exact - exact_centres[nearest]).square().sum())
        count += nearest.bincount(minlength=len(centres))
        total.index_add_(0, nearest, exact)
        labels.append(nearest.int())
    num_frames = int(count.sum())
    if num_frames == 0:
        raise ValueError("frames: there are none")
    if not math.isfinite(inertia):
        raise ValueError("frames: some are NaN or infinite")
    means = total / count.clamp(min=1)[:, None]
    spread = torch.zeros(len(centres), dtype=torch.float64)
    again = 0
    for portion, nearest in zip(_portions(frames), labels, strict=False):
        if len(portion) == len(nearest):
            spread.index_add_(0, nearest, (portion.cpu().double() - means[nearest]).square().sum(1).sqrt())
            again += len(portion)
    if again != num_frames:
        raise ValueError(f"frames: {num_frames} in the first iteration, {again} in the second")
    members = count > 0
    return ClusterScores(
        frames=num_frames,
        clusters=int(members.sum()),
        inertia=inertia,
        davies_bouldin=_davies_bouldin(means[members], (spread / count.clamp(min=1))[members]),
    )


def _portions(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    for portion in frames:
        yield from portion.split(_CHUNK_ROWS) if len(portion) else ()


def _davies_bouldin(means: Tensor, spread: Tensor) -> float:
    """Mean over clusters i of the largest (s_i + s_j) / |m_i - m_j|, of clusters that all have members.

    Args:
        means: (K, D) fp64.
        spread: (K,) mean distance of the members to it.
    """
    if len(means) < 2:
        return math.nan
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    # As scikit-learn has it: nothing spreads, or nothing is apart.
    if torch.allclose(spread, torch.zeros(()).double()) or torch.allclose(distances, torch.zeros(()).double()):
        return 0.0
    overlap = (spread[:, None] + spread) / torch.where(distances == 0, math.inf, distances)
    return float(overlap.amax(1).mean())
