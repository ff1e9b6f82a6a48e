"""Study of once-for-all compression (arXiv:2211.02332): one student for all frame periods, or one for each?

    python -m benchmarks.studies.once_for_all CORPORA --teacher RUN --runs RUNS --output once_for_all.json [--full]

Students with two layers learn from RUN, the teacher, with prediction heads on whole utterances. The teacher's frames
are kept on disk, and the students use its frozen convolutions. The kinds of students are:

- once-for-all: integrate-and-fire at periods from 20 to 90 ms, drawn for each utterance;
- one period: integrate-and-fire at one of these periods;
- pooling: average pooling by a fixed factor;
- the control: a once-for-all student with trained convolutions.

Integrate-and-fire learns its boundaries from segments of the teacher's middle layer, with a mean length of 90 ms. Each
student is probed at each of its periods, with heads trained at that period: for digits by CTC (with --full, for phones
too) and for thirty voices in 1 s of audio. The study then learns the rate together with a head on digits, at several
prices and from several starts. It probes the student at the learned rate. Finally it times all encoders, which take
turns.
"""

import csv
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastssl
from benchmarks.machine import seconds_of
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
from benchmarks.studies.probes import Probe
from benchmarks.studies.students import DIGITS, probes_at, remember_front_end, student_options
from fastssl.data.audio import read_waveform
from fastssl.data.corpus import open_corpus
from fastssl.data.waveforms import waveform_batch
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.eval.probe.adaptive import Trial, learn_rates
from fastssl.eval.probe.features import EncoderSource, FeatureStore
from fastssl.eval.probe.run import run_probe
from fastssl.models.encoder import Encoder
from fastssl.packing import Packed

#: Frame periods of integrate-and-fire in ms, and the pooling factor for each frame period in ms.
PERIODS_MS = (20.0, 30.0, 45.0, 60.0, 90.0)
POOLED = {40.0: 2, 60.0: 3, 80.0: 4}
ONE_FOR_ALL, FIXED, POOLING, CONTROL = "once-for-all", "one period", "pooling", "once-for-all, trained convolutions"
#: Task on which rates are learned.
ADAPTED = DIGITS
#: Prices of keeping all frames, in nats per digit, and the initial rates from which rates are learned.
PRICES, STARTS = (0.0, 0.1, 1.0), (0.2, 0.5, 0.8)
#: Key of the times in the results; all other keys are of runs.
TIMES = "times"
_TIMED_S, _TURNS = 60.0, 9


class Size(NamedTuple):
    """Scale of the study."""

    updates: int
    seeds: int
    probe_steps: int
    phones: bool


DEFAULT = Size(updates=300, seeds=1, probe_steps=500, phones=False)
FULL = Size(updates=1000, seeds=3, probe_steps=1000, phones=True)


def segments_of(teacher: Path, audio: Path, folder: Path) -> Path:
    """Label segments of the teacher's middle layer, unless they exist; their mean length is the longest period.

    Args:
        teacher: Folder of the teacher's run.
        audio: Recordings to label.
        folder: Folder for the labels.

    Returns:
        `folder`.
    """
    layers = fastssl.load_encoder(teacher).config.num_hidden_layers
    settings = LabelSettings(model=str(teacher.absolute()), layer=layers // 2, segment_ms=PERIODS_MS[-1])
    # Without worker processes: forking is not safe while other threads compute.
    label(audio, folder, settings, num_workers=0)
    return folder


def jobs(corpora: Path, teacher: Path, segments: Path, runs: Path, size: Size, *, precision: str) -> dict[str, Job]:
    """Return the runs by their key `kind/period/seed`; the period is 0 for students with several periods."""
    found = {}
    for seed in range(size.seeds):
        kinds = [(ONE_FOR_ALL, 0.0), *((FIXED, period) for period in PERIODS_MS), *((POOLING, one) for one in POOLED)]
        for kind, period in [*kinds, (CONTROL, 0.0)] if seed == 0 else kinds:
            frames = None if kind == CONTROL else runs / "frames"
            options = student_options(teacher, updates=size.updates, precision=precision, frames=frames)
            if kind == POOLING:
                options |= {"model.compressor": "average", "model.compressor_factor": POOLED[period]}
            else:
                low, high = (period, period) if period else (PERIODS_MS[0], PERIODS_MS[-1])
                options |= {
                    "model.compression_draw": "period",
                    "model.compression_range": [low, high],
                    "data.segments": str(segments.absolute()),
                }
            key = f"{kind}/{period:g}/{seed}"
            name = key.replace(", ", "-").replace(" ", "-").replace("/", "-")
            found[key] = Job(name, corpora / "train", "distil-tiny-ofa", options, seed, command="distill")
    return found


def periods_of(key: str) -> list[float | None]:
    """Return the frame periods in ms at which a run is probed; None means the fixed period of pooling."""
    kind, period, _ = key.split("/")
    if kind == POOLING:
        return [None]
    return [float(period)] if kind == FIXED else list(PERIODS_MS)


def evaluate(corpora: Path, size: Size, key: str, trained: Trained) -> dict[str, Any]:
    """Probe a finished student at each of its periods and at learned rates, and return its costs and results."""
    encoder = _open(trained.run)
    remember_front_end(encoder)
    pooled = float(key.split("/")[1])
    points = {
        str(period): _point(encoder, period, corpora, probes_at(period or pooled, phones=size.phones), size)
        for period in periods_of(key)
    }
    costs = {"training_s": trained.training_s, "cpu_s": trained.cpu_s, "updates": trained.updates}
    adapted = _adapt(encoder, corpora, size) if key.startswith(f"{ONE_FOR_ALL}/") else {}
    return {**costs, "points": points, "adapted": adapted}


def _open(run: Path) -> Encoder:
    encoder = fastssl.load_encoder(run)
    assert isinstance(encoder, Encoder)
    return encoder


def _point(
    encoder: Encoder, period_ms: float | None, corpora: Path, probes: Mapping[str, Probe], size: Size
) -> dict[str, Any]:
    """Probe an encoder at a frame period, and return errors, losses and the period obtained on the test part."""
    compressor = encoder.compressor
    assert compressor is not None
    if period_ms is not None:
        compressor.rate, compressor.frame_period_ms = None, period_ms
    return _probed(encoder, corpora, probes, steps=size.probe_steps)


def _probed(encoder: Encoder, corpora: Path, probes: Mapping[str, Probe], *, steps: int) -> dict[str, Any]:
    features, name = FeatureStore(), "student"
    errors, losses, infeasible = {}, {}, {}
    for task, probe in probes.items():
        tables, settings = probe.tables(corpora), probe.settings(steps=steps, seeds=1)
        (result,) = run_probe({name: encoder}, *tables, settings, features=features, baselines=())
        errors[task], losses[task] = result.mean, result.runs[0].loss
        infeasible[task] = result.runs[0].parts["test"].infeasible
    of_test = features.get(EncoderSource(encoder), probes[ADAPTED].tables(corpora)[2], name=name)
    period_ms = 1000 * of_test.mean_frame_period_s(encoder.config)
    return {"period_ms": period_ms, "errors": errors, "losses": losses, "infeasible": infeasible}


def _adapt(encoder: Encoder, corpora: Path, size: Size) -> dict[str, Any]:
    """For each price, learn rates from all starts, and probe the encoder at the rate learned from the middle start."""
    # Learning rates as for the shortest frames, because the head sees those too.
    probe = probes_at(PERIODS_MS[0], phones=False)[ADAPTED]._replace(share_of_steps=1.0)
    settings = probe.settings(steps=size.probe_steps, seeds=1)
    trials = [Trial(price, start) for price in PRICES for start in STARTS]
    rates = dict(zip(trials, learn_rates(encoder, *probe.tables(corpora)[:2], settings, trials), strict=True))
    found = {}
    assert encoder.compressor is not None
    for price in PRICES:
        of_middle = rates[Trial(price, statistics.median(STARTS))]
        encoder.compressor.rate, encoder.compressor.frame_period_ms = of_middle.rate, None
        of_rate = {ADAPTED: probes_at(of_middle.frame_period_ms, phones=False)[ADAPTED]}
        point = _probed(encoder, corpora, of_rate, steps=size.probe_steps)
        learned = {f"{start:g}": rates[Trial(price, start)]._asdict() for start in STARTS}
        found[f"{price:g}"] = {"learned": learned, "point": point}
    return found


def measure_times(runs: Mapping[str, Path], audio: Path) -> dict[str, dict[str, float]]:
    """Time the encoders of runs at each of their periods; all contenders take turns.

    Args:
        runs: Folders of runs by key.
        audio: Recordings; about a minute of them is encoded as one batch.

    Returns:
        For each run and period, two median times in seconds per hour of audio: "whole" for the whole encoder, and
        "transformer" for everything after its convolutions.
    """
    batch, seconds = _minute(audio)
    calls: dict[str, dict[str, Any]] = {}
    for key, run in runs.items():
        encoder = _open(run).eval()
        with torch.no_grad():
            frames = encoder.extract_features(batch, normalize=False)
        for period in periods_of(key):
            options = {} if period is None else {"frame_period_ms": period}
            calls[f"{key}/{period}"] = {
                "whole": partial(encoder, batch, normalize=False, **options),
                "transformer": partial(_behind_convolutions, encoder, frames, **options),
            }
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name, parts in calls.items()}
    with torch.no_grad():
        for _ in range(_TURNS):
            for name, parts in calls.items():
                for part, call in parts.items():
                    times[name][part].append(seconds_of(call, torch.device("cpu")))
    # Leave out the first turn, which warms up.
    return {
        name: {part: 3600 * statistics.median(found[1:]) / seconds for part, found in parts.items()}
        for name, parts in times.items()
    }


def _behind_convolutions(encoder: Encoder, frames: Packed, **options: float) -> Tensor:
    states: list[Packed] = encoder.encoder(encoder.project(frames, **options).frames)
    return states[-1].values


def _minute(audio: Path) -> tuple[Packed, float]:
    waveforms, seconds = [], 0.0
    for cut in open_corpus(audio, min_duration_s=1.0).cuts:
        waveforms.append(read_waveform(cut))
        seconds += cut.duration
        if seconds >= _TIMED_S:
            break
    return waveform_batch(waveforms, normalize=True), seconds


class Curve(NamedTuple):
    """Results of one kind of student at one period."""

    kind: str
    period: str  # the requested one, in ms
    points: list[dict[str, Any]]  # one per seed
    times: dict[str, float] | None  # times of the first seed


def curves(results: Mapping[str, Any]) -> list[Curve]:
    """Group the results by kind and period, sorted by both."""
    found: dict[tuple[str, float], Curve] = {}
    for key, result in results.items():
        if "points" not in result:
            continue
        kind, fixed, seed = key.split("/")
        for asked, point in result["points"].items():
            period = float(fixed) if asked == "None" else float(asked)
            curve = found.setdefault((kind, period), Curve(kind, f"{period:g}", [], None))
            curve.points.append(point)
            if seed == "0" and TIMES in results:
                found[kind, period] = curve._replace(times=results[TIMES][f"{key}/{asked}"])
    return [found[key] for key in sorted(found)]


def findings(results: Mapping[str, Any]) -> list[str]:
    """Compare once-for-all students with all others, and report times and learned rates."""
    by_name = {(curve.kind, curve.period): curve for curve in curves(results)}
    lines, tests = [], 0
    for kind in (FIXED, POOLING, CONTROL):
        for (other, period), curve in by_name.items():
            if other != kind or (ONE_FOR_ALL, period) not in by_name:
                continue
            for name in curve.points[0]["errors"]:
                spreads = [_errors(one, name) for one in (by_name[ONE_FOR_ALL, period], curve)]
                lines.append(f"{period} ms, {name}: " + compare(ONE_FOR_ALL, spreads[0], kind, spreads[1]))
                tests += min(len(spread.values) for spread in spreads) > 1
    lines += _of_times([curve for curve in by_name.values() if curve.kind == ONE_FOR_ALL])
    lines += _of_rates(results, [curve for curve in by_name.values() if curve.kind == ONE_FOR_ALL])
    return lines if tests == 0 else [*lines, chance(tests)]


def _errors(curve: Curve, name: str) -> Spread:
    return Spread([point["errors"][name] for point in curve.points])


def _of_times(of_all: Sequence[Curve]) -> list[str]:
    times = {curve.period: curve.times for curve in of_all if curve.times is not None}
    if not times:
        return []
    lines = []
    for part in ("whole", "transformer"):
        found = [of_period[part] for of_period in times.values()]
        falls = "falls with the period" if found == sorted(found, reverse=True) else "does not fall throughout"
        shares = ", ".join(
            f"{period} ms {seconds / found[0]:.2f}" for period, seconds in zip(times, found, strict=True)
        )
        lines.append(f"{ONE_FOR_ALL}, time of {'all' if part == 'whole' else 'the ' + part}: {shares}; {falls}")
    return lines


def _of_rates(results: Mapping[str, Any], of_all: Sequence[Curve]) -> list[str]:
    """For each price, report the learned periods, and compare loss plus price with the best point of the curve."""
    adapted = [result["adapted"] for result in results.values() if result.get("adapted")]
    lines = []
    for price in adapted[0] if adapted else ():
        learned = [list(one[price]["learned"].values()) for one in adapted]
        periods = [[one["frame_period_ms"] for one in starts] for starts in learned]
        apart = max(max(starts) - min(starts) for starts in periods)
        found = [_with_price(one[price]["point"], float(price)) for one in adapted]
        best, name = min((statistics.fmean(values), name) for name, values in _curve_with_price(of_all, float(price)))
        spread = statistics.stdev(dict(_curve_with_price(of_all, float(price)))[name]) if len(adapted) > 1 else None
        mean = statistics.fmean(found)
        within = "one seed" if spread is None else "within" if mean <= best + spread else "not within"
        lines.append(
            f"price {price}: learned {statistics.fmean(map(statistics.fmean, periods)):.1f} ms, at most {apart:.1f} ms "
            f"apart between starts; loss plus price {mean:.3f}, the best of the curve {best:.3f} at {name} ms"
            + (f" ({within} one deviation, {spread:.3f})" if spread is not None else f" ({within})")
        )
    return lines


def _with_price(point: Mapping[str, Any], price: float) -> float:
    return float(point["losses"][ADAPTED]) + price * PERIODS_MS[0] / float(point["period_ms"])


def _curve_with_price(of_all: Sequence[Curve], price: float) -> Iterator[tuple[str, list[float]]]:
    for curve in of_all:
        # Leave out points with targets that CTC cannot emit, because their loss does not include these.
        if not any(point["infeasible"][ADAPTED] for point in curve.points):
            yield curve.period, [_with_price(point, price) for point in curve.points]


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Write a CSV file with a row per run and period."""
    found = curves(results)
    names = sorted({name for curve in found for point in curve.points for name in point["errors"]})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        of_probes = [f"{name}{what}" for name in names for what in ("", ", loss", ", infeasible")]
        times = ["time of all, s/h", "time of the transformer, s/h"]
        writer.writerow(["kind", "period asked, ms", "run", "period obtained, ms", *of_probes, *times])
        for curve in found:
            seconds = ["", ""] if curve.times is None else [f"{value:.6g}" for value in curve.times.values()]
            for run, point in enumerate(curve.points):
                values = [
                    f"{value:.6g}"
                    for name in names
                    for value in (point["errors"][name], point["losses"][name], point["infeasible"][name])
                ]
                writer.writerow([curve.kind, curve.period, run, f"{point['period_ms']:.6g}", *values, *seconds])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot each probe's error over the period obtained and over measured time, and mark the learned periods."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = curves(results)
    names = list(found[0].points[0]["errors"])
    figure = Figure(figsize=(9, 3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(names), 2, squeeze=False)
    styles = {ONE_FOR_ALL: "o-", FIXED: "s", POOLING: "^", CONTROL: "x:"}
    for axes_row, name in zip(grid, names, strict=True):
        for kind, style in styles.items():
            of_kind = sorted((curve for curve in found if curve.kind == kind), key=lambda curve: float(curve.period))
            spreads = [_errors(curve, name) for curve in of_kind]
            heights, bars = [100 * one.mean for one in spreads], [100 * one.deviation for one in spreads]
            periods = [statistics.fmean(point["period_ms"] for point in curve.points) for curve in of_kind]
            seconds = [math.nan if curve.times is None else curve.times["whole"] for curve in of_kind]
            for axes, places in zip(axes_row, (periods, seconds), strict=True):
                axes.errorbar(places, heights, yerr=bars, fmt=style, capsize=3, label=kind)
        if name == ADAPTED:
            for price, period, error in _learned(results):
                axes_row[0].plot(period, 100 * error, "r*", markersize=9)
                axes_row[0].annotate(f"w = {price}", (period, 100 * error), textcoords="offset points", xytext=(4, 4))
        for axes, title in zip(axes_row, ("frame period obtained, ms", "s per hour of audio"), strict=True):
            axes.set_xlabel(title)
            axes.set_ylabel(f"{name}, %")
            axes.grid(alpha=0.3)
        axes_row[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _learned(results: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield each price with the learned period in ms and the error, both averaged over seeds."""
    adapted = [result["adapted"] for result in results.values() if result.get("adapted")]
    for price in adapted[0] if adapted else ():
        points = [one[price]["point"] for one in adapted]
        yield (
            price,
            statistics.fmean(point["period_ms"] for point in points),
            statistics.fmean(point["errors"][ADAPTED] for point in points),
        )


def main() -> None:
    """Do the missing runs, probe and time them, and write findings, a table and a figure."""
    parser = corpora_parser(__doc__ or "")
    parser.add_argument("--teacher", type=Path, required=True, help="run folder of the teacher, from make_teacher")
    parser.add_argument("--full", action="store_true", help=f"{FULL.seeds} seeds of {FULL.updates} updates (hours)")
    arguments = parser.parse_args()
    size = FULL if arguments.full else DEFAULT
    corpora: Path = arguments.corpora
    decides = what_decides(corpora, ["train", "dev", "test", "voices_train", "voices_dev", "voices_test"])
    of_teacher = check_teacher(arguments.teacher)
    settings = {
        "study": "once_for_all",
        **size._asdict(),
        "precision": arguments.precision,
        "teacher": of_teacher,
        "probes": {
            f"{period:g} ms": {name: task._asdict() for name, task in probes_at(period, phones=size.phones).items()}
            for period in PERIODS_MS
        },
    }
    study = StudyFile(arguments.output, {**settings, **decides})
    segments = segments_of(arguments.teacher, corpora / "train", arguments.runs / "segments")
    to_do = jobs(corpora, arguments.teacher, segments, arguments.runs, size, precision=arguments.precision)
    do_all(study, to_do, arguments.runs, partial(evaluate, corpora, size), parallel=arguments.parallel)
    results, failed = finished(study.results)
    if TIMES not in results:
        first = {key: arguments.runs / job.name for key, job in to_do.items() if key in results and key.endswith("/0")}
        study.add(TIMES, measure_times(first, corpora / "test"))
        results[TIMES] = study.results[TIMES]
    study.conclude(failed + findings(results))
    write_csv(results, arguments.output.with_suffix(".csv"))
    draw(results, arguments.output.with_suffix(".png"))
    print("\n".join(study.content["findings"]))


if __name__ == "__main__":
    main()
