"""What the model card of a run's encoder says."""

from collections.abc import Mapping
from pathlib import Path

import fastssl
from fastssl.models.model_card import ModelCard

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
        commit=checked_out_commit(Path(fastssl.__file__).resolve().parent.parent),
        quality=quality,
    )


def checked_out_commit(folder: Path) -> str | None:
    """The commit that a clone of a repository is at, by git's own files; None for a folder that is no clone.

    Args:
        folder: That has `.git` in it, a folder, or in a worktree, a file.
    """
    git = folder / ".git"
    try:
        if git.is_file():
            git = folder / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        # Branches lie where a worktree's own files do not.
        common = git / "commondir"
        shared = git / common.read_text().strip() if common.exists() else git
        if (shared / name).exists():
            return (shared / name).read_text().strip()
        packed = (line.split(" ") for line in (shared / "packed-refs").read_text().splitlines())
        return next((parts[0] for parts in packed if parts[1:] == [name]), None)
    except OSError:
        return None
