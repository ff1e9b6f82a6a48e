"""Make the model card of a run's encoder."""

from collections.abc import Mapping
from pathlib import Path

import fastssl
from fastssl.models.model_card import ModelCard, checked_out_commit
from fastssl.models.pretraining import Score
from fastssl.train.config import CardConfig


def make_card(
    *,
    recipe: str | None,
    facts: CardConfig,
    data_hours: float,
    seen_hours: float,
    updates: int,
    scores: Mapping[str, float],
    scored_at: int,
    shown: Mapping[str, Score],
) -> ModelCard:
    """Make the model card of a run, with the latest scores of its held-out recordings.

    Args:
        recipe: Name of the recipe, or path of its file.
        facts: What the user says about the data and the weights.
        data_hours: Hours of audio in the training data.
        seen_hours: Hours of audio that training has drawn so far.
        updates: Number of updates so far.
        scores: Scores by column of metrics.csv; empty if nothing has been scored yet.
        scored_at: Number of updates after which the scores were measured.
        shown: How to show each score by name (`PretrainingModel.shown_scores`).
    """
    after = f"on held-out recordings, after {scored_at} updates"
    held_out = {score.card: scores.get(f"valid_{name}") for name, score in shown.items() if score.card is not None}
    quality = {f"{title}, {after}": value for title, value in held_out.items() if value is not None}
    return ModelCard(
        recipe=None if recipe is None else Path(recipe).stem,
        data_hours=data_hours,
        seen_hours=seen_hours,
        license=facts.license,
        language=facts.language,
        data=facts.data,
        updates=updates,
        version=fastssl.__version__,
        commit=checked_out_commit(),
        quality=quality,
    )
