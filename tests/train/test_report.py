"""Test the report, RUN/report.png: of a run that an earlier version started, and from the command line."""

from pathlib import Path

import pytest

from fastssl import cli
from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.train.config import write_config
from fastssl.train.metrics_file import MetricsFile
from fastssl.train.report import draw_report
from tests.train.conftest import MakeConfig


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


@pytest.mark.usefixtures("rendered")
def test_names_and_numbers_of_a_strangers_run_are_no_markup(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(make_config(), tmp_path / "config.yaml")
    columns = ["update", "audio_hours", "contrastive_loss", "accuracy", "chance", "audio_s_per_s"]
    strange = [r"code_perplexity_$\frac{1$", "code_perplexity_[/bold]", "quality_inertia_" + "9" * 5000]
    strange += ["quality_rankme_\u0663", "quality_effective_rank_0"]
    rows = [[1, -1e308, 1e308, 0.1, 0.1, -1e308], [2, 1e308, -1e308, 0.1, 0.1, 1e308], [3, 0.3, 3, 0.1, 0.1, 1]]
    lines = [",".join([*columns, *strange, "code_perplexity_0"])]
    lines += [",".join(map(str, [*row, *[4] * len(strange), 5])) for row in rows]
    (tmp_path / "metrics.csv").write_text("".join(f"{line}\n" for line in lines))
    assert cli.main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "code perplexity, group 0" in shown
    assert "frac" not in shown
    assert "bold" not in shown
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.usefixtures("rendered")
def test_the_command_draws_a_run_that_still_trains(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "contains no run" in capsys.readouterr().err
    write_config(make_config(), tmp_path / "config.yaml")
    columns = ["update", "audio_hours", "contrastive_loss", "accuracy", "chance", "audio_s_per_s"]
    file = MetricsFile(tmp_path / "metrics.csv", columns)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "has no row of the training yet" in capsys.readouterr().err
    for update in (1, 2):
        file.append(dict.fromkeys(columns, 0.5) | {"update": update})
    with (tmp_path / "metrics.csv").open("a") as running:
        running.write("3,0.1,")  # the row that the run is writing
    assert cli.main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "updates" in shown
    assert str(tmp_path / "report.png") in shown
    assert (tmp_path / "report.png").stat().st_size > 10_000
    # The table is shown even if the figure cannot be written; `report` has no --output.
    (tmp_path / "report.png").unlink()
    (tmp_path / "report.png").mkdir()
    (tmp_path / "report.png" / "mine").touch()
    assert cli.main(["report", str(tmp_path)]) == 1
    shown, error = capsys.readouterr()
    assert "updates" in shown
    assert error.startswith(f"fastssl report: RUN: {tmp_path / 'report.png'} cannot be written: ")
    for damage in ("updat,", "update,audio_minutes"):
        text = (tmp_path / "metrics.csv").read_text()
        (tmp_path / "metrics.csv").write_text(text.replace("update,audio_hours", damage))
        assert cli.main(["report", str(tmp_path)]) == 1
        assert "metrics.csv: " in capsys.readouterr().err
