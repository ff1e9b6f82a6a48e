"""What probes report: edit distance of sequences, equal error rate of scores."""

from collections.abc import Sequence

import torch
from torch import Tensor


def edit_distance(found: Sequence[int], expected: Sequence[int]) -> int:
    """Insertions, deletions and substitutions from one to the other."""
    row = list(range(len(expected) + 1))
    for i, one in enumerate(found, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(expected, 1):
            diagonal, row[j] = row[j], min(diagonal + (one != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def equal_error_rate(same: Tensor, different: Tensor) -> float:  # (S,), (R,) scores, higher is more alike
    """Where as many pairs of the same are rejected as pairs of different are accepted, as shares of their kind.

    A threshold at each score gives a point of the ROC, and it is straight between neighbouring points; this is where it
    meets the line of equal shares. Equal scores fall on one side of every threshold together.

    Raises:
        ValueError: There is no pair of a kind, or a score is not finite.
    """
    if not len(same) or not len(different):
        raise ValueError(f"scores: {len(same)} pairs of the same and {len(different)} of different; both are needed")
    scores = torch.cat([same, different]).double()
    if not scores.isfinite().all():
        raise ValueError("scores: must be finite")
    thresholds = scores.unique()  # sorted
    # Accepted is what scores at least the threshold; beyond the last one nothing is.
    rejected = torch.searchsorted(same.double().sort().values, thresholds).double() / len(same)
    accepted = 1 - torch.searchsorted(different.double().sort().values, thresholds).double() / len(different)
    rejected = torch.cat([rejected, torch.ones(1, dtype=torch.float64, device=scores.device)])
    accepted = torch.cat([accepted, torch.zeros(1, dtype=torch.float64, device=scores.device)])
    surplus = rejected - accepted  # from -1 up to 1
    after = int((surplus >= 0).nonzero()[0])
    before = after - 1
    share = surplus[before] / (surplus[before] - surplus[after])
    return float(rejected[before] + share * (rejected[after] - rejected[before]))


def pair_scores(
    embeddings: Tensor, classes: Tensor, recordings: Tensor
) -> tuple[Tensor, Tensor]:  # (E, D), (E,), (E,) -> (S,), (R,)
    """Cosines of all pairs of two recordings: those of the same class, and those of different ones.

    Two segments of one recording share its microphone and its moment, so they are no trial.
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    same, different = [], []
    rows = max(1, 10_000_000 // max(1, len(unit)))
    for first in range(0, len(unit), rows):
        block = slice(first, first + rows)
        later = torch.arange(len(unit), device=unit.device) > torch.arange(len(unit), device=unit.device)[block, None]
        trial = later & (recordings[block, None] != recordings)
        alike = classes[block, None] == classes
        cosines = unit[block] @ unit.T
        same.append(cosines[trial & alike])
        different.append(cosines[trial & ~alike])
    return torch.cat(same), torch.cat(different)
