"""Test the distillation and compression studies: which jobs they run, and which findings they print."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.recipes import recipe_model
from benchmarks.studies import deep_or_wide, make_teacher, once_for_all, students
from benchmarks.studies.pretraining_runs import Job, Trained
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.packing import Packed
from tests.models.test_compressed import SHAPE


def _teacher(folder: Path, *, teacher: float, log_mel: float) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {conv_dim: [128, 128, 128, 128, 128, 128, 128]}\n")
    errors = {
        task: {
            "teacher": [teacher, teacher + 0.02, teacher + 0.01],
            "log-mel": [log_mel, log_mel + 0.01, log_mel + 0.02],
        }
        for task in (make_teacher.PHONES, make_teacher.DIGITS)
    }
    (folder / make_teacher.TEACHER_FILE).write_text(json.dumps({"errors": errors}))
    return folder


def test_a_teacher_must_be_better_than_log_mel(tmp_path: Path) -> None:
    assert make_teacher.check_teacher(_teacher(tmp_path / "good", teacher=0.3, log_mel=0.4))["errors"]
    with pytest.raises(ValueError, match=r"bad is not better than log-mel \(phone error, held-out speakers: teacher"):
        make_teacher.check_teacher(_teacher(tmp_path / "bad", teacher=0.4, log_mel=0.4))
    with pytest.raises(ValueError, match=r"teacher\.json does not exist; .*make_teacher"):
        make_teacher.check_teacher(tmp_path)
    # A teacher must make fewer phone errors than log-mel, and must not make significantly more digit errors.
    good = {"teacher": [0.3, 0.5], "log-mel": [0.5, 0.6]}
    even, worse = {"teacher": [0.5, 0.6], "log-mel": [0.5, 0.5]}, {"teacher": [0.7, 0.71], "log-mel": [0.5, 0.51]}
    assert make_teacher.refused({make_teacher.PHONES: good, make_teacher.DIGITS: even}) is None
    reason = make_teacher.refused({make_teacher.PHONES: good, make_teacher.DIGITS: worse})
    assert reason is not None
    assert reason.startswith("digit error, held-out speakers")
    assert make_teacher.refused({make_teacher.PHONES: even, make_teacher.DIGITS: good}) is not None


def test_deep_or_wide_tells_what_it_found(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher", teacher=0.3, log_mel=0.4)
    jobs = deep_or_wide.jobs(tmp_path, teacher, tmp_path / "runs", deep_or_wide.FULL, precision="32-true")
    # Three shapes with two losses and three seeds each, plus one control.
    assert len(jobs) == 3 * 2 * 3 + 1
    for key, job in jobs.items():
        assert job.command == "distill"
        assert (
            ("data.teacher_cache" in job.options) == ("frozen" in key) == (job.options["model.feature_grad_mult"] == 0)
        )
    # Students with the same loss and depth share a teacher cache, whatever their seed.
    caches = {job.options.get("data.teacher_cache") for job in jobs.values()} - {None}
    assert len(caches) == 4
    for shape, (layers, width, heads) in deep_or_wide.SHAPES.items():
        options = jobs[f"{shape}/l2l/frozen/0"].options
        config = DistillationConfig(
            **{name.removeprefix("model."): value for name, value in options.items() if name.startswith("model.")}
            | {"conv_dim": (128,) * 7, "feat_proj_layer_norm": True}  # as in the recipe
        )
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
        with torch.device("meta"):
            named = Encoder(config).named_parameters()
        own = sum(p.numel() for name, p in named if not name.startswith(("feature_extractor", "masked")))
        assert own == {"1 x 192": 765_504, "3 x 128": 743_168, "6 x 96": 757_824}[shape]
    results = {
        key: {
            "training_s": 1.0,
            "cpu_s": 2.0,
            "updates": 3,
            "probes": {"digit error": (0.3 if key.startswith("6") else 0.5) + job.seed / 100, "voice error, 1 s": 0.6},
        }
        for key, job in jobs.items()
    }
    lines = deep_or_wide.findings(results)
    assert any(line.startswith("l2l, digit error: 6 x 96") and "lower by 20.0 points" in line for line in lines)
    assert any(line.startswith("pred, voice error, 1 s: 6 x 96") and "not resolved" in line for line in lines)
    assert any(line.startswith("3 x 128, pred, digit error: trained convolutions") for line in lines)
    assert lines[-1].startswith("12 comparisons")
    # Comparisons whose results are still missing are left out.
    of_two = {key: result for key, result in results.items() if not key.startswith("1 x 192/l2l")}
    assert deep_or_wide.findings(of_two)[-1].startswith("8 comparisons")
    deep_or_wide.draw(of_two, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    deep_or_wide.write_csv(results, tmp_path / "study.csv")
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 1 + len(results)


def _jobs(folder: Path, size: once_for_all.Size) -> dict[str, Job]:
    teacher = _teacher(folder / "teacher", teacher=0.3, log_mel=0.4)
    return once_for_all.jobs(folder, teacher, folder / "segments", folder / "runs", size, precision="32-true")


def test_once_for_all_has_a_student_for_all_periods_and_one_for_each(tmp_path: Path) -> None:
    jobs = _jobs(tmp_path, once_for_all.FULL)
    # Three seeds each of one student for all periods, five for one period and three with pooling, plus one control.
    assert len(jobs) == 3 * (1 + 5 + 3) + 1
    assert len({job.name for job in jobs.values()}) == len(jobs)
    periods, pooled = set(), set()
    for key, job in jobs.items():
        options = {name.removeprefix("model."): value for name, value in job.options.items()}
        assert job.recipe == "distil-tiny-ofa"
        assert (options["feature_grad_mult"] > 0) == ("trained" in key) == ("data.teacher_cache" not in options)
        names = ("compressor", "compressor_factor", "compression_draw", "compression_range")
        changes = {name: options[name] for name in names if name in options}
        preset = recipe_model("distil-tiny-ofa")
        config = DistillationConfig.from_dict({**preset.__dict__, **changes})
        assert ("data.segments" in options) == config.draws_rates
        if config.draws_rates:
            periods.add(config.compression_range)
            low, high = config.compression_range
            asked = once_for_all.periods_of(key)
            assert asked == ([low] if low == high else [20.0, 30.0, 45.0, 60.0, 90.0])
        else:
            pooled.add(config.compressor_factor)
            assert once_for_all.periods_of(key) == [None]
    assert periods == {(20.0, 90.0), *((one, one) for one in (20.0, 30.0, 45.0, 60.0, 90.0))}
    assert pooled == {2, 3, 4}


def test_once_for_all_tells_what_it_found(tmp_path: Path) -> None:
    results: dict[str, Any] = {}
    for key, job in _jobs(tmp_path, once_for_all.FULL).items():
        kind, fixed, _ = key.split("/")
        points = {}
        for period in once_for_all.periods_of(key):
            asked = float(fixed) if period is None else period
            # A student trained for one period beats the others only at the long periods.
            error = 0.2 + asked / 1000 - (0.05 if kind == "one period" and asked > 50 else 0) + job.seed / 1000
            points[str(period)] = {
                "period_ms": asked + 0.5,
                "errors": {"digit error": error, "voice error, 1 s": 0.6},
                "losses": {"digit error": 10 * error, "voice error, 1 s": 1.0},
                "infeasible": {"digit error": 0, "voice error, 1 s": 0},
            }
        adapted = {}
        if kind == "once-for-all":
            for price, period_ms, starts in (("0", 20.5, 0.0), ("1", 45.5, 3.0)):
                learned = {start: {"frame_period_ms": period_ms + starts * i} for i, start in enumerate("abc")}
                losses = {"digit error": 10 * (0.2 + (period_ms - 0.5) / 1000 + job.seed / 1000)}
                point = {"period_ms": period_ms, "errors": {"digit error": 0.3}, "losses": losses}
                adapted[price] = {"learned": learned, "point": point}
        results[key] = {"training_s": 1.0, "cpu_s": 2.0, "updates": 3, "points": points, "adapted": adapted}
    results["times"] = {
        f"{key}/{period}": {"whole": 100.0 - float(period or 0), "transformer": 50.0 if period == 90.0 else 40.0}
        for key in results
        for period in once_for_all.periods_of(key)
    }
    lines = once_for_all.findings(results)
    assert any(line.startswith("60 ms, digit error: once-for-all") and "higher by 5.0 points" in line for line in lines)
    assert any(line.startswith("45 ms, digit error: once-for-all") and "not resolved" in line for line in lines)
    assert sum("pooling" in line for line in lines) == 2  # at 60 ms, the only period that pooling (by 3) has too
    assert (
        "once-for-all, time of all: 20 ms 1.00, 30 ms 0.88, 45 ms 0.69, 60 ms 0.50, 90 ms 0.12; falls with the period"
        in lines
    )
    assert any("time of the transformer" in line and line.endswith("does not fall throughout") for line in lines)
    free, dear = (line for line in lines if line.startswith("price"))
    assert free.startswith("price 0: learned 20.5 ms, at most 0.0 ms apart between starts")
    assert free.endswith("best of the curve 2.210 at 20 ms (within one deviation, 0.010)")
    # Loss plus price at 45 ms is 2.46 + 20 / 45.5; at 30 ms it is 2.31 + 20 / 30.5, at 60 ms 2.61 + 20 / 60.5.
    assert "learned 48.5 ms, at most 6.0 ms apart between starts; loss plus price 2.900" in dear
    assert dear.endswith("the best of the curve 2.900 at 45 ms (within one deviation, 0.010)")
    assert lines[-1] == "12 comparisons at the 5 % level: 0.6 would be significant by chance alone"
    # A point at which some targets do not fit is not a candidate, because its loss leaves them out.
    fewest = copy.deepcopy(results)
    fewest["once-for-all/0/1"]["points"]["20.0"]["infeasible"]["digit error"] = 1
    (free,) = (line for line in once_for_all.findings(fewest) if line.startswith("price 0:"))
    assert "the best of the curve 2.310 at 30 ms" in free
    once_for_all.write_csv(results, tmp_path / "study.csv")
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert len(rows) == 3 * (5 + 5 + 3) + 5
    once_for_all.draw(results, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_a_front_end_that_is_remembered_runs_once_for_each_batch() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**SHAPE, compressor="integrate-and-fire")).eval()
    calls = []
    encoder.feature_extractor.register_forward_hook(lambda *_: calls.append(1))
    one, other = torch.randn(2, 9_000, 1)
    batches = [Packed.pack([one, other]), Packed.pack([one[:5_000], one[5_000:], other]), Packed.pack([other, one])]
    with torch.inference_mode():
        expected = [encoder(batch, rate=0.5).features.values for batch in batches]
        students.remember_front_end(encoder)
        for _ in range(2):
            for batch, values in zip(batches, expected, strict=True):
                assert encoder(batch, rate=0.5).features.values.equal(values)
    assert len(calls) == 2 * len(batches)


def test_once_for_all_probes_a_student_at_every_period(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "dev", "test", "voices_train", "voices_dev", "voices_test"):
        (tmp_path / part).mkdir()
        rows = []
        for index in range(4):
            soundfile.write(tmp_path / part / f"{index}.wav", 0.1 * random.standard_normal(24_000), 16_000)
            rows.append(f"{index}.wav\t{index % 2}{1 - index % 2}\t{index % 2}\n")
        (tmp_path / part / "utterances.tsv").write_text("path\tdigits\tvoice\n" + "".join(rows))
    config = EncoderConfig(**SHAPE, compressor="integrate-and-fire")
    torch.manual_seed(0)
    Encoder(config).save_pretrained(tmp_path / "run")
    trained = Trained(tmp_path / "run", 3, 1.0, 2.0, 3.0, 4.0, 5.0)
    size = once_for_all.Size(updates=3, seeds=1, probe_steps=2, phones=True)
    found = once_for_all.evaluate(tmp_path, size, "once-for-all/0/0", trained)
    assert list(found["points"]) == ["20.0", "30.0", "45.0", "60.0", "90.0"]
    for asked, point in found["points"].items():
        assert point["period_ms"] == pytest.approx(float(asked), rel=0.05)
        assert set(point["errors"]) == set(point["losses"]) == {"digit error", "phone error", "voice error, 1 s"}
    assert list(found["adapted"]) == ["0", "0.1", "1"]
    for of_price in found["adapted"].values():
        starts = {start: learned["path"][0] for start, learned in of_price["learned"].items()}
        assert starts == pytest.approx({"0.2": 0.2, "0.5": 0.5, "0.8": 0.8})
        assert of_price["point"]["period_ms"] == pytest.approx(of_price["learned"]["0.5"]["frame_period_ms"], rel=0.05)
    fixed = once_for_all.evaluate(tmp_path, size, "one period/45/0", trained)
    assert list(fixed["points"]) == ["45.0"]
    assert not fixed["adapted"]
    times = once_for_all.measure_times({"once-for-all/0/0": tmp_path / "run"}, tmp_path / "test")
    assert list(times) == [f"once-for-all/0/0/{period}" for period in found["points"]]
    assert all(0 < of_period["transformer"] < of_period["whole"] for of_period in times.values())
