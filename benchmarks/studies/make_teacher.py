"""The teacher of the studies on distillation: pre-trained once, and better than log-mel before anybody learns from it.

    python -m benchmarks.studies.make_teacher CORPORA --runs RUNS --output teacher.json [--audio voices_train]

A wav2vec 2.0 encoder of six layers of 192, 3,000 updates, probed frozen for digits by CTC on speakers that the head has
not learned from, six times over, beside log-mel. The run is RUNS/teacher; `teacher.json` beside it says what was found,
and the studies refuse a teacher without.
"""

import json
from pathlib import Path
from typing import Any

import fastssl
from benchmarks.studies.compare_systems import CURVE, PROBES
from benchmarks.studies.findings import Spread, compare
from benchmarks.studies.pretraining_runs import Job, StudyFile, corpora_parser, train, what_decides
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
    parser.add_argument("--audio", default="voices_train", help="the folder of CORPORA that it learns from")
    arguments = parser.parse_args()
    corpora: Path = arguments.corpora
    names = ("updates", "layers", "probe_steps", "audio", "precision")
    settings = {name: getattr(arguments, name) for name in names}
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
    trained = train(Job(_NAME, corpora / arguments.audio, "wav2vec2-tiny", options), arguments.runs)
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
