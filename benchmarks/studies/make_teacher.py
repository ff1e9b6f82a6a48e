"""Pre-train the teacher of the distillation studies, and check that it is better than log-mel features.

    python -m benchmarks.studies.make_teacher CORPORA --runs RUNS --output teacher.json [--labels_of RUN]

The teacher is a wav2vec 2.0 encoder with six layers of width 192, trained for 3,000 updates. With --labels_of, it is a
HuBERT that learns classes from one layer of another run, for example of BEST-RQ. The frozen teacher is probed for
phones and digits by CTC in six folds, each tested on a speaker that the head has not seen, and compared with log-mel
features. The run is written to RUNS/teacher, and its errors to `teacher.json` there. The studies refuse a teacher
without this file. They also refuse one whose phone error is not lower than that of log-mel, or whose digit error is
significantly higher over the six folds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fastssl
from benchmarks.studies.compare_systems import PROBES
from benchmarks.studies.findings import Spread, compare
from benchmarks.studies.pretraining_runs import Job, StudyFile, corpora_parser, train, what_decides
from fastssl.data.labels import read_settings
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.eval.probe.features import FeatureStore
from fastssl.eval.probe.run import LOG_MEL, run_probe

TEACHER_FILE = "teacher.json"
#: Tasks of `compare_systems`. For encoders of this size, digits show the smallest gain over log-mel.
PHONES, DIGITS = "phone error, held-out speakers", "digit error, held-out speakers"
_NAME = "teacher"


def check_teacher(run: Path) -> dict[str, Any]:
    """Return the errors and settings of a teacher's run from its `teacher.json`.

    Raises:
        ValueError: The file does not exist, or the teacher is not better than log-mel.
    """
    path = run / TEACHER_FILE
    if not path.is_file():
        raise ValueError(f"--teacher: {path} does not exist; `python -m benchmarks.studies.make_teacher` writes it")
    found: dict[str, Any] = json.loads(path.read_text())
    if reason := refused(found["errors"]):
        raise ValueError(f"--teacher: {run} is not better than log-mel ({reason}); train a better teacher")
    return found


def refused(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> str | None:
    """Say why a teacher must be refused, given errors by task, encoder and held-out speaker; None if it is good."""
    for task, of_task in errors.items():
        found, baseline = Spread(of_task[_NAME]), Spread(of_task[LOG_MEL])
        comparison = compare(_NAME, found, LOG_MEL, baseline)
        if (task == PHONES and found.mean >= baseline.mean) or f"{_NAME} is higher" in comparison:
            return f"{task}: {comparison}"
    return None


def main() -> None:
    """Train and probe the teacher, continuing from where an earlier call stopped."""
    parser = corpora_parser(__doc__ or "")
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--probe_steps", type=int, default=600, help="number of optimiser steps of each probe head")
    parser.add_argument("--audio", default="train", help="folder within CORPORA to train on")
    parser.add_argument("--labels_of", type=Path, metavar="RUN", help="train a HuBERT on classes of this run's frames")
    parser.add_argument("--label_layer", type=int, default=3, help="layer of that run to take frames from")
    arguments = parser.parse_args()
    corpora: Path = arguments.corpora
    names = ("updates", "layers", "probe_steps", "audio", "precision")
    settings = {name: getattr(arguments, name) for name in names}
    recipe, labels = "wav2vec2-tiny", None
    if arguments.labels_of is not None:
        recipe, labels = "hubert-tiny", arguments.runs / "labels"
        of = LabelSettings(model=str(arguments.labels_of.absolute()), layer=arguments.label_layer, clusters=100)
        # Without worker processes: forking is not safe while other threads compute.
        label(corpora / arguments.audio, labels, of, num_workers=0)
        settings |= {"labels": read_settings(labels)["weights"], "label_layer": arguments.label_layer}
    study = StudyFile(
        arguments.output,
        {"study": "make_teacher", **settings, **what_decides(corpora, [arguments.audio, "train", "dev", "test"])},
    )
    options = {
        "model.num_hidden_layers": arguments.layers,
        "data.valid": str(corpora / "dev"),
        "trainer.max_steps": arguments.updates,
        "trainer.precision": arguments.precision,
        "trainer.val_check_interval": max(1, arguments.updates // 12),
        "trainer.checkpoint_every": max(1, arguments.updates // 12),
        "trainer.progress": "false",
    }
    if labels is not None:
        options["data.labels"] = str(labels.absolute())
    trained = train(Job(_NAME, corpora / arguments.audio, recipe, options), arguments.runs)
    encoder, features = fastssl.load_encoder(trained.run), FeatureStore()
    for task in (PHONES, DIGITS):
        if task not in study.results:
            probe, models = PROBES[task], {_NAME: encoder}
            head = probe.settings(steps=arguments.probe_steps, seeds=1)
            found = run_probe(models, *probe.tables(corpora), head, features=features, baselines=[LOG_MEL])
            study.add(task, {result.encoder: [run.error for run in result.runs] for result in found})
    errors = study.results
    lines = [
        f"{task}: " + compare(_NAME, Spread(of_task[_NAME]), LOG_MEL, Spread(of_task[LOG_MEL]))
        for task, of_task in errors.items()
    ]
    study.conclude([*lines, f"refused: {reason}" if (reason := refused(errors)) else "better than log-mel"])
    (trained.run / TEACHER_FILE).write_text(json.dumps({"errors": errors, **settings}, indent=1) + "\n")
    print("\n".join(study.content["findings"]))


if __name__ == "__main__":
    main()
