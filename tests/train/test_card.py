"""The model card that a run leaves, and the commit that it names."""

import dataclasses
import subprocess
from pathlib import Path

import pytest

from fastssl.train.card import checked_out_commit, make_card
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from tests.train.conftest import MakeConfig


def test_a_run_leaves_a_card(make_config: MakeConfig) -> None:
    changes = {"trainer.max_steps": 6, "trainer.val_check_interval": 4, "data.crop_s": 1}
    config = dataclasses.replace(make_config(**changes), recipe="folder/mine.yaml")
    pretrain(config)
    run = Path(config.output)
    text = (run / "encoder" / "README.md").read_text()
    data = PretrainDataModule(config.audio, config.data, normalize=True, seed=config.seed, accumulation=1)
    scores = next(row for row in read_metrics(run / "metrics.csv") if row["update"] == 4 and "valid_accuracy" in row)
    for fact in (
        "| recipe | mine |",
        f"| audio it was trained on | {data.train_corpus.duration_s / 3600:.2f} hours |",
        "| updates | 6 |",
        f"| contrastive loss, on held-out recordings, after 4 updates | {scores['valid_contrastive_loss']:.4g} |",
        f"| accuracy of the masked frames, on held-out recordings, after 4 updates | {scores['valid_accuracy']:.4g} |",
    ):
        assert fact in text, fact


def test_scores_of_later_updates_do_not_count(tmp_path: Path) -> None:
    """A run that went back to its last checkpoint has not scored them."""
    lines = ["update,loss,valid_accuracy", "2,1.0,", "2,,0.5", "3,1.0,", "4,,0.75"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    for updates, score in ((1, None), (2, 0.5), (3, 0.5), (4, 0.75)):
        card = make_card(tmp_path, recipe=None, data_hours=1.0, updates=updates)
        assert list(card.quality.values()) == ([] if score is None else [score])
    assert not make_card(tmp_path / "none", recipe=None, data_hours=1.0, updates=1).quality


def test_the_commit_is_that_of_git(tmp_path: Path) -> None:
    clone = tmp_path / "clone"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        try:
            done = subprocess.run(["git", *identity, *arguments], cwd=clone, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("git is not installed")
        return done.stdout.strip()

    clone.mkdir()
    assert checked_out_commit(clone) is None
    git("init", "-b", "some/branch")
    assert checked_out_commit(clone) is None  # no commit yet
    for message in ("first", "second"):
        git("commit", "--allow-empty", "-m", message)
    commit = git("rev-parse", "HEAD")
    assert checked_out_commit(clone) == commit
    git("worktree", "add", "-b", "other", str(tmp_path / "tree"), "HEAD~1")
    assert checked_out_commit(tmp_path / "tree") == git("rev-parse", "HEAD~1")
    git("pack-refs", "--all")
    assert checked_out_commit(clone) == commit
    git("checkout", "--detach")
    assert checked_out_commit(clone) == commit
