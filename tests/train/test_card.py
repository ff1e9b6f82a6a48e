"""Test a run's model card, and the commit that it names."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastssl.models.model_card import ModelCard, checked_out_commit
from fastssl.train.card import make_card
from fastssl.train.config import CardConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from tests.train.conftest import MakeConfig


def test_a_run_leaves_a_card(make_config: MakeConfig) -> None:
    changes = {"trainer.max_steps": 6, "trainer.val_check_interval": 4, "data.crop_s": 1}
    card = CardConfig(license="apache-2.0", language=("en",), data=("somebody/speech",))
    config = dataclasses.replace(make_config(**changes), recipe="folder/mine.yaml", card=card)
    pretrain(config)
    run = Path(config.output)
    text = (run / "encoder" / "README.md").read_text()
    data = PretrainDataModule(config.audio, config.data, normalize=True, seed=config.seed, accumulation=1)
    # What the card says may change in a run that continues.
    pretrain(dataclasses.replace(config, card=CardConfig()), resume=True)
    assert "licence" not in (run / "encoder" / "README.md").read_text()
    scores = next(row for row in read_metrics(run / "metrics.csv") if row["update"] == 4 and "valid_accuracy" in row)
    for fact in (
        "| recipe | mine |",
        f"| training audio | {data.train_corpus.duration_s / 3600:.2f} hours |",
        f"| audio seen | {read_metrics(run / 'metrics.csv')[-1]['audio_hours']:.2f} hours |",
        "| licence | apache-2.0 |",
        "| language | en |",
        "| training data | somebody/speech |",
        "| updates | 6 |",
        f"| contrastive loss, on held-out recordings, after 4 updates | {scores['valid_contrastive_loss']:.4g} |",
        f"| accuracy of the masked frames, on held-out recordings, after 4 updates | {scores['valid_accuracy']:.4g} |",
    ):
        assert fact in text, fact


def test_languages_are_codes() -> None:
    with pytest.raises(ValueError, match=r"card\.language: must be codes of two or three letters, .*got 'Eng"):
        CardConfig(language=("de", "English"))


def test_a_resumed_run_has_the_scores_of_its_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card has only scores up to its checkpoint: a resumed run discards the later ones."""
    changes = {"trainer.max_steps": 3, "trainer.val_check_interval": 2, "trainer.checkpoint_every": 1, "data.crop_s": 1}
    config = make_config(**changes)
    scores: dict[int, tuple[int, float | None]] = {}

    def spy(**facts: Any) -> ModelCard:
        scores[facts["updates"]] = facts["scored_at"], facts["scores"].get("valid_accuracy")
        card = make_card(**facts)
        measured = [value for name, value in card.quality.items() if "accuracy of the masked frames" in name]
        assert measured == ([] if scores[facts["updates"]][1] is None else [scores[facts["updates"]][1]])
        return card

    monkeypatch.setattr("fastssl.train.pretrain.make_card", spy)
    pretrain(config)
    assert scores[1] == (0, None)
    assert scores[2] == scores[3]
    at, score = scores[3]
    assert at == 2
    rows = read_metrics(Path(config.output) / "metrics.csv")
    assert score == pytest.approx(next(row["valid_accuracy"] for row in rows if "valid_accuracy" in row), rel=1e-8)
    longer = dataclasses.replace(config.trainer, max_steps=5, val_check_interval=5)
    pretrain(dataclasses.replace(config, trainer=longer), resume=True)
    assert scores[4] == (2, score)
    assert scores[5][0] == 5


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
