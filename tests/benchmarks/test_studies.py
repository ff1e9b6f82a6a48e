"""Test the studies: the conclusions that they draw, how they split corpora, and how they resume."""

import csv
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy import stats

from benchmarks.studies import (
    compare_systems,
    crop_length,
    early_prediction,
    pretraining_runs,
)
from benchmarks.studies.checkpoint_scores import held_out_scores, open_checkpoint, quality_at
from benchmarks.studies.findings import Spread, compare, correlate
from benchmarks.studies.pretraining_runs import (
    Job,
    StudyFile,
    Trained,
    corpora_parser,
    do_all,
    finished,
    train,
    what_decides,
)
from fastssl.data.batches import UpdateSampler
from fastssl.data.corpus import open_corpus
from fastssl.metrics import fit_kmeans
from tests.tiny import write_recording


def test_a_difference_is_claimed_above_the_spread_alone() -> None:
    steady, noisy, low = Spread([0.50, 0.51, 0.49]), Spread([0.30, 0.55, 0.44]), Spread([0.40, 0.41, 0.39])
    assert compare("1s", low, "whole", steady).endswith("1s is lower by 10.0 points")
    assert compare("1s", steady, "whole", low).endswith("1s is higher by 10.0 points")
    assert compare("1s", noisy, "whole", steady).endswith("not resolved at this scale")
    assert compare("1s", Spread([0.1]), "whole", Spread([0.9])).endswith("not resolved, one seed")
    assert compare("1s", Spread([0.1] * 3), "whole", Spread([0.11] * 3)).endswith("not resolved at this scale")
    assert compare("1s", Spread([0.1] * 3), "whole", steady).endswith("1s is lower by 40.0 points")
    assert str(low) == "40.0 +- 1.0 %"


def test_correlations_are_scipys_with_an_interval_around_them() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal(20)
    y = (x + 0.3 * random.standard_normal(20)) ** 3
    for rank, measure in ((True, stats.spearmanr), (False, stats.pearsonr)):
        found = correlate(x.tolist(), y.tolist(), rank=rank, draws=300)
        assert found.value == pytest.approx(measure(x, y).statistic)
        assert -1 <= found.low < found.value < found.high <= 1
        assert correlate(x.tolist(), y.tolist(), rank=rank, draws=300) == found
    # Diverged runs (NaN) are left out, and a constant has no correlation.
    assert correlate([*x, math.nan], [*y, 1.0], rank=True, draws=300).value == pytest.approx(
        stats.spearmanr(x, y).statistic
    )
    assert math.isnan(correlate([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], rank=True).value)


def test_sounds_are_divided_by_fold(tmp_path: Path) -> None:
    (tmp_path / "esc").mkdir()
    random = np.random.default_rng(0)
    for fold in range(1, 5):
        samples = np.zeros(5 * 8000, np.float32)
        samples[1000 : 1000 + 6000 * fold] = 0.1 + 0.3 * random.random(6000 * fold)
        soundfile.write(tmp_path / "esc" / f"crackling_fire_{fold}-10{fold}-A.ogg", samples, 8000)
    parts = crop_length.parts_of_sounds(tmp_path / "esc", tmp_path / "parts")
    lines = {
        part: (parts / part / "utterances.tsv").read_text().splitlines()
        for part in ("pretrain", "train", "dev", "test")
    }
    assert {part: len(rows) - 1 for part, rows in lines.items()} == {"pretrain": 3, "train": 2, "dev": 1, "test": 1}
    assert lines["test"] == ["path\tclass", "crackling_fire_4-104-A.flac\tcrackling_fire"]
    # The corpus pads sounds with silence, which carries no class information. It is trimmed to no less than one second.
    for part, name, samples_left in (("test", "4-104-A", 24000), ("dev", "3-103-A", 18000), ("train", "1-101-A", 8000)):
        sound, rate_hz = soundfile.read(parts / part / f"crackling_fire_{name}.flac")
        assert rate_hz == 8000
        assert samples_left <= len(sound) < samples_left + 2000  # Vorbis blurs the edge
    (tmp_path / "esc" / "crackling_fire_4-104-A.ogg").unlink()
    with pytest.raises(ValueError, match="has no sound of fold 4"):
        crop_length.parts_of_sounds(tmp_path / "esc", tmp_path / "parts")


def test_a_study_goes_on_with_its_own_results_only(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    StudyFile(path, {"updates": 3}).add("a", {"error": 0.5})
    assert StudyFile(path, {"updates": 3}).results == {"a": {"error": 0.5}}
    with pytest.raises(ValueError, match="has other settings"):
        StudyFile(path, {"updates": 4})
    with pytest.raises(ValueError, match=r"CORPORA: .* does not exist"):
        what_decides(tmp_path, ["train"])
    (tmp_path / "train").mkdir()
    table = tmp_path / "train" / "utterances.tsv"
    table.write_text("path\tdigits\na.wav\t1\n")
    study = tmp_path / "other.json"
    StudyFile(study, what_decides(tmp_path, ["train"])).add("a", {"error": 0.5})
    assert StudyFile(study, what_decides(tmp_path, ["train"])).results
    table.write_text("path\tdigits\na.wav\t2\n")
    with pytest.raises(ValueError, match="has other settings"):
        StudyFile(study, what_decides(tmp_path, ["train"]))


def _note_process(folder: Path, key: str, trained: Trained) -> dict[str, Any]:
    """Wait until a second evaluation is running, to prove that both run at once."""
    (folder / f"{key}.under_way").touch()
    until = time.monotonic() + 60
    while len(list(folder.glob("*.under_way"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    return {"run": trained.run.name, "process": os.getpid(), "together": len(list(folder.glob("*.under_way"))) == 2}


def _say(message: str, key: str, trained: Trained) -> None:
    raise ValueError(message)


def _trained(job: Job, folder: Path) -> Trained:
    if job.name == "bad":
        raise RuntimeError("bad failed")
    return Trained(folder / job.name, 1, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_runs_are_done_and_evaluated_in_parallel_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining_runs, "train", _trained)
    jobs = {name: Job(f"of {name}", tmp_path, "best-rq-tiny") for name in "abc"}
    study = StudyFile(tmp_path / "study.json", {})
    study.add("b", "there already")
    do_all(study, jobs, tmp_path, partial(_note_process, tmp_path), parallel=3)
    assert study.results["b"] == "there already"
    a, c = study.results["a"], study.results["c"]
    assert (a["run"], c["run"]) == ("of a", "of c")
    assert a["together"]
    assert len({a["process"], c["process"], os.getpid()}) == 3
    assert corpora_parser("").parse_args(["c", "--runs", "r", "--output", "o.json"]).parallel == 1
    with pytest.raises(RuntimeError, match="bad failed"):
        do_all(study, {"x": Job("bad", tmp_path, "")}, tmp_path, partial(_note_process, tmp_path), parallel=2)


@pytest.mark.slow
def test_a_run_is_done_once_and_resumed(tmp_path: Path) -> None:
    for index in range(6):
        write_recording(tmp_path / "audio" / f"{index}.wav", 2.0 + index / 4, seed=index)
    options = {"data.max_duration_s": 6, "data.crop_s": 1.5, "data.valid": 0, "trainer.max_steps": 3}
    options |= {"data.max_utterances": 2, "trainer.log_every": 2, "trainer.checkpoint_every": 1}
    options |= {"trainer.keep_every": 1}
    job = Job("one", tmp_path / "audio", "best-rq-tiny", options)
    held = np.ones(400_000_000)  # memory of the study, which must not count as the run's
    trained = train(job, tmp_path / "runs")
    assert trained.peak_mb < 2000 < held.nbytes / 2**20
    assert trained.updates == 3
    assert trained.mean_crop_s == pytest.approx(1.5)
    assert trained.audio_hours == pytest.approx(3 * 2 * 1.5 / 3600)
    assert trained.training_s > 0
    assert trained.cpu_s > 1
    assert trained.peak_mb > 100
    log = tmp_path / "runs" / "one.log"
    before = log.read_text()
    assert train(job, tmp_path / "runs") == trained
    assert log.read_text() == before
    audio = tmp_path / "audio"
    second, third = (quality_at(trained.run, update, audio, minutes=0.1) for update in (2, 3))
    assert second["held_out_loss"] != third["held_out_loss"]
    assert [layer["layer"] for layer in second["layers"]] == list(range(5))
    assert second["layers"][-1]["effective_rank"] != third["layers"][-1]["effective_rank"]
    with pytest.raises(ValueError, match="kept no checkpoint of update 5"):
        quality_at(trained.run, 5, audio, minutes=0.1)
    model = open_checkpoint(trained.run)
    once, twice = (held_out_scores(model, audio, draws=draws) for draws in (1, 2))
    assert once["prediction_loss"] != twice["prediction_loss"] == pytest.approx(once["prediction_loss"], rel=0.1)
    # As if the run had been stopped after its second update.
    (trained.run / "trained.json").unlink()
    (trained.run / "checkpoints" / "last.ckpt").unlink()
    shutil.copy(trained.run / "checkpoints" / "0000002.ckpt", trained.run / "checkpoints" / "last.ckpt")
    again = train(job, tmp_path / "runs")
    assert "continuing after update 2" in log.read_text()
    assert (again.updates, again.audio_hours) == (3, trained.audio_hours)
    assert again.cpu_s > trained.cpu_s + 1
    with pytest.raises(RuntimeError, match=r"bad failed with status 1; see .*bad\.log"):
        train(Job("bad", tmp_path / "nowhere", "best-rq-tiny", {}), tmp_path / "runs")


def test_a_run_that_diverges_is_a_result_and_the_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "update 1 of 9\nERROR the loss is nan in update 2; the weights are those before it\n"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nprintf '{said}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    study = StudyFile(tmp_path / "study.json", {})
    do_all(study, {"x/0": Job("bad", tmp_path, "")}, tmp_path / "runs", partial(_say, "not reached"), parallel=1)
    assert StudyFile(study.path, {}).results == {"x/0": {"failed": "bad diverged: the loss is nan in update 2"}}
    there, lines = finished(study.results | {"y/0": {"error": 0.5}})
    assert there == {"y/0": {"error": 0.5}}
    assert lines == ["1 of 2 runs diverged or collapsed and are left out: x/0"]
    assert finished(there)[1] == []
    # Lines that an earlier attempt wrote to the log do not count.
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RuntimeError, match="bad failed with status 1"):
        train(Job("bad", tmp_path, ""), tmp_path / "runs")


def test_what_evaluates_a_run_ends_with_a_study_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        """
import os, time
from pathlib import Path
from benchmarks.studies import pretraining_runs

def evaluate(key, trained):
    Path("pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    pretraining_runs._apart(evaluate, "key", None)
"""
    )
    environment = os.environ | {"PYTHONPATH": str(Path(pretraining_runs.__file__).parents[2])}
    study = subprocess.Popen([sys.executable, "endless.py"], cwd=tmp_path, env=environment)
    until = time.monotonic() + 120
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        assert study.poll() is None
        time.sleep(0.1)
    study.kill()
    study.wait()
    evaluating = Path("/proc") / (tmp_path / "pid").read_text()
    while evaluating.exists() and "Z" not in (evaluating / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_run_that_cannot_be_evaluated_for_its_weights_is_a_result_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining_runs, "train", _trained)
    # Evaluate in this process, because a new one takes seconds to start.
    monkeypatch.setattr(pretraining_runs, "_apart", lambda evaluate, key, trained: evaluate(key, trained))
    study = StudyFile(tmp_path / "study.json", {})
    jobs = {"x": Job("x", tmp_path, "")}
    with pytest.raises(ValueError, match="no column"):
        do_all(study, jobs, tmp_path, partial(_say, "no column 'voice'"), parallel=1)
    assert study.results == {}
    # The error message that `fit_kmeans` raises for NaN.
    nothing = torch.full((300, 8), math.nan)
    with pytest.raises(ValueError, match="NaN or infinite") as found:
        fit_kmeans(nothing.numpy(), 2, seed=0)
    do_all(study, jobs, tmp_path, partial(_say, f"layer 2: {found.value}"), parallel=1)
    assert study.results == {"x": {"failed": f"layer 2: {found.value}"}}


def test_a_run_has_one_process_at_a_time_also_after_its_study_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = tmp_path / "times"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho begins >> {times}\nsleep 0.5\necho ends >> {times}\nexit 1\n")
    program.chmod(0o755)
    folder = tmp_path / "runs"
    study = f"""
import sys
from pathlib import Path
from benchmarks.studies import pretraining_runs
sys.executable = {str(program)!r}
pretraining_runs.train(pretraining_runs.Job("one", Path({str(tmp_path)!r}), ""), Path({str(folder)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", study], stdout=subprocess.DEVNULL) as first:
        while not times.is_file():
            time.sleep(0.02)
        first.kill()
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="one failed with status 1"):
        train(Job("one", tmp_path, ""), folder)
    assert times.read_text().split() == ["begins", "ends"] * 2


def test_a_run_that_another_study_does_meanwhile_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    other = Trained(tmp_path / "one", 1, 2.0, 3.0, 4.0, 5.0, 6.0)
    costs = {name: value for name, value in vars(other).items() if name != "run"}
    (tmp_path / "one").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with (tmp_path / "one.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(train, Job("one", tmp_path, ""), tmp_path)
            time.sleep(0.2)
            assert not waiting.done()
            (tmp_path / "one" / "trained.json").write_text(json.dumps(costs))
        assert waiting.result(timeout=10) == other


def test_the_message_of_a_diverged_run_is_the_one_that_is_looked_for() -> None:
    from fastssl.train.module import PretrainModule
    from fastssl.train.results import Unread

    module = PretrainModule.__new__(PretrainModule)
    stands_for = SimpleNamespace(_skipped=1, trainer=SimpleNamespace(world_size=1))
    results = Unread(5, torch.empty(0), {}, [])
    for loss, norm in ((math.nan, 1.0), (2.0, math.inf), (-math.inf, 1.0)):
        assert pretraining_runs._NOT_FINITE.search(type(module)._describe_non_finite(stands_for, results, loss, norm))  # type: ignore[arg-type]


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"audio: {tmp_path}\nseed: 0\nrecipe: best-rq-tiny\ndata: {{crop_s: null, max_duration_s: 48.0, "
        f"valid: {tmp_path / 'dev'}}}\ntrainer: {{max_steps: 250, progress: false}}\n"
    )
    (run / "trained.json").write_text(json.dumps(dict.fromkeys(list(Trained.__dataclass_fields__)[1:], 1)))
    monkeypatch.chdir(tmp_path)
    options = {"data.crop_s": None, "data.max_duration_s": 48, "data.valid": "dev", "trainer.max_steps": 250}
    # These two options do not change the result.
    options |= {"trainer.progress": "true", "trainer.checkpoint_every": 7}
    assert train(Job("one", Path(), "best-rq-tiny", options), tmp_path / "runs").run == run
    for other, said in (
        (Job("one", tmp_path, "best-rq-tiny", options | {"trainer.max_steps": 800}), "max_steps is 250, not 800"),
        (Job("one", tmp_path, "best-rq-tiny", options | {"data.crop_s": 1.0}), "data.crop_s is None, not 1.0"),
        (Job("one", tmp_path / "dev", "best-rq-tiny", options), "audio is"),
        (Job("one", tmp_path, "best-rq-tiny", options, seed=1), "seed is 0, not 1"),
    ):
        with pytest.raises(ValueError, match=f"is a run with other settings: .*{said}"):
            train(other, tmp_path / "runs")


def test_equal_audio_per_update_whatever_the_crop(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    for index in range(40):
        write_recording(audio / f"{index}.wav", 1.0 + index / 2, seed=index)
    domain = crop_length.Domain(audio, audio, audio, {}, (5.0, None))
    limits = crop_length.audio_limits(domain, updates=60)
    cuts = open_corpus(audio, min_duration_s=1.0).cuts
    for crop_s, limit_s in limits.items():
        specs = UpdateSampler(cuts, max_duration_s=limit_s, crop_s=crop_s, seed=1)
        assert np.mean([spec.duration_s for spec in islice(specs, 200)]) == pytest.approx(48, rel=0.06)
    plain = UpdateSampler(cuts, max_duration_s=48, crop_s=None, seed=1)
    assert np.mean([spec.duration_s for spec in islice(plain, 200)]) < 0.9 * 48


def _result(error: float, **more: Any) -> dict[str, Any]:
    costs = {"updates": 10, "audio_hours": 1.0, "training_s": 5.0, "cpu_s": 9.0, "peak_mb": 500.0, "mean_crop_s": 2.0}
    probes = {name: error + index / 100 for index, name in enumerate(crop_length.SPEECH_PROBES)}
    return {**costs, "held_out": {"contrastive_loss": 3.0, "accuracy": 0.2}, "probes": probes, **more}


def test_crop_length_tells_what_it_found(tmp_path: Path) -> None:
    domain = crop_length.Domain(tmp_path, tmp_path, tmp_path, crop_length.SPEECH_PROBES, (1.0, 2.0, 5.0, None))
    limits = {1.0: 51.0, 2.0: 50.0, 5.0: 52.0, None: 57.0}
    jobs = crop_length.jobs("speech", domain, crop_length.FULL, limits, precision="bf16-mixed")
    assert {job.options["trainer.precision"] for job in jobs.values()} == {"bf16-mixed"}
    assert jobs["speech/A/5s/0"].options["data.max_duration_s"] == 52.0
    assert len(jobs) == 2 * 4 * 3
    assert jobs["speech/B/1s/0"].options["data.max_utterances"] == 4
    assert jobs["speech/A/whole/2"].options["data.crop_s"] is None
    results = {
        f"speech/{protocol}/{crop}/{seed}": _result(
            (0.3 if crop == "1s" else 0.5) + seed / 1000, audio_hours=0.1 if protocol == "B" and crop == "1s" else 1.0
        )
        for protocol in "AB"
        for crop in ("1s", "2s", "whole")
        for seed in range(3)
    }
    lines = crop_length.findings(results)
    for index, name in enumerate(crop_length.SPEECH_PROBES):
        (line,) = (line for line in lines if line.startswith(f"speech, protocol A, {name}: 1s"))
        assert f"1s {30.1 + index:.1f} +- 0.1 %" in line
        assert line.endswith("1s is lower by 20.0 points")
    assert any("2s" in line and "not resolved at this scale" in line for line in lines)
    assert any(
        line.startswith("speech, protocol B: crops of 1s take 0.10 (0.10 to 0.10) of the audio") for line in lines
    )
    assert lines[-1].startswith("16 comparisons at the 5 % level: 0.8 would be significant by chance")
    one_seed = {key: result for key, result in results.items() if key.endswith("/0") and "/B/whole" not in key}
    lines = crop_length.findings(one_seed)
    assert "speech, protocol B: no run on whole recordings to compare with" in lines
    assert not any("comparisons" in line for line in lines)
    crop_length.write_csv(results, tmp_path / "study.csv")
    crop_length.draw(results, tmp_path / "study.png")
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 1 + len(results)
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_early_prediction_tells_what_it_found(tmp_path: Path) -> None:
    jobs = early_prediction.jobs(tmp_path, early_prediction.DEFAULT, precision="32-true")
    assert len(jobs) == 4 * 3 + 2
    assert len(early_prediction.jobs(tmp_path, early_prediction.FULL, precision="32-true")) == 4 * 3 * 3
    random = np.random.default_rng(0)
    results: dict[str, dict[str, Any]] = {}
    goodness: dict[str, float] = {}
    for key in jobs:
        good = goodness.setdefault(key.rpartition("/")[0], float(random.random()))
        noise = float(random.random())
        layer: dict[str, Any] = {"effective_rank": 10 + 50 * good, "rankme": noise, "davies_bouldin": None}
        layer["log_inertia_per_frame"] = 1.0
        others = [dict.fromkeys(layer, float(random.random())) for _ in range(4)]
        middle = layer | {"effective_rank": 2 * noise, "rankme": 5 + good}
        results[key] = {
            "quarter": {"held_out_loss": 5.0, "layers": [*others[:2], middle, others[2], layer]},
            "end": {"held_out_loss": -good, "layers": others},
            "probes": {"digit error": 0.9 - 0.5 * good, "voice error": 0.5 + good / 10},
        }
    lines = early_prediction.findings(results)
    assert "over 14 runs; the centre of the grid, 3 seeds" in lines[0]
    rank = next(line for line in lines if line.startswith("effective_rank, last layer") and "digit error" in line)
    assert "12 cells: Spearman -1.00 [-1.00, -1.00]" in rank
    assert rank.endswith("the higher it is, the lower the error")
    (voice,) = (line for line in lines if line.startswith("rankme, middle layer") and "12 cells" in line)
    assert "voice error at the end, 12 cells: Spearman +1.00" in voice
    assert lines[-1].startswith("20 comparisons")
    # More seeds of the same settings do not count as more evidence.
    again = {f"{key}{copy}": result for key, result in results.items() for copy in range(3)}
    assert [line for line in early_prediction.findings(again) if " cells: " in line] == [
        line for line in lines if " cells: " in line
    ]
    assert "not resolved" in next(line for line in lines if line.startswith("rankme, last layer"))
    # A measure that follows from the learning rate alone predicts nothing among runs of one learning rate.
    for key, result in results.items():
        mask, rate, _ = key.split("/")
        number = list(early_prediction.MASKS).index(mask)
        result["quarter"]["held_out_loss"] = float(rate) + 1e-6 * (number % 2)
        result["probes"]["voice error"] = float(rate) + 1e-6 * (number // 2)
    lines = early_prediction.findings(results)
    first, second = (line for line in lines if line.startswith("held_out_loss") and "voice error" in line)
    assert "the higher it is, the higher the error" in first
    assert "less the means of each learning rate" in second
    assert "not resolved" in second
    early_prediction.write_csv(results, tmp_path / "study.csv")
    early_prediction.draw(results, tmp_path / "study.png")
    assert json.dumps(results)


def test_tables_of_systems(tmp_path: Path) -> None:
    names = ("BEST-RQ", "log-mel")
    results: dict[str, Any] = {
        f"probe/{name}/{task}": {"mean": (10 * row + column) / 100, "std": None if column else 0.01}
        for row, name in enumerate(names, 1)
        for column, task in enumerate(compare_systems.PROBES)
    }
    layers = [{name: 100.0 * layer + i for i, name in enumerate(compare_systems.QUALITY.values())} for layer in (1, 2)]
    results["run/BEST-RQ"] = {"updates": 30, "width": 144, "layers": layers}
    lines = compare_systems.table(results)
    assert lines[2] == "| BEST-RQ | 10.0 +- 1.0 | 11.0 | 12.0 | 13.0 | 14.0 | 15.0 |"
    assert lines[3] == "| log-mel | 20.0 +- 1.0 | 21.0 | 22.0 | 23.0 | 24.0 | 25.0 |"
    assert lines[7:] == ["| BEST-RQ | 200 | 201 | 202 | 203 | 204 | 205 | 206 |"]
    on_the_way = {f"curve/BEST-RQ/{update}": {"mean": 1 / update, "std": 0.01} for update in (20, 10)}
    lines = compare_systems.table(results | on_the_way)
    assert lines[9:] == [
        "| digit error, held-out speakers | after updates |",
        "|---|---|",
        "| BEST-RQ | 10: 10.0 +- 1.0, 20: 5.0 +- 1.0, 30: 12.0 |",
    ]
    compare_systems.write_csv(results, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["encoder"], second["encoder"]) == names
    assert (first["updates"], first["width"], first["RankMe, last layer"]) == ("30", "144", "201")
    assert (second["phone error"], second["digit error, deviation"], second["width"]) == ("0.21", "0.01", "")
