"""Test the report, RUN/report.png, of a run that an earlier version started."""

from pathlib import Path

import pytest

from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.train.metrics_file import MetricsFile
from fastssl.train.report import draw_report


@pytest.mark.usefixtures("rendered")
def test_scores_of_an_earlier_version_are_drawn(tmp_path: Path) -> None:
    columns = ["update", "audio_hours", "contrastive_loss", "accuracy", "chance", "audio_s_per_s", "valid_loss"]
    file = MetricsFile(tmp_path / "metrics.csv", [*columns, "valid_contrastive_loss", "valid_accuracy"])
    shares = {"accuracy": 0.2, "chance": 0.01, "audio_s_per_s": 9.0}
    for update in (1, 2):
        file.append(
            {"update": update, "audio_hours": update / 10, "contrastive_loss": 4.0, "audio_s_per_s": 9} | shares
        )
    # In that version, rows with scores had no hours of audio.
    for update in (2, 3):
        file.append({"update": update, "valid_loss": 4.0, "valid_contrastive_loss": 4.0, "valid_accuracy": 0.1})
    draw_report(tmp_path, Wav2Vec2ForPreTraining)
    assert (tmp_path / "report.png").stat().st_size > 10_000
