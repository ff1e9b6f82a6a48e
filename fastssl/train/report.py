"""Report on a run, finished or not: a table of scores, and the figure RUN/report.png."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from fastssl.eval.showing import drawable, new_figure, write_figure
from fastssl.models.pretraining import PretrainingModel, Score
from fastssl.train.account import Account
from fastssl.train.metrics_file import read_metrics
from fastssl.train.quality_callback import draw_quality

_Rows = list[dict[str, float]]


def summarise(run: Path, system: type[PretrainingModel], account: Account | None) -> Table:
    """Make a table of the first and the last scores of a run.

    Args:
        run: Folder of the run, with metrics.csv.
        system: Class of the run's model, which defines how to show scores.
        account: Count of the recordings that were left out or could not be used; None shows no counts.
    """
    rows = read_metrics(run / "metrics.csv")
    shown = system.shown_scores()
    loss = next(iter(shown))
    training = training_rows(rows, system)
    valid = [row for row in rows if f"valid_{loss}" in row]
    table = Table("", "begin", "end")
    if training:
        first, last = training[0], training[-1]
        table.add_row("updates", f"{first['update']:.0f}", f"{last['update']:.0f}")
        table.add_row("hours of audio", f"{first['audio_hours']:.2f}", f"{last['audio_hours']:.2f}")
        _add_scores(table, "", shown, first, last)
        table.add_row("audio seconds per second", f"{first['audio_s_per_s']:.0f}", f"{last['audio_s_per_s']:.0f}")
    if valid:
        _add_scores(table, "valid_", shown, valid[0], valid[-1])
    if account is not None:
        table.add_row("recordings left out", "", str(len(account.left_out)))
        table.add_row("recordings unusable", "", str(len(account.unusable) + len(account.unusable_noise)))
    return table


def training_rows(rows: _Rows, system: type[PretrainingModel]) -> _Rows:
    """Return the rows about the training, not about held-out recordings or quality.

    Args:
        rows: Rows of metrics.csv.
        system: Class of the run's model.
    """
    # Only they have the loss; rows about held-out recordings have "valid_..." instead.
    needed = {next(iter(system.shown_scores())), "audio_hours", "audio_s_per_s"}
    return [row for row in rows if needed <= row.keys()]


def _add_scores(
    table: Table, prefix: str, shown: Mapping[str, Score], first: dict[str, float], last: dict[str, float]
) -> None:
    where = "held out: " if prefix else ""

    def add(name: str, key: str, factor: float, digits: int) -> None:
        table.add_row(where + name, *(f"{factor * row[prefix + key]:.{digits}f}" for row in (first, last)))

    both = {name: value for name, value in first.items() if name in last}
    for key, score in shown.items():
        if prefix + key in both:
            add(score.label, key, score.factor, score.digits)
    for key, name in _perplexities(both, prefix).items():
        add(name, key, 1, 1)
    if f"{prefix}code_utilisation" in both:
        add("codes that occur, %", "code_utilisation", 100, 1)


def draw_report(run: Path, system: type[PretrainingModel]) -> None:
    """Draw loss, main score, perplexity and throughput over hours of audio, and save the figure as RUN/report.png.

    Four more panels show the encoder's quality if it was measured. Without training rows, nothing is drawn.

    Args:
        run: Folder of the run, with metrics.csv.
        system: Class of the run's model, which defines how to show scores.
    """
    rows = read_metrics(run / "metrics.csv")
    shown = system.shown_scores()
    loss_column, score_column, *_ = shown
    training = training_rows(rows, system)
    if not training:
        return
    # Earlier versions did not write hours in rows with scores; the training row of the same update has them.
    hours = {row["update"]: row["audio_hours"] for row in training}
    valid = [{"audio_hours": hours.get(row["update"], math.nan), **row} for row in rows if "valid_loss" in row]
    measured = [row for row in rows if any(name.startswith("quality_") for name in row)]
    # Four panels for the training, and four more if quality was measured.
    height = 4 if measured else 2
    figure = new_figure(3.5 * height)
    loss, accuracy, perplexity, throughput, *others = figure.subplots(height, 2).flat
    if measured:
        draw_quality(iter(others), measured)

    def plot(axes: object, source: _Rows, key: str, label: str, factor: float = 1.0, style: str = "-") -> None:
        points = drawable((row["audio_hours"], factor * row[key]) for row in source if key in row)
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)  # type: ignore[attr-defined]

    plot(loss, training, loss_column, "training")
    plot(loss, valid, f"valid_{loss_column}", "held out", style="o-")
    loss.set_ylabel(f"{shown[loss_column].label} per {system.averaged_over}")
    factor = shown[score_column].factor
    plot(accuracy, training, score_column, "training", factor)
    plot(accuracy, valid, f"valid_{score_column}", "held out", factor, "o-")
    plot(accuracy, training, "chance", "chance", 100, ":")
    accuracy.set_ylabel(shown[score_column].label)
    for key, name in _perplexities(training[0], "").items():
        plot(perplexity, training, key, name.removeprefix("code perplexity, "))
    perplexity.set_ylabel("code perplexity")
    plot(throughput, training, "audio_s_per_s", "training")
    throughput.set_ylabel("audio seconds per second")
    throughput.set_ylim(bottom=0)
    for axes in (loss, accuracy, perplexity, throughput):
        axes.set_xlabel("hours of audio")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    write_figure(figure, run / "report.png")


def _perplexities(row: dict[str, float], prefix: str) -> dict[str, str]:
    """Return readable names of the code perplexity columns, by column without the prefix."""
    # Other names, which the file may contain too, would be read as markup by rich and as mathematics by matplotlib.
    names = [
        name.removeprefix(prefix) for name in row if re.fullmatch(rf"{prefix}code_perplexity(_[0-9]{{1,2}})?", name)
    ]
    groups = {name: name.removeprefix("code_perplexity").removeprefix("_") for name in names}
    return {name: "code perplexity" + (f", group {group}" if group else "") for name, group in groups.items()}
