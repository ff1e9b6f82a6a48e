"""Test that cluster scores computed from a stream equal scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import davies_bouldin_score
from torch import Tensor

from fastssl.metrics import fit_kmeans, nearest_centres, num_clusters, score_clusters


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """Return (900, 12) fp64 frames scattered around 20 points far from the origin."""
    random = torch.Generator().manual_seed(0)
    points = 3 * torch.randn(20, 12, dtype=torch.float64, generator=random)
    which = torch.randint(20, (900,), generator=random)
    return 50 + points[which] + torch.randn(900, 12, dtype=torch.float64, generator=random)


def test_equals_scikit_learn(frames: Tensor) -> None:
    kmeans = KMeans(15, n_init=1, random_state=0, max_iter=3).fit(frames.numpy())
    centres = torch.from_numpy(kmeans.cluster_centers_)
    labels = kmeans.predict(frames.numpy())
    scores = score_clusters([frames], centres)
    assert np.array_equal(nearest_centres(frames, centres).numpy(), labels)
    assert scores.inertia == pytest.approx(-kmeans.score(frames.numpy()), rel=1e-6)
    assert scores.inertia_per_frame == pytest.approx(scores.inertia / 900)
    assert scores.log_inertia_per_frame == pytest.approx(math.log(scores.inertia / 900))
    assert scores.davies_bouldin == pytest.approx(davies_bouldin_score(frames.numpy(), labels), rel=1e-6)
    assert (scores.frames, scores.clusters) == (900, 15)


def test_stream_equals_all_at_once(frames: Tensor) -> None:
    centres = fit_kmeans(frames.numpy(), 15, seed=0)
    at_once, stream = score_clusters([frames], centres), score_clusters(frames.split((1, 0, 299, 600)), centres)
    assert stream.inertia == pytest.approx(at_once.inertia, rel=1e-6)
    assert stream.davies_bouldin == pytest.approx(at_once.davies_bouldin, rel=1e-6)


def test_single_precision_far_from_the_origin(frames: Tensor) -> None:
    # In fp32, products of these numbers lose all digits that tell one centre from another.
    far = (frames + 5000).float()
    centres = far[:40]
    exact, single = score_clusters([far.double()], centres.double()), score_clusters([far], centres)
    assert single.inertia == pytest.approx(exact.inertia, rel=1e-6)
    assert single.davies_bouldin == pytest.approx(exact.davies_bouldin, rel=1e-6)


def test_clusters_without_members_are_left_out(frames: Tensor) -> None:
    centres = torch.cat((frames[:5], frames[:2] + 1000))
    scores = score_clusters([frames], centres)
    labels = nearest_centres(frames, centres).numpy()
    assert scores.clusters == 5 == len(set(labels))
    assert scores.davies_bouldin == pytest.approx(davies_bouldin_score(frames.numpy(), labels), rel=1e-6)


def test_fit_finds_the_points_and_repeats_itself(frames: Tensor) -> None:
    first, again = (fit_kmeans(frames.numpy(), 20, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, fit_kmeans(frames.numpy(), 20, seed=4))
    best = KMeans(20, n_init=5, random_state=0).fit(frames.numpy()).inertia_
    assert best <= score_clusters([frames], first).inertia < 1.25 * best
    assert fit_kmeans(frames.float().numpy(), 5, seed=0).dtype == torch.float32


def test_the_fit_leaves_other_random_numbers_alone(frames: Tensor) -> None:
    np.random.seed(0)  # noqa: NPY002 - scikit-learn's default generator
    before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    fit_kmeans(frames.numpy(), 5, seed=0)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002


def test_number_of_clusters() -> None:
    assert [num_clusters(n) for n in (200, 299, 102_399, 102_400, 10**6)] == [2, 2, 1023, 1024, 1024]
    with pytest.raises(ValueError, match="at least 200, got 199"):
        num_clusters(199)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_degenerate_frames(frames: Tensor) -> None:
    constant = torch.full((300, 12), 2.0, dtype=torch.float64)
    scores = score_clusters([constant], fit_kmeans(constant.numpy(), 3, seed=0))
    assert (scores.inertia, scores.clusters, scores.log_inertia_per_frame) == (0.0, 1, -math.inf)
    assert math.isnan(scores.davies_bouldin)
    two = torch.tensor([[0.0], [0.0], [1.0]])
    assert score_clusters([two], two[1:]).davies_bouldin == davies_bouldin_score(two.numpy(), [0, 0, 1]) == 0

    spoiled = frames.clone()
    spoiled[7, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_kmeans(spoiled.numpy(), 5, seed=0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        score_clusters([spoiled], frames[:5])
    with pytest.raises(ValueError, match="clusters: must be from 1 to the number of frames, 4, got 5"):
        fit_kmeans(frames[:4].numpy(), 5, seed=0)
    with pytest.raises(ValueError, match="expected at least one frame"):
        score_clusters([], frames[:5])
    with pytest.raises(ValueError, match="900 in the first iteration, 0 in the second"):
        score_clusters(iter([frames]), frames[:5])
