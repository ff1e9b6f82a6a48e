"""What the model card of a run's encoder says."""

from collections.abc import Mapping
from pathlib import Path

import fastssl
from fastssl.models.model_card import ModelCard, checked_out_commit

_SCORES = {
    "valid_contrastive_loss": "contrastive loss",
    "valid_prediction_loss": "cross-entropy of the masked frames",
    "valid_distillation_loss": "distillation loss",
    "valid_cosine_similarity": "cosine similarity to the teacher",
    "valid_accuracy": "accuracy of the masked frames",
    "valid_chance": "accuracy at chance",
}


def make_card(
    *, recipe: str | None, data_hours: float, updates: int, scores: Mapping[str, float], scored_at: int
) -> ModelCard:
    """The card of a run after so many updates, with the last scores of its held-out recordings.

    Args:
        recipe: Its name, or the path of its file.
        data_hours: Hours of audio in the training data.
        updates: Number of updates so far.
        scores: By column of metrics.csv; empty if nothing has been scored.
        scored_at: The update after which they were measured.
    """
    after = f"on held-out recordings, after {scored_at} updates"
    quality = {f"{title}, {after}": scores[name] for name, title in _SCORES.items() if name in scores}
    return ModelCard(
        recipe=None if recipe is None else Path(recipe).stem,
        data_hours=data_hours,
        updates=updates,
        version=fastssl.__version__,
        commit=checked_out_commit(),
        quality=quality,
    )
