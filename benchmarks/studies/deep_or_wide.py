"""Study of Deep versus Wide (arXiv:2207.06867): students of equal size, from one wide layer to six narrow ones.

    python -m benchmarks.studies.deep_or_wide CORPORA --teacher RUN --runs RUNS --output deep_or_wide.json [--full]

One student has 1 layer of width 192, one has 3 layers of width 128, and one has 6 layers of width 96. After the
convolutions, they have 765,504, 743,168 and 757,824 parameters. They learn from RUN, the teacher, on whole utterances:
once with prediction heads, once layer to layer. The teacher's frames are kept on disk, and the students use its frozen
convolutions. One student with trained convolutions is the control. Content is probed by digits with CTC (with --full,
by phones too), and speakers by thirty voices in 1 s of audio. The paper finds that content needs depth, and speakers
need width.
"""

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies.findings import Spread, chance, compare
from benchmarks.studies.make_teacher import check_teacher
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
from benchmarks.studies.students import probes_at, student_options

#: For each shape, number of layers, width, number of attention heads.
SHAPES = {"1 x 192": (1, 192, 4), "3 x 128": (3, 128, 4), "6 x 96": (6, 96, 4)}
LOSSES = ("pred", "l2l")
#: Shape and loss of the control, which has trained convolutions and only one seed.
CONTROL = ("3 x 128", "pred")


class Size(NamedTuple):
    """Scale of the study."""

    updates: int
    seeds: int
    probe_steps: int
    phones: bool

    @property
    def probes(self) -> dict[str, Probe]:
        """Probes by name, for frames of 20 ms, because no student compresses."""
        return probes_at(20.0, phones=self.phones)


DEFAULT = Size(updates=400, seeds=1, probe_steps=500, phones=False)
FULL = Size(updates=1000, seeds=3, probe_steps=1000, phones=True)


def jobs(corpora: Path, teacher: Path, runs: Path, size: Size, *, precision: str) -> dict[str, Job]:
    """Return the runs by their key `shape/loss/front end/seed`."""
    found = {}
    for seed in range(size.seeds):
        for name, (layers, width, heads) in SHAPES.items():
            for loss in LOSSES:
                for front_end in ("frozen", "trained") if (name, loss, seed) == (*CONTROL, 0) else ("frozen",):
                    key = f"{name}/{loss}/{front_end}/{seed}"
                    predicted = "pred" if loss == "pred" else f"l2l-{layers}"
                    cache = runs / f"frames-{predicted}" if front_end == "frozen" else None
                    options = student_options(teacher, updates=size.updates, precision=precision, frames=cache) | {
                        "model.num_hidden_layers": layers,
                        "model.hidden_size": width,
                        "model.intermediate_size": 4 * width,
                        "model.num_attention_heads": heads,
                        "model.num_conv_pos_embeddings": 128,
                        "model.num_conv_pos_embedding_groups": 16,
                        "model.distillation": loss,
                    }
                    job_name = key.replace(" ", "").replace("/", "-")
                    found[key] = Job(job_name, corpora / "train", "distil-tiny", options, seed, command="distill")
    return found


def evaluate(corpora: Path, size: Size, key: str, trained: Trained) -> dict[str, Any]:
    """Probe a finished student, and return its costs and errors."""
    errors = probe(trained.run, corpora, size.probes, steps=size.probe_steps)
    return {"training_s": trained.training_s, "cpu_s": trained.cpu_s, "updates": trained.updates, "probes": errors}


def findings(results: Mapping[str, Any]) -> list[str]:
    """Compare deep with wide students for each loss and probe, and the control with its frozen counterpart."""
    lines, tests = [], 0
    wide, middle, deep = SHAPES
    pairs = ((deep, wide), (middle, wide), (deep, middle))
    for loss in LOSSES:
        for name, spreads in spreads_of(results, loss).items():
            for one, other in pairs:
                if {one, other} <= spreads.keys():
                    lines.append(f"{loss}, {name}: " + compare(one, spreads[one], other, spreads[other]))
                    tests += _resolvable(spreads[one], spreads[other])
    shape, loss = CONTROL
    frozen = spreads_of(results, loss)
    for name, spreads in spreads_of(results, loss, front_end="trained").items():
        if shape in frozen.get(name, ()):
            pair = ("trained convolutions", spreads[shape], "frozen", frozen[name][shape])
            lines.append(f"{shape}, {loss}, {name}: " + compare(*pair))
            tests += _resolvable(spreads[shape], frozen[name][shape])
    return lines if tests == 0 else [*lines, chance(tests)]


def spreads_of(results: Mapping[str, Any], loss: str, *, front_end: str = "frozen") -> dict[str, dict[str, Spread]]:
    """Return the errors over seeds by probe and shape, for students with this loss and front end."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, result in results.items():
        shape, of_loss, of_front_end, _ = key.split("/")
        if (of_loss, of_front_end) == (loss, front_end):
            for name, error in result["probes"].items():
                found.setdefault(name, {}).setdefault(shape, []).append(error)
    return {name: {shape: Spread(errors) for shape, errors in of.items()} for name, of in found.items()}


def _resolvable(one: Spread, other: Spread) -> bool:
    return min(len(one.values), len(other.values)) > 1


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Write a CSV file with the costs and errors of each run in a row."""
    names = sorted({name for result in results.values() for name in result["probes"]})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "loss", "front end", "seed", "updates", "training_s", "cpu_s", *names])
        for key, result in results.items():
            costs = [result["updates"], f"{result['training_s']:.6g}", f"{result['cpu_s']:.6g}"]
            writer.writerow([*key.split("/"), *costs, *(f"{result['probes'][name]:.6g}" for name in names)])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot each probe's error from wide to deep, with a line per loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_loss = {loss: spreads_of(results, loss) for loss in LOSSES}
    names = list(dict.fromkeys(name for found in by_loss.values() for name in found))
    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for (loss, found), style in zip(by_loss.items(), ("o-", "s--"), strict=True):
            shapes = [shape for shape in SHAPES if shape in found.get(name, ())]
            places = [list(SHAPES).index(shape) for shape in shapes]
            spreads = [found[name][shape] for shape in shapes]
            heights, bars = [100 * one.mean for one in spreads], [100 * one.deviation for one in spreads]
            axes.errorbar(places, heights, yerr=bars, fmt=style, capsize=3, label=loss)
        axes.set_xticks(range(len(SHAPES)), list(SHAPES))
        axes.set_xlabel("layers x width")
        axes.set_ylabel(f"{name}, %")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Do the missing runs, probe them, and write findings, a table and a figure."""
    parser = corpora_parser(__doc__ or "")
    parser.add_argument("--teacher", type=Path, required=True, help="run folder of the teacher, from make_teacher")
    parser.add_argument("--full", action="store_true", help=f"{FULL.seeds} seeds of {FULL.updates} updates (hours)")
    arguments = parser.parse_args()
    size = FULL if arguments.full else DEFAULT
    decides = what_decides(arguments.corpora, ["train", "dev", "test", "voices_train", "voices_dev", "voices_test"])
    of_teacher = check_teacher(arguments.teacher)
    settings = {
        "study": "deep_or_wide",
        **size._asdict(),
        "precision": arguments.precision,
        "teacher": of_teacher,
        "probes": {name: task._asdict() for name, task in size.probes.items()},
    }
    study = StudyFile(arguments.output, {**settings, **decides})
    to_do = jobs(arguments.corpora, arguments.teacher, arguments.runs, size, precision=arguments.precision)
    do_all(study, to_do, arguments.runs, partial(evaluate, arguments.corpora, size), parallel=arguments.parallel)
    results, failed = finished(study.results)
    study.conclude(failed + findings(results))
    write_csv(results, arguments.output.with_suffix(".csv"))
    draw(results, arguments.output.with_suffix(".png"))
    print("\n".join(study.content["findings"]))


if __name__ == "__main__":
    main()
