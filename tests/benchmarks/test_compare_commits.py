"""The comparison of times with another commit: its arithmetic, its turns, and that a slower tree is caught."""

import json
from pathlib import Path

import pytest

from benchmarks import compare_commits, one_tree, turns
from benchmarks.bits.trees import ROOT
from benchmarks.compare_commits import choose, judge
from benchmarks.turns import Pair, Ratio, Result, quietest, ratio, take_pairs


def result(low: float, high: float) -> Result:
    found = Ratio((low + high) / 2, low, high)
    return Result("fastssl", "a processor", 1.0, 1.0, found, found, pairs=8, quiet_pairs=8, calls_per_turn=1)


@pytest.mark.parametrize(("count", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (20, 6, 15), (40, 14, 27)])
def test_the_interval_is_that_of_the_sign_test(count: int, low: int, high: int) -> None:
    """Ranks as in tables of distribution-free intervals of a median."""
    assert ratio([float(i) for i in range(count, 0, -1)]) == Ratio((count + 1) / 2, low, high)


def test_an_interval_needs_six_ratios() -> None:
    with pytest.raises(ValueError, match="needs at least 6 ratios, got 5"):
        ratio([1.0] * 5)


class FakeSide:
    """Answers turns from a list of what others used, in cores."""

    def __init__(self, name: str, others: list[float], order: list[str]) -> None:
        self.name, self.others, self.order = name, others, order

    def __call__(self, calls: int) -> tuple[float, float, float]:
        self.order.append(self.name)
        return float(len(self.order)), 2.0 * calls, self.others.pop(0)


def test_turns_alternate_and_end_when_enough_pairs_were_quiet() -> None:
    order: list[str] = []
    before, after = (FakeSide(name, [0.0] * 9, order) for name in ("before", "after"))
    pairs = take_pairs(before, after, calls=3, wanted=3, most=6)
    assert order == ["before", "after", "after", "before", "before", "after"]
    assert [(pair.before_s, pair.after_s, pair.after_cpu_s) for pair in pairs] == [(1, 2, 6), (4, 3, 6), (5, 6, 6)]


def test_where_others_disturb_more_pairs_are_taken_and_the_quietest_count() -> None:
    order: list[str] = []
    before = FakeSide("before", [0.0, 0.5, 0.9, 0.3], order)
    after = FakeSide("after", [0.4, 0.0, 0.1, 0.2], order)
    pairs = take_pairs(before, after, calls=1, wanted=2, most=4)
    assert len(order) == 8
    assert [pair.others for pair in pairs] == [0.3, 0.4]
    assert not any(pair.quiet for pair in pairs)
    assert quietest([Pair(1, 1, 1, 1, 0.04), Pair(2, 2, 2, 2, 0.0)], 1)[0].before_s == 2


def test_a_row_that_one_tree_lacks_is_named() -> None:
    usual, other = one_tree.MODULES[0], one_tree.MODULES[-1]
    before = {"a": usual, "gone": usual, "x-1": other}
    after = {"a": usual, "new": usual, "x-1": other, "x-2": other}
    assert choose(before, after, []) == (["a"], ["new: only after has it", "gone: only before has it"])
    assert choose(before, after, ["x-*", "a"]) == (["x-1", "a"], ["x-2: only after has it"])
    with pytest.raises(ValueError, match=r"--only y: no row has this name; there are a, gone, new, x-1, x-2"):
        choose(before, after, ["y"])


def test_the_last_measurement_judges() -> None:
    assert judge(result(0.9, 1.02), None) == ""
    assert judge(result(0.99, 1.05), None) == "not settled"
    assert judge(result(1.04, 1.06), result(0.98, 1.01)) == ""
    assert judge(result(1.04, 1.06), result(1.035, 1.05)) == "SLOWER"


def test_files_of_another_tree_are_found(tmp_path: Path) -> None:
    assert one_tree.foreign_files(ROOT) == []
    assert str(ROOT / "benchmarks" / "one_tree.py") in one_tree.foreign_files(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "5"], "--rounds: expected at least 6, got 5"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        ([], "no-such-commit: "),
    ],
)
def test_arguments_are_checked(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_commits.main(["no-such-commit", *arguments])
    assert message in capsys.readouterr().err


def make_tree(folder: Path, naps_s: dict[str, float]) -> Path:
    """A checkout whose rows take these times by a clock of its own, and whose rivals take longer."""
    for package in ("fastssl", "benchmarks"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "benchmarks" / "harness.py").write_text("compare = None\n")
    (folder / "benchmarks" / "all.py").write_text(
        "import time\n"
        "from functools import partial\n"
        "from types import SimpleNamespace\n"
        "from benchmarks.harness import compare\n"
        "clock_s = [0.0]\n"
        "time.perf_counter = time.process_time = lambda: clock_s[0]\n"
        "def sleep(nap_s):\n"
        "    clock_s[0] += nap_s\n"
        "def row(nap_s, device):\n"
        "    assert str(device) == 'cpu'\n"
        "    names = {'a rival': 9.0, 'fastssl, native': nap_s, 'fastssl, reference': 9.0}\n"
        "    present = [(name, partial(sleep, s), dict) for name, s in names.items()]\n"
        "    print('not an answer')\n"
        "    return compare('title', SimpleNamespace(present=present), tolerance=0.0)\n"
        f"ROWS = {{name: partial(row, nap_s) for name, nap_s in {naps_s}.items()}}\n"
    )
    return folder


def test_a_slower_tree_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = make_tree(tmp_path / "before", {"nap": 0.01, "gone": 0.01})
    monkeypatch.setattr(compare_commits, "ROOT", make_tree(tmp_path / "after", {"nap": 0.03}))
    # The rows need nothing of torch, and each of the ten processes would take a second to import it.
    (tmp_path / "torch.py").write_text("device, set_num_threads, manual_seed = str, int, int\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = tmp_path / "result.json"
    assert compare_commits.main([str(before), "--rounds", "6", "--output", str(output)]) == 1
    printed = capsys.readouterr().out
    assert "gone: only before has it" in printed
    assert next(line for line in printed.splitlines() if line.startswith("| nap |")).endswith("| SLOWER |")
    report = json.loads(output.read_text())
    assert report["lacking"] == ["gone: only before has it"]
    row = report["rows"]["nap"]
    assert row["first"]["contender"] == "fastssl, native"
    assert row["first"]["time"]["median"] == pytest.approx(3)
    assert row["again"]["cpu_time"]["low"] == pytest.approx(3)
    assert (row["first"]["pairs"], row["again"]["pairs"], row["first"]["calls_per_turn"]) == (6, 18, 5)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"nap": 0.01})
    (tree / "benchmarks" / "all.py").write_text("import no_such_module\n")
    comparison = turns.Comparison(tree, tree, tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"before: exit status 1\n(.|\n)*No module named 'no_such_module'"):
        comparison.rows()
