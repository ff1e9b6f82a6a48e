"""The teacher of the studies on distillation: pre-trained once, and better than log-mel before anybody learns from it.

    python -m benchmarks.studies.make_teacher CORPORA --runs RUNS --output teacher.json [--labels_of RUN]

A wav2vec 2.0 encoder of six layers of 192, 3,000 updates, probed frozen for digits by CTC on speakers that the head has
not learned from, six times over, beside log-mel. With --labels_of it is a HuBERT that learns the classes of a layer of
that run, of BEST-RQ for example. The run is RUNS/teacher; `teacher.json` in it says what was found, and the studies
refuse a teacher without, or one that is no better than log-mel.
"""

import json
from pathlib import Path
from typing import Any

import fastssl
from benchmarks.studies.compare_systems import CURVE, PROBES
from benchmarks.studies.findings import Spread, compare
from benchmarks.studies.pretraining_runs import Job, StudyFile, corpora_parser, train, what_decides
from fastssl.data.labels import read_settings
from fastssl.train.label import LabelSettings, label
from fastssl.train.probe import LOG_MEL, run_probe

TEACHER_FILE = "teacher.json"
_NAME = "teacher"


def check_teacher(run: Path) -> dict[str, Any]:
    """What was found of a teacher.

    Raises:
        ValueError: Nothing, or that it is no better than log-mel.
    """
    path = run / TEACHER_FILE
    if not path.is_file():
        raise ValueError(f"--teacher: there is no {path}; `python -m benchmarks.studies.make_teacher` makes it")
    found: dict[str, Any] = json.loads(path.read_text())
    if not found["errors"][_NAME] < found["errors"][LOG_MEL]:
        raise ValueError(f"--teacher: {run} is no better than log-mel on held-out speakers: {found['errors']}")
    return found


def main() -> None:
    """Train and probe, or what is left of it."""
    parser = corpora_parser(__doc__ or "")
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--probe_steps", type=int, default=600, help="of each head")
    parser.add_argument("--audio", default="train", help="the folder of CORPORA that it learns from")
    parser.add_argument("--labels_of", type=Path, metavar="RUN", help="a run whose classes a HuBERT is to learn")
    parser.add_argument("--label_layer", type=int, default=3, help="of that run")
    arguments = parser.parse_args()
    corpora: Path = arguments.corpora
    names = ("updates", "layers", "probe_steps", "audio", "precision")
    settings = {name: getattr(arguments, name) for name in names}
    recipe, labels = "wav2vec2-tiny", None
    if arguments.labels_of is not None:
        recipe, labels = "hubert-tiny", arguments.runs / "labels"
        of = LabelSettings(model=str(arguments.labels_of.absolute()), layer=arguments.label_layer, clusters=100)
        # In this process: others cannot be forked safely while threads compute.
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
    task = PROBES[CURVE]
    if _NAME not in study.results:
        encoder = fastssl.load_encoder(trained.run)
        probe_settings = task.settings(steps=arguments.probe_steps, seeds=1)
        for result in run_probe({_NAME: encoder}, *task.tables(corpora), probe_settings, baselines=[LOG_MEL]):
            study.add(result.encoder, {"mean": result.mean, "errors": [run.error for run in result.runs]})
    found = {name: study.results[name] for name in (_NAME, LOG_MEL)}
    spreads = {name: Spread(result["errors"]) for name, result in found.items()}
    study.conclude([f"{CURVE}: " + compare(_NAME, spreads[_NAME], LOG_MEL, spreads[LOG_MEL])])
    errors = {name: result["mean"] for name, result in found.items()}
    (trained.run / TEACHER_FILE).write_text(json.dumps({"task": CURVE, "errors": errors, **settings}, indent=1) + "\n")
    print("\n".join(study.content["findings"]))


if __name__ == "__main__":
    main()
