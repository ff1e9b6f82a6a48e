"""Study of Match to Win (arXiv:2209.15575): how short may the sequences for pre-training be?

    python -m benchmarks.studies.crop_length CORPORA --sounds ESC10 --runs RUNS --output crop_length.json [--full]

wav2vec2-tiny learns from crops of 1, 2 and 5 s (`--data.crop_s`) and from whole utterances; an utterance shorter than
the crop is taken whole. The number of updates is the same everywhere. Two protocols differ in the size of an update:

- Protocol A: about 48 s of audio per update, so that all runs see about the same audio. Shorter crops then mean more
  utterances. Batches are filled only with utterances that fit, and the last batch of an epoch is smaller. For each
  crop, `--data.max_duration_s` is therefore set so that the mean comes nearest to 48 s.
- Protocol B: four utterances per update (fewer in the last update of an epoch), so that audio and cost grow with the
  crop. The paper reports savings of this kind.

Every encoder is scored on the same held-out crops. It is then frozen, and probed for digits by CTC on whole utterances,
and for the voice in 1 s, in 5 s and in whole utterances. With --sounds, the study is repeated on environmental sounds,
with crops of 1 and 2 s and whole sounds (5 s). The probe is then the class of the sound, in 1 s and in whole sounds.

ESC10 is a folder of files `{class}_{fold}-{clip}-{take}.ogg`. Folds 1 to 3 are used for pre-training; the probe is
trained on folds 1 and 2, tuned on fold 3 and tested on fold 4. Digital silence that pads clips to 5 s is removed, but
at least 1 s of each clip is kept.
"""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from benchmarks.studies.checkpoint_scores import held_out_scores, open_checkpoint
from benchmarks.studies.findings import Spread, chance, compare
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
from fastssl.data.batches import UpdateSampler
from fastssl.data.corpus import open_corpus

COSTS = ("updates", "audio_hours", "training_s", "cpu_s", "peak_mb", "mean_crop_s")
#: Mean audio per update in protocol A (s), and number of utterances per update in protocol B.
AUDIO_S, UTTERANCES = 48.0, 4
SPEECH_PROBES = {
    "digit error": Probe("test", "digits"),
    "voice error, 1 s": Probe("voices_test", "voice", segment_s=1.0),
    "voice error, 5 s": Probe("voices_test", "voice", segment_s=5.0),
    "voice error, whole": Probe("voices_test", "voice"),
}
SOUND_PROBES = {
    "class error, 1 s": Probe("test", "class", segment_s=1.0),
    "class error, whole": Probe("test", "class"),
}


class Size(NamedTuple):
    """Scale of the study."""

    updates: int
    seeds: int
    probe_steps: int


DEFAULT, FULL = Size(updates=250, seeds=1, probe_steps=300), Size(updates=800, seeds=3, probe_steps=500)


class Domain(NamedTuple):
    """The recordings and probes of one part of the study: speech, or environmental sounds.

    Args:
        audio: Folder of recordings for pre-training.
        held_out: Folder of recordings for scoring.
        corpora: Folder of the probes' corpora.
        probes: Probes by name.
        crops: Crop lengths in seconds; None for whole utterances.
    """

    audio: Path
    held_out: Path
    corpora: Path
    probes: Mapping[str, Probe]
    crops: tuple[float | None, ...]


def audio_limits(domain: Domain, *, updates: int) -> dict[float | None, float]:
    """Find, for each crop, the `data.max_duration_s` that brings the mean audio per update nearest to `AUDIO_S`.

    For example, a limit of 48 s gives a mean of 40 s with whole utterances, and of 46 s with crops of 2 s.

    Args:
        domain: Domain with audio and crops.
        updates: Number of updates to average over.

    Returns:
        Limits in whole seconds, by crop.
    """
    cuts = open_corpus(domain.audio, min_duration_s=1.0).cuts

    def mean(crop_s: float | None, limit_s: float) -> float:
        specs = UpdateSampler(cuts, max_duration_s=limit_s, crop_s=crop_s, seed=0)
        return statistics.fmean(spec.duration_s for spec in islice(specs, updates))

    limits = [AUDIO_S + more for more in range(17)]
    return {crop_s: min(limits, key=lambda limit_s: abs(mean(crop_s, limit_s) - AUDIO_S)) for crop_s in domain.crops}


def jobs(
    name: str, domain: Domain, size: Size, limits: Mapping[float | None, float], *, precision: str
) -> dict[str, Job]:
    """Return the runs by their key `domain/protocol/crop/seed`, with limits from `audio_limits`."""
    found = {}
    for seed in range(size.seeds):
        for crop_s in domain.crops:
            for protocol in "AB":
                key = f"{name}/{protocol}/{_crop_name(crop_s)}/{seed}"
                limit = {"data.max_utterances": UTTERANCES, "data.max_duration_s": 1000} if protocol == "B" else {}
                options = {
                    "data.crop_s": crop_s,
                    "data.max_duration_s": limits[crop_s],
                    "data.min_duration_s": 1.0,
                    # Hold out nothing: the study scores all runs afterwards on the same crops.
                    "data.valid": 0,
                    "trainer.max_steps": size.updates,
                    "trainer.precision": precision,
                    "trainer.checkpoint_every": 100,
                    "trainer.log_every": 50,
                    "trainer.progress": "false",
                } | limit
                found[key] = Job(key.replace("/", "-"), domain.audio, "wav2vec2-tiny", options, seed)
    return found


def _crop_name(crop_s: float | None) -> str:
    return "whole" if crop_s is None else f"{crop_s:g}s"


def evaluate(domain: Domain, size: Size, key: str, trained: Trained) -> dict[str, Any]:
    """Score and probe a finished run, and return its costs, scores and errors."""
    scores = probe(trained.run, domain.corpora, domain.probes, steps=size.probe_steps)
    held_out = held_out_scores(open_checkpoint(trained.run), domain.held_out, crop_s=5.0, draws=4)
    costs = {cost: getattr(trained, cost) for cost in COSTS}
    return {**costs, "held_out": held_out, "probes": scores}


def main() -> None:
    """Do the missing runs, probe them, and write findings, a table and a figure."""
    parser = corpora_parser(__doc__ or "")
    parser.add_argument("--sounds", type=Path, metavar="ESC10", help="folder of environmental sounds to study as well")
    parser.add_argument("--full", action="store_true", help=f"{FULL.seeds} seeds of {FULL.updates} updates (hours)")
    arguments = parser.parse_args()
    size = FULL if arguments.full else DEFAULT
    decides = what_decides(arguments.corpora, ["train", "dev", "test", "voices_train", "voices_dev", "voices_test"])
    speech = arguments.corpora
    domains = {"speech": Domain(speech / "train", speech / "dev", speech, SPEECH_PROBES, (1.0, 2.0, 5.0, None))}
    if arguments.sounds is not None:
        sounds = parts_of_sounds(arguments.sounds, arguments.runs / "sounds")
        domains["sound"] = Domain(sounds / "pretrain", sounds / "test", sounds, SOUND_PROBES, (1.0, 2.0, None))
        decides["sounds"] = what_decides(sounds, ["pretrain", "train", "dev", "test"])["tables"]
    settings = {"study": "crop_length", **size._asdict(), "precision": arguments.precision, **decides}
    study = StudyFile(arguments.output, settings)
    for name, domain in domains.items():
        evaluated = partial(evaluate, domain, size)
        limits = audio_limits(domain, updates=200)
        to_do = jobs(name, domain, size, limits, precision=arguments.precision)
        do_all(study, to_do, arguments.runs, evaluated, parallel=arguments.parallel)
    results, failed = finished(study.results)
    study.conclude(failed + findings(results))
    write_csv(results, arguments.output.with_suffix(".csv"))
    draw(results, arguments.output.with_suffix(".png"))
    for line in study.content["findings"]:
        print(line)


def parts_of_sounds(folder: Path, output: Path) -> Path:
    """Divide ESC-10 into `pretrain` (folds 1 to 3), `train` (1 and 2), `dev` (3) and `test` (4), with tables.

    Args:
        folder: Folder with files `{class}_{fold}-{clip}-{take}.ogg`.
        output: Folder to write the parts to, without the digital silence at the start and end of the sounds.

    Returns:
        `output`.

    Raises:
        ValueError: A part has no files.
    """
    parts: dict[str, tuple[str, ...]] = {
        "pretrain": ("1", "2", "3"),
        "train": ("1", "2"),
        "dev": ("3",),
        "test": ("4",),
    }
    sounds = {path: path.stem.rpartition("_") for path in sorted(folder.glob("*_?-*.ogg"))}
    for part, folds in parts.items():
        chosen = {path: name for path, (name, _, rest) in sounds.items() if rest.partition("-")[0] in folds}
        if not chosen:
            raise ValueError(
                f"--sounds: {folder} has no sound of fold {' or '.join(folds)}; expected files CLASS_FOLD-CLIP-TAKE.ogg"
            )
        (output / part).mkdir(parents=True, exist_ok=True)
        for path in chosen:
            sound = output / part / f"{path.stem}.flac"
            if not sound.exists():
                partial = sound.with_suffix(".tmp")
                samples, rate_hz = soundfile.read(path, dtype="float32")
                soundfile.write(partial, _without_silence(samples, least=rate_hz), rate_hz, format="FLAC")
                partial.replace(sound)
        rows = "".join(f"{path.stem}.flac\t{name}\n" for path, name in chosen.items())
        (output / part / "utterances.tsv").write_text(f"path\tclass\n{rows}")
    return output


def _without_silence(samples: NDArray[np.float32], *, least: int) -> NDArray[np.float32]:
    """Cut silence at both ends (ESC-50 pads clips with zeros), but keep at least `least` samples."""
    loud = np.flatnonzero(np.abs(samples.reshape(len(samples), -1)).max(1) > 1e-4)
    if not len(loud):
        return samples[:least]
    first = max(0, min(int(loud[0]), len(samples) - least))
    return samples[first : max(int(loud[-1]) + 1, first + least)]


def groups(results: Mapping[str, Any]) -> dict[tuple[str, str, str], list[Any]]:
    """Group the results of all seeds by domain, protocol and crop, with the shortest crop first."""
    grouped: dict[tuple[str, str, str], list[Any]] = {}
    # Sort the results: parallel runs end in any order.
    for key, result in sorted(results.items(), key=lambda item: (item[1]["mean_crop_s"], item[0])):
        domain, protocol, crop, _ = key.split("/")
        grouped.setdefault((domain, protocol, crop), []).append(result)
    return grouped


def findings(results: Mapping[str, Any]) -> list[str]:
    """Compare every crop with whole utterances, in each protocol and probe, and say what it saves."""
    grouped = groups(results)
    lines: list[str] = []
    tests = 0
    for domain, protocol in sorted({key[:2] for key in grouped}):
        if (domain, protocol, "whole") not in grouped:
            lines.append(f"{domain}, protocol {protocol}: no run on whole recordings to compare with")
            continue
        whole = grouped[domain, protocol, "whole"]
        for name in whole[0]["probes"]:
            by_crop = {
                crop: Spread([result["probes"][name] for result in grouped[domain, protocol, crop]])
                for other, letter, crop in grouped
                if (other, letter) == (domain, protocol)
            }
            tests += sum(len(s.values) > 1 < len(whole) for c, s in by_crop.items() if c != "whole")
            lines += [
                f"{domain}, protocol {protocol}, {name}: " + compare(crop, spread, "whole", by_crop["whole"])
                for crop, spread in by_crop.items()
                if crop != "whole"
            ]
        for crop in (
            crop for other, letter, crop in grouped if (other, letter) == (domain, protocol) and crop != "whole"
        ):
            shares = ", ".join(
                f"{_share(grouped[domain, protocol, crop], whole, cost)} of the {text}"
                for cost, (text, _) in _COSTS.items()
            )
            lines.append(f"{domain}, protocol {protocol}: crops of {crop} take {shares} of whole recordings")
    return lines if tests == 0 else [*lines, chance(tests)]


#: Names of the costs in findings and in the figure.
_COSTS = {
    "audio_hours": ("audio", "hours of audio"),
    "training_s": ("time in updates", "s in updates"),
    "cpu_s": ("processor time", "processor s"),
    "peak_mb": ("peak memory", "peak MB"),
}


def _share(results: Sequence[Mapping[str, float]], whole: Sequence[Mapping[str, float]], cost: str) -> str:
    """Return the ratio of mean costs, and its range over pairs of runs, because times depend on other load."""
    of = [result[cost] for result in results], [result[cost] for result in whole]
    ratio = statistics.fmean(of[0]) / statistics.fmean(of[1])
    return f"{ratio:.2f} ({min(of[0]) / max(of[1]):.2f} to {max(of[0]) / min(of[1]):.2f})"


def _mean(results: Iterable[Mapping[str, float]], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Write a CSV file with costs, scores and errors of each run in a row."""
    names = sorted({name for result in results.values() for name in result["probes"]})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["domain", "protocol", "crop", "seed", *COSTS, "held_out_loss", "held_out_accuracy", *names])
        for key, result in results.items():
            values = [result[cost] for cost in COSTS]
            values += [result["held_out"]["contrastive_loss"], result["held_out"]["accuracy"]]
            values += [result["probes"].get(name, "") for name in names]
            writer.writerow([*key.split("/"), *(f"{value:.6g}" if value != "" else "" for value in values)])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot errors over audio hours, times and peak memory, with a line per protocol and a mark per crop."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grouped = groups(results)
    rows = sorted(
        {
            (domain, name)
            for domain, _, _ in grouped
            for result in results.values()
            for name in result["probes"]
            if name in (SPEECH_PROBES if domain == "speech" else SOUND_PROBES)
        }
    )
    figure = Figure(figsize=(4 * len(_COSTS), 3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(_COSTS), squeeze=False)
    for axes_row, (domain, name) in zip(grid, rows, strict=True):
        for axes, (cost, (_, title)) in zip(axes_row, _COSTS.items(), strict=True):
            for protocol, style in (("A", "o-"), ("B", "s--")):
                points = {
                    crop: (_mean(runs, cost), Spread([run["probes"][name] for run in runs]), _mean(runs, "mean_crop_s"))
                    for (other, letter, crop), runs in grouped.items()
                    if (other, letter) == (domain, protocol)
                }
                x, spread = [point[0] for point in points.values()], [point[1] for point in points.values()]
                heights, bars = [100 * s.mean for s in spread], [100 * s.deviation for s in spread]
                axes.errorbar(x, heights, yerr=bars, fmt=style, capsize=3, label=f"protocol {protocol}")
                for place, height, (_, _, crop_s) in zip(x, heights, points.values(), strict=True):
                    axes.annotate(
                        f"{crop_s:.1f} s", (place, height), textcoords="offset points", xytext=(4, 4), fontsize=7
                    )
            axes.set_xlabel(title)
            axes.set_ylabel(f"{name}, %")
            axes.grid(alpha=0.3)
        axes_row[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
