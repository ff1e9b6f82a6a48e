"""Measures of an encoder's quality without labels: the effective rank of its frames, and how well they cluster."""

from fastssl.metrics.clusters import (
    ClusterScores,
    centre_costs,
    fit_kmeans,
    nearest_centres,
    num_clusters,
    score_clusters,
)
from fastssl.metrics.rank import GramMatrix, effective_rank

__all__ = [
    "ClusterScores",
    "GramMatrix",
    "centre_costs",
    "effective_rank",
    "fit_kmeans",
    "nearest_centres",
    "num_clusters",
    "score_clusters",
]
