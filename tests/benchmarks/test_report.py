"""Test the benchmarks' report: targets, the JSON file, and the README's tables."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import all as everything
from benchmarks import readme_table, report
from benchmarks.harness import GateError, Measurement, Row
from benchmarks.report import verdict
from benchmarks.targets import TARGETS, Target


def row_of(ours_s: float, rivals_s: dict[str, float], limit_s: float | None = None) -> Row:
    seconds = {"fastssl, native": ours_s, "fastssl, reference": 99.0} | rivals_s
    measurements = {name: Measurement(s, s, s, 3, int(s * 1e6), 0.0) for name, s in seconds.items()}
    return Row("work", 1e-4, measurements, {}, {} if limit_s is None else {"GEMMs": limit_s})


def test_targets_are_judged_against_the_fastest_rival_and_the_limit() -> None:
    rows = {"a": row_of(1.0, {"slow": 5.0, "fast": 2.0}, 0.5)}
    assert verdict(Target("a", "", 2, "", 0.5, 2), rows).met is True
    assert verdict(Target("a", "", 2.1), rows).met is False
    assert verdict(Target("a", "", 2.1, "slow"), rows).met is True
    assert verdict(Target("a", "", memory=0.49), rows).met is False
    assert verdict(Target("a", "", limit=1.9), rows).met is False
    assert "2.00x (fast)" in verdict(Target("a", "", 2), rows).measured
    assert verdict(Target("a", "", 2, "absent"), rows).met is None
    assert verdict(Target("a", "", share=("b", 0.1)), rows).met is None
    assert verdict(Target("a", "", share=("b", 0.1)), rows | {"b": row_of(20.0, {})}).met is True


def test_every_target_has_a_row_and_every_row_a_name() -> None:
    for targets in TARGETS.values():
        assert {target.row for target in targets} <= everything.ROWS.keys()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    rows = {"front-end": lambda device: row_of(1.0, {"theirs": 2.0}, 0.9), "other": lambda device: row_of(1.0, {})}
    report.main(rows, "", by_default={"cpu": ["front-end"]})


def test_main_prints_the_table_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(monkeypatch, "--output", str(tmp_path / "new" / "2026-01-01-here-all-cpu.json"))
    printed = capsys.readouterr().out
    assert "2.00x (theirs)" in printed
    assert "met" in printed
    content = json.loads((tmp_path / "new" / "2026-01-01-here-all-cpu.json").read_text())
    assert content["rows"].keys() == {"front-end"}
    assert content["rows"]["front-end"]["measurements"]["theirs"]["peak_bytes"] == 2_000_000
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content.keys() >= {"machine", "commit", "uncommitted_changes", "command", "targets"}

    text = "before\n<!-- all cpu -->\nold\n<!-- end -->\nafter\n<!-- all cuda -->\n<!-- end -->\n"
    table = readme_table.updated(text, tmp_path / "new")
    assert "old" not in table
    assert "| 1 s | 2 s (theirs) | 2.00 | 1 MB / 2 MB | 1.11 |" in table
    assert "Not measured yet." in table
    assert readme_table.updated(table, tmp_path / "new") == table


def test_a_run_goes_on_where_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    run_main(monkeypatch, "--only", "other", "--output", str(output))
    first = json.loads(output.read_text())
    capsys.readouterr()
    run_main(monkeypatch, "--resume", "--output", str(output))
    assert "other: " not in capsys.readouterr().out  # not measured again
    content = json.loads(output.read_text())
    assert content["rows"].keys() == {"other", "front-end"}
    assert content["rows"]["other"] == first["rows"]["other"]
    output.write_text(json.dumps(first | {"commit": "0123456789"}))
    with pytest.raises(ValueError, match="was measured at commit 0123456"):
        run_main(monkeypatch, "--resume", "--output", str(output))


def test_the_drop_in_table_has_a_line_for_every_architecture(tmp_path: Path) -> None:
    rows = {}
    for work, ours_s in (("forward, equal", 1.0), ("training, equal", 2.0)):
        row = row_of(ours_s, {"original": 3.0})
        row.title = f"wavlm-base, {work}"
        row.measurements["fastssl"] = row.measurements.pop("fastssl, native")
        rows[work] = asdict(row)
    content = {"device": "cpu", "commit": "0" * 40, "machine": {"device": "here", "threads": 2}, "rows": rows}
    content["versions"] = {"torch": "2", "transformers": "5"}
    (tmp_path / "2026-01-01-here-drop-in-cpu.json").write_text(json.dumps(content))
    table = readme_table.updated("<!-- drop-in cpu -->\n<!-- end -->\n", tmp_path)
    assert "| architecture | forward, equal | training, equal |" in table
    assert "| wavlm-base | 1, 3: **3.0**; 3.0 | 2, 3: **1.5**; 1.5 |" in table


def test_only_takes_known_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(monkeypatch, "--only", "other")
    assert "front-end" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--only", "frontend")
    assert "unknown row frontend" in capsys.readouterr().err


def test_the_newest_result_counts(tmp_path: Path) -> None:
    for name in ("2026-01-02-a-all-cpu", "2026-01-10-a-all-cpu", "2026-02-01-a-all-cuda", "2026-03-01-a-study"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    found = readme_table.newest(tmp_path, "all", "cpu")
    assert found is not None
    assert found[0] == "2026-01-10-a-all-cpu.json"


def test_the_readme_quotes_the_newest_results() -> None:
    text = (readme_table.ROOT / "README.md").read_text()
    assert text.count("<!-- all ") == text.count("<!-- drop-in ") == 2
    assert readme_table.updated(text, readme_table.ROOT / "benchmarks" / "results") == text


def test_a_row_is_measured_in_a_process_of_its_own() -> None:
    cpu = torch.device("cpu")
    assert report._apart(lambda device: row_of(float(os.getpid()), {}), cpu).measurements[
        "fastssl, native"
    ].seconds != float(os.getpid())

    def fail(device: torch.device) -> Row:
        raise GateError("rival: out is off")

    def die(device: torch.device) -> Row:
        os._exit(3)

    with pytest.raises(GateError, match="rival: out is off"):
        report._apart(fail, cpu)
    with pytest.raises(RuntimeError, match="exit code 3"):
        report._apart(die, cpu)
