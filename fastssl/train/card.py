"""What the model card of a run's encoder says."""

from pathlib import Path

import fastssl
from fastssl.models.model_card import ModelCard
from fastssl.train.metrics_file import read_metrics

_SCORES = {
    "valid_contrastive_loss": "contrastive loss",
    "valid_prediction_loss": "cross-entropy of the masked frames",
    "valid_distillation_loss": "distillation loss",
    "valid_cosine_similarity": "cosine similarity to the teacher",
    "valid_accuracy": "accuracy of the masked frames",
    "valid_chance": "accuracy at chance",
}


def make_card(run: Path, *, recipe: str | None, data_hours: float, updates: int) -> ModelCard:
    """The card of a run after so many updates, with the last scores of its held-out recordings.

    Args:
        run: Folder of the run, whose metrics.csv has the scores.
        recipe: Its name, or the file that it is.
        data_hours: Hours of audio that is trained on.
        updates: How many there have been.
    """
    quality = {}
    rows = read_metrics(run / "metrics.csv") if (run / "metrics.csv").exists() else []
    for row in reversed(rows):
        if row["update"] <= updates and any(name in row for name in _SCORES):
            after = f"on held-out recordings, after {row['update']:.0f} updates"
            quality = {f"{title}, {after}": row[name] for name, title in _SCORES.items() if name in row}
            break
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
