"""Error measures of probes: edit distance of sequences, equal error rate of scores."""

from collections.abc import Sequence

import torch
from torch import Tensor


def edit_distance(found: Sequence[int], expected: Sequence[int]) -> int:
    """Return the Levenshtein distance: the least number of insertions, deletions and substitutions.

    Args:
        found: Numbers of the symbols that were recognised.
        expected: Numbers of the symbols of the target.
    """
    row = list(range(len(expected) + 1))
    for i, one in enumerate(found, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(expected, 1):
            diagonal, row[j] = row[j], min(diagonal + (one != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def equal_error_rate(same: Tensor, different: Tensor) -> float:  # (S,), (R,) scores, higher is more alike
    """Return the equal error rate of verification, from 0 to 1.

    This is the share of same-class pairs rejected, at the threshold where it equals the share of different-class pairs
    accepted. Each score is a threshold and gives a point of the ROC curve; between neighbouring points the curve is
    interpolated linearly.

    Args:
        same: (S,) scores of pairs of the same class; higher means more alike.
        different: (R,) scores of pairs of different classes.

    Raises:
        ValueError: One of the two is empty, or a score is not finite.
    """
    if not len(same) or not len(different):
        raise ValueError(
            "scores: both kinds of pairs are needed, got "
            f"{len(same)} pairs of the same class and {len(different)} of different classes"
        )
    scores = torch.cat([same, different]).double()
    if not scores.isfinite().all():
        raise ValueError("scores: must be finite, but some are NaN or infinite")
    thresholds = scores.unique()  # sorted
    # A pair is accepted if its score is at least the threshold; above the last threshold no pair is.
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
    """Return the cosine similarities of all pairs of embeddings from different recordings.

    Two segments of one recording share its microphone and its moment, so they do not form a pair.

    Args:
        embeddings: (E, D) embeddings, in any floating-point dtype.
        classes: (E,) class of each embedding.
        recordings: (E,) number of the recording that each embedding comes from.

    Returns:
        (S,) fp32 cosines of pairs of the same class, and (R,) of pairs of different classes.
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
