"""Study of early prediction (arXiv:2501.05966): do label-free measures early in training predict final quality?

    python -m benchmarks.studies.early_prediction CORPORA --runs RUNS --output early_prediction.json [--full]

best-rq-tiny is trained with four kinds of masking and three learning rates, some deliberately bad. The centre of this
grid is repeated with two more seeds, to measure the noise. After a quarter of the updates, the study measures the
checkpoint's held-out loss, the rank of its embeddings and the quality of their clusters. At the end it probes the
encoder for digits by CTC and for the voice in 1 s of audio. The layers were chosen in advance: the last one for digits,
the middle one for voices.

The study reports Spearman's and Pearson's correlation between the measures at a quarter and the errors at the end, over
the twelve cells of the grid. Seeds of a cell are averaged first, because they are not independent trials, and intervals
are bootstrapped over cells. The held-out loss of each run uses the run's own masking. A very bad learning rate shifts
all values at once. The study therefore also reports correlations after subtracting the mean of each learning rate.
"""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies.checkpoint_scores import quality_at
from benchmarks.studies.findings import Correlation, Spread, chance, correlate
from benchmarks.studies.pretraining_runs import (
    Job,
    StudyFile,
    Trained,
    corpora_parser,
    do_all,
    finished,
    what_decides,
)
from benchmarks.studies.probes import Probe, probe

#: For each kind of masking, the share of frames that would be masked if spans did not overlap, and the length of a span
#: in frames of 40 ms. On connected digits they mask 5 % (almost nothing to predict), 35, 34 and 64 % of all frames; the
#: last is BEST-RQ's masking.
MASKS = {"sparse": (0.05, 2), "short": (0.4, 2), "long": (0.4, 6), "dense": (1.0, 12)}
LEARNING_RATES = (1e-4, 1e-3, 8e-3)
CENTRE = ("long", 1e-3)
#: Layer to measure for each probe, chosen before the first run: late layers encode what is said, middle layers the
#: voice.
LAYER_OF = {"digit error": "last", "voice error": "middle"}
PROBES = {
    "digit error": Probe("test", "digits"),
    "voice error": Probe("voices_test", "voice", segment_s=1.0),
}
MEASURES = ("held_out_loss", "effective_rank", "rankme", "log_inertia_per_frame", "davies_bouldin")


class Size(NamedTuple):
    """Scale of the study."""

    updates: int
    seeds: int
    quality_minutes: float
    probe_steps: int


DEFAULT = Size(updates=240, seeds=1, quality_minutes=8.0, probe_steps=300)
FULL = Size(updates=800, seeds=3, quality_minutes=8.0, probe_steps=500)


def jobs(corpora: Path, size: Size, *, precision: str) -> dict[str, Job]:
    """Return the runs by their key `mask/rate/seed`; the centre of the grid has at least three seeds."""
    grid = [(mask, rate, seed) for seed in range(size.seeds) for mask in MASKS for rate in LEARNING_RATES]
    repeats = [(*CENTRE, seed) for seed in range(max(3, size.seeds)) if (*CENTRE, seed) not in grid]
    return {
        f"{mask}/{rate:g}/{seed}": Job(
            f"best-rq-{mask}-{rate:g}-seed{seed}",
            corpora / "train",
            "best-rq-tiny",
            {
                "model.mask_time_prob": MASKS[mask][0],
                "model.mask_time_length": MASKS[mask][1],
                "optimizer.lr": rate,
                # The warm-up must end before the first measured checkpoint, after a quarter of the updates.
                "optimizer.warmup_updates": size.updates // 10,
                "data.valid": str(corpora / "dev"),
                "data.min_duration_s": 1.0,
                "trainer.max_steps": size.updates,
                "trainer.precision": precision,
                "trainer.val_check_interval": size.updates // 4,
                "trainer.checkpoint_every": size.updates // 4,
                "trainer.keep_every": size.updates // 4,
                "trainer.log_every": 20,
                "trainer.progress": "false",
            },
            seed,
        )
        for mask, rate, seed in grid + repeats
    }


def evaluate(corpora: Path, size: Size, key: str, trained: Trained) -> dict[str, Any]:
    """Measure a finished run at a quarter and at the end of its updates, and probe it at the end."""
    at = {"quarter": size.updates // 4, "end": size.updates}
    measures = {
        when: quality_at(trained.run, update, corpora / "dev", minutes=size.quality_minutes)
        for when, update in at.items()
    }
    return {
        **measures,
        "probes": probe(trained.run, corpora, PROBES, steps=size.probe_steps),
        "training_s": trained.training_s,
    }


def main() -> None:
    """Do the missing runs, measure and probe them, and write findings, a table and a figure."""
    parser = corpora_parser(__doc__ or "")
    parser.add_argument("--full", action="store_true", help=f"{FULL.seeds} seeds of {FULL.updates} updates (hours)")
    arguments = parser.parse_args()
    size = FULL if arguments.full else DEFAULT
    decides = what_decides(arguments.corpora, ["train", "dev", "test", "voices_train", "voices_dev", "voices_test"])
    settings = {"study": "early_prediction", **size._asdict(), "precision": arguments.precision, **decides}
    study = StudyFile(arguments.output, settings)
    evaluated = partial(evaluate, arguments.corpora, size)
    to_do = jobs(arguments.corpora, size, precision=arguments.precision)
    do_all(study, to_do, arguments.runs, evaluated, parallel=arguments.parallel)
    results, failed = finished(study.results)
    study.conclude(failed + findings(results))
    write_csv(results, arguments.output.with_suffix(".csv"))
    draw(results, arguments.output.with_suffix(".png"))
    for line in study.content["findings"]:
        print(line)


def measure(result: Mapping[str, Any], name: str, layer: str, *, when: str = "quarter") -> float:
    """Return a measure of a run's checkpoint.

    Args:
        result: Result of the run.
        name: One of `MEASURES`.
        layer: "last" or "middle"; the held-out loss has no layer.
        when: "quarter" or "end".

    Returns:
        The value, or NaN if it was not finite.
    """
    there = result[when]
    if name == "held_out_loss":
        return _number(there[name])
    layers = there["layers"]
    return _number(layers[-1 if layer == "last" else len(layers) // 2][name])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def findings(results: Mapping[str, Any]) -> list[str]:
    """Say how much errors vary over seeds, and how each measure correlates with each error."""
    lines = []
    centre = [result for key, result in results.items() if key.rpartition("/")[0] == f"{CENTRE[0]}/{CENTRE[1]:g}"]
    cells: dict[str, list[Any]] = {}
    for key, result in _balanced(results).items():
        cells.setdefault(key.rpartition("/")[0], []).append(result)
    for name in PROBES:
        errors = [result["probes"][name] for result in results.values()]
        cell_errors = [statistics.fmean(run["probes"][name] for run in runs) for runs in cells.values()]
        floor = Spread([result["probes"][name] for result in centre]) if centre else "all diverged"
        lines.append(
            f"{name} at the end: {100 * min(errors):.1f} to {100 * max(errors):.1f} % over {len(errors)} runs; "
            f"the centre of the grid, {len(centre)} seeds: {floor}"
        )
        for what in MEASURES:
            layer = LAYER_OF[name]
            found = [statistics.fmean(measure(run, what, layer) for run in runs) for runs in cells.values()]
            ranked, linear = (correlate(found, cell_errors, rank=rank) for rank in (True, False))
            of = "" if what == "held_out_loss" else f", {layer} layer"
            begin = f"{what}{of}, at a quarter, with {name} at the end"
            lines.append(
                f"{begin}, {len(cells)} cells: Spearman {ranked}, Pearson {linear}: {_verdict(ranked, 'the error')}"
            )
            rates = [cell.partition("/")[2] for cell in cells]
            rest = correlate(_less_group_means(found, rates), _less_group_means(cell_errors, rates), rank=True)
            lines.append(f"{begin}, less the means of each learning rate: Spearman {rest}: {_verdict(rest, 'it')}")
    return [*lines, chance(2 * len(PROBES) * len(MEASURES))]


def _balanced(results: Mapping[str, Any]) -> dict[str, Any]:
    """Keep only the seeds that every cell has: a seed determines the targets, and so the size of the loss.

    Raises:
        ValueError: No seed was finished in all cells.
    """
    seeds: dict[str, set[str]] = {}
    for key in results:
        cell, _, seed = key.rpartition("/")
        seeds.setdefault(cell, set()).add(seed)
    common = set.intersection(*seeds.values())
    if not common:
        raise ValueError(
            f"--output: no seed was finished in all cells ({', '.join(seeds)}), so the cells cannot be compared; "
            "remove the failed results from the file and run the study again"
        )
    return {key: result for key, result in results.items() if key.rpartition("/")[2] in common}


def _verdict(found: Correlation, error: str) -> str:
    if not found.low * found.high > 0:
        return "not resolved at this scale"
    return f"the higher it is, the {'lower' if found.value < 0 else 'higher'} {error}"


def _less_group_means(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    """Subtract from each value the mean of its group's finite values; NaN if the group has only one finite value."""
    left = []
    for value, group in zip(values, groups, strict=True):
        others = [other for other, its in zip(values, groups, strict=True) if its == group and math.isfinite(other)]
        left.append(value - statistics.fmean(others) if len(others) > 1 else math.nan)
    return left


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Write a CSV file with the measures and errors of each run in a row."""
    columns = {
        **{f"{what}, {layer}": (what, layer) for what in MEASURES[1:] for layer in ("middle", "last")},
        "held_out_loss": ("held_out_loss", "last"),
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mask", "learning rate", "seed", *(f"{name}, at a quarter" for name in columns), *PROBES])
        for key, result in results.items():
            values = [measure(result, what, layer) for what, layer in columns.values()]
            values += [result["probes"][name] for name in PROBES]
            writer.writerow([*key.split("/"), *(f"{value:.6g}" for value in values)])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot errors at the end over measures at a quarter, with a colour per masking and a marker per learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(MEASURES), 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(PROBES), len(MEASURES), squeeze=False)
    markers = dict(zip((f"{rate:g}" for rate in LEARNING_RATES), "vo^", strict=True))
    for axes_row, name in zip(grid, PROBES, strict=True):
        for axes, what in zip(axes_row, MEASURES, strict=True):
            layer = LAYER_OF[name]
            for index, mask in enumerate(MASKS):
                for rate, marker in markers.items():
                    some = [result for key, result in results.items() if key.startswith(f"{mask}/{rate}/")]
                    x = [measure(result, what, layer) for result in some]
                    y = [100 * result["probes"][name] for result in some]
                    axes.scatter(x, y, color=f"C{index}", marker=marker, label=f"{mask}, {rate}")
            axes.set_xlabel(what if what == "held_out_loss" else f"{what}, {layer} layer")
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel(f"{name} at the end, %")
    grid[0][-1].legend(fontsize=6)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
