"""Test the comparison with another commit: what counts as equal, and that it catches a changed bit."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import same_bits
from benchmarks.bits import trees
from benchmarks.bits.compare import compare, table
from benchmarks.bits.record import Record, Results, load, score, with_gradients
from fastssl import Packed

EPS = torch.finfo(torch.float32).eps


def verdict(before: Results, after: Results, tolerance_eps: float = 0.0) -> tuple[int, int, int]:
    """Return how many results are equal, close and different."""
    groups = compare(before, after, tolerance_eps=tolerance_eps).values()
    close, different = (sum(len(getattr(group, name)) for group in groups) for name in ("close", "different"))
    return sum(group.equal for group in groups), close, different


@pytest.mark.parametrize(
    ("old", "new", "equal"),
    [
        (torch.ones(3), torch.ones(3), True),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True),
        (torch.ones(3), torch.tensor([1.0, 1.0, 1 + EPS]), False),
        (torch.zeros(1), -torch.zeros(1), False),
        (torch.ones(3), torch.ones(3).double(), False),
        (torch.ones(3), torch.ones(1, 3), False),
        (torch.ones(3, dtype=torch.bool), torch.tensor([True, True, False]), False),
        (torch.zeros(0), torch.zeros(0), True),
        ("(3, 4)", "(3, 4)", True),
        ("(3, 4)", "(4, 3)", False),
        ("raises ValueError", torch.ones(3), False),
    ],
)
def test_equal_means_every_bit(old: torch.Tensor | str, new: torch.Tensor | str, equal: bool) -> None:
    assert verdict({"a/b": old}, {"a/b": new}) == (int(equal), 0, int(not equal))


def test_a_missing_result_is_a_difference() -> None:
    assert verdict({"a/b": "1"}, {}) == (0, 0, 1)
    assert verdict({}, {"a/b": "1"}) == (0, 0, 1)


@pytest.mark.parametrize(("eps", "close"), [(3, 1), (5, 0)])
def test_the_tolerance_is_relative_to_the_largest_element(eps: int, close: int) -> None:
    old = torch.tensor([8.0, 1.0])
    new = old + torch.tensor([0.0, 8 * eps * EPS])
    groups = compare({"a/b": old}, {"a/b": new}, tolerance_eps=4)
    assert (len(groups["a"].close), len(groups["a"].different)) == (close, 1 - close)
    assert groups["a"].worst == pytest.approx(eps)
    text = table("part", groups)
    assert f"| a | 1 | 0 | 0 | {close} | {1 - close} | {eps} |" in text
    assert ("within tolerance: a/b: 3 eps" if close else "differs: a/b: up to") in text


@pytest.mark.parametrize(
    ("bias", "size", "close"),
    [
        ("k_proj.bias", 1e-9, 1),
        ("conv_layers.0.conv.bias", 1e-9, 1),
        ("v_proj.bias", 1e-9, 0),
        ("k_proj.bias", 1e-3, 0),
    ],
)
def test_a_gradient_that_is_zero_but_for_rounding_is_measured_by_the_others(bias: str, size: float, close: int) -> None:
    before: Results = {f"m/t.grad.{bias}": torch.full((2,), size), "m/t.grad.k_proj.weight": torch.ones(2)}
    after: Results = before | {f"m/t.grad.{bias}": torch.full((2,), size * (1 + 2**-19))}
    assert verdict(before, after, tolerance_eps=4) == (1, close, 1 - close)


def test_results_are_taken_apart_and_refusals_kept(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError("words that may change")

    record = Record(match="a")
    batch = Packed.pack([torch.ones(2, 1), torch.ones(3, 1)])
    record.attempt("a", lambda: {"x": batch, "y": [None, 1.5]})
    record.attempt("another", refuse)
    record.attempt("b", refuse)
    record.save(tmp_path / "results.pt")
    found = load(tmp_path / "results.pt")
    assert list(found) == ["a.x.values", "a.x.layout.cu_seqlens", "a.x.layout.lengths", "a.y.1", "another"]
    assert found["another"] == "raises ValueError"
    assert found["a.x.layout.lengths"] == "(2, 3)"


@dataclass
class _Lazy:
    x: Tensor
    _factor: int

    @cached_property
    def larger(self) -> Tensor:
        return self.x * self._factor


def test_a_dataclass_is_taken_apart() -> None:
    record, x = Record(), torch.ones(2, requires_grad=True)
    record.add("a", _Lazy(x, 3))
    assert list(record.results) == ["a.x", "a.larger"]
    assert score(_Lazy(x, 3)) == 4 * score(x)


def test_gradients_are_of_every_floating_output() -> None:
    x = torch.ones(2, requires_grad=True)
    found = with_gradients(lambda: (2 * x, {"more": 3 * x, "count": torch.tensor(1)}), {"x": x})
    weights = torch.sin(torch.tensor([1.0, 2.0]))
    assert torch.allclose(found["grad"]["x"], 5 * weights)
    assert not score((torch.ones(2), "text")).requires_grad
    assert list(with_gradients(lambda: torch.ones(2), {"x": x})) == ["out"]


def test_a_changed_package_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare this checkout with a copy whose op is off by one bit, at one of two thresholds only."""
    # Copy the .pyc files too, to save compilation, but not those that another process is still writing.
    shutil.copytree(trees.ROOT / "fastssl", tmp_path / "fastssl", ignore=shutil.ignore_patterns("*.pyc.*"))
    with (tmp_path / "fastssl" / "__init__.py").open("a") as package:
        package.write(
            "_fire = ops.integrate_and_fire\n"
            "def _changed(*given, threshold, **options):\n"
            "    out, layout = _fire(*given, threshold=threshold, **options)\n"
            "    return (out if threshold == 1.0 else out * (1 + 2**-23)), layout\n"
            "ops.integrate_and_fire = _changed\n"
        )
    assert same_bits.main([str(tmp_path), "--only", "ops", "--match", ", reference/threshold"]) == 1
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| integrate_and_fire, reference |"))
    results, equal, refused, close, different = (int(cell) for cell in row.split("|")[2:7])
    assert equal > different > 10
    assert (results, refused, close) == (equal + different, 0, 0)
    assert "differs: integrate_and_fire, reference/threshold 0.7, fp32, odd.out.0: up to" in printed
    assert "reference/threshold 1.0" not in printed
    assert printed.endswith("DIFFERENT\n")


def test_dropout_draws_by_the_newest_version_that_both_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "fastssl"
    shutil.copytree(trees.ROOT / "fastssl", package, ignore=shutil.ignore_patterns("*.pyc.*"))
    module = package / "kernels" / "randomness.py"
    module.write_text(module.read_text().replace("\nRANDOMNESS = 2\n", "\nRANDOMNESS = 1\n"))
    this, old = (trees.Tree(name, root, tmp_path / name) for name, root in (("this", trees.ROOT), ("old", tmp_path)))
    assert (this.newest_randomness(), old.newest_randomness()) == (2, 1)
    options = ["--only", "ops", "--match", "bias_gelu_dropout, reference/dropout, fp32, odd"]
    assert same_bits.main([str(tmp_path), *options]) == 0
    assert "bias_gelu_dropout, reference" in capsys.readouterr().out
    module.unlink()
    assert old.newest_randomness() is None


def test_a_commit_gets_the_modules_of_this_checkout_where_sources_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, target = tmp_path / "repository", tmp_path / "target"
    for name in ("fastssl/__init__.py", "csrc/a/cpu.cpp", "_build/extensions.py"):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(repository)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (repository / "fastssl" / "_C_cpu.abi3.so").write_text("compiled")
    monkeypatch.setattr(trees, "ROOT", repository)
    trees.check_out("HEAD", target, modules=None)
    assert (target / "fastssl" / "_C_cpu.abi3.so").read_text() == "compiled"
    with pytest.raises(ValueError, match="contains no compiled module"):
        trees.check_out("HEAD", tmp_path / "another", modules=repository / "csrc")
    with pytest.raises(ValueError, match="no-such-commit"):
        trees.check_out("no-such-commit", tmp_path / "third", modules=None)
    (repository / "csrc" / "a" / "cpu.cpp").write_text("changed")
    assert trees.sources_digest(repository) != trees.sources_digest(target)


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    tree = trees.Tree("before", trees.ROOT, tmp_path / "tree")
    with pytest.raises(RuntimeError, match=r"before: benchmarks\.no_such_module: exit status 1\n.*No module named"):
        tree.run("benchmarks.no_such_module", log=tmp_path / "log")
