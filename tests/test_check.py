"""Test `fastssl check`: its cases, its comparison with the reference, and what it does about kernels that fail."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastssl import cli
from fastssl.cli.check import command, worker
from fastssl.cli.check.cases import Case, Inputs, Outputs, cases
from fastssl.cli.check.measure import Agreement, agreement, badness, milliseconds
from fastssl.kernels.dispatch import BACKENDS

CPU = torch.device("cpu")
SMALL = (3, 0, 1, 9)


def titles(lengths: tuple[int, ...]) -> dict[str, Case]:
    return {f"{case.op} {case.what}".strip(): case for case in cases(lengths)}


def test_every_op_has_a_case() -> None:
    assert {case.op for case in cases(SMALL)} == set(BACKENDS)


@pytest.mark.parametrize("title", titles(SMALL))
def test_kernels_of_this_machine_are_right(title: str) -> None:
    case = titles(SMALL)[title]
    for backend in BACKENDS[case.op]["cpu"]:
        if backend not in ("reference", "triton"):
            found = agreement(case, backend, torch.float32, CPU)
            assert found.error <= 1, f"{backend}: {found}"


@pytest.mark.parametrize(
    "title",
    [
        "strided_conv seven layers, group norm",
        "strided_conv seven layers, layer norm",
        "positional_conv",
        "varlen_attention",
        "varlen_attention distance bias",
        "contrastive_loss",
        "integrate_and_fire",
    ],
)
def test_pytorch_does_the_same_work(title: str) -> None:
    """Without padding, and without what PyTorch draws itself, the results must agree."""
    case = titles((11,))[title]
    expected, found = case.run(case.inputs, "reference")[0], case.plain(case.plain_inputs)[0]
    if title.startswith(("strided", "positional")):  # (1, C, T)
        found = found.transpose(1, 2)
    if title.startswith("varlen"):  # (1, H, T, E)
        found = found.transpose(1, 2)
    found = found.reshape(-1, *expected.shape[1:])[: len(expected)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def broken(damage: float) -> Case:
    def run(given: Inputs, backend: str) -> Outputs:
        x: Tensor = given["x"]
        return (x.sin() if backend == "reference" else x.sin() + damage * x,)

    x = {"x": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    return Case("some_op", "", x, run, x, lambda given: (given["x"].sin(),))


def test_a_wrong_result_is_no_rounding() -> None:
    assert agreement(broken(0.0), "native", torch.float32, CPU).error <= 1
    assert agreement(broken(1e-5), "native", torch.float32, CPU).error > 1
    assert math.isnan(agreement(broken(math.nan), "native", torch.float32, CPU).error)
    assert max([Agreement(2.0, ""), Agreement(math.nan, "x"), Agreement(3.0, "")], key=badness).worst == "x"


def test_times_are_of_both() -> None:
    def slow(given: Inputs, backend: str) -> Outputs:
        torch.randn(300, 300) @ torch.randn(300, 300)
        return (given["x"].sin(),)

    ours_ms, plain_ms = milliseconds(broken(0.0)._replace(run=slow), "native", torch.float32, CPU)
    assert ours_ms > 0
    assert plain_ms > 0


def test_worker_reports_each_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(given: Inputs, backend: str) -> Outputs:
        raise RuntimeError("no such\ninstruction")

    right = worker._Unit(broken(0.0), broken(0.0), "native")
    wrong = worker._Unit(broken(0.0)._replace(run=fails), broken(0.0), "triton")
    monkeypatch.setattr(worker, "_units", lambda device: iter([right, right, wrong, right]))
    assert worker.main(["cpu", "float32", "1"]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["number"] for line in lines] == [1, 1, 2, 2]
    assert lines[1]["error"] <= 1
    assert lines[3]["failure"] == "RuntimeError: no such instruction"


def test_a_backend_that_does_not_support_a_case_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = broken(0.0)._replace(unsupported=("triton",), only_16_bit=("torch",))
    units = [worker._Unit(some, some, backend) for backend in ("triton", "torch", "native")]
    monkeypatch.setattr(worker, "_units", lambda device: iter(units))
    for dtype, expected in (("float32", ["native"]), ("bfloat16", ["torch", "native"])):
        assert worker.main(["cpu", dtype, "0"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["backend"] for line in lines if "backend" in line] == expected


def test_crashes_and_errors_are_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_WORKER", "tests.crashing_worker")
    output = tmp_path / "check.json"
    assert cli.main(["check", "--device", "cpu", "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert "the process ended with signal SIGSEGV" in printed.out
    assert "RuntimeError: no such instruction" in printed.out
    assert "FASTSSL_EXCLUDE=some_op.kernel1,some_op.kernel2,some_op.kernel3" in printed.err
    kernels = json.loads(output.read_text())["kernels"]
    assert [command.Checked(**kernel).is_right for kernel in kernels] == [True, False, False, False, True]
    assert "NaN" not in output.read_text()


def test_all_right_is_status_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = command.Checked("some_op", "", "native", 0.5, "output 0", 1.0, 3.0)
    monkeypatch.setattr(command, "_checked", lambda device, dtype: iter([right]))
    assert cli.main(["check", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["some_op", "native", "0.50", "1.00", "3.00", "3.0"]
    assert not replace(right, error=None).is_right


def test_arguments_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert cli.main(["check", "--device", "cuda"]) == 1
        assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err
    assert cli.main(["check", "--device", "cpu", "--dtype", "float16"]) == 1
    assert "--dtype float16: on cpu, expected one of float32, bfloat16" in capsys.readouterr().err


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=False, capture_output=True, text=True
    )


def test_an_excluded_kernel_is_not_used() -> None:
    code = "from fastssl import ops; from fastssl.kernels.dispatch import BACKENDS, MISSING; "
    code += "print(BACKENDS['positional_conv']['cpu'], MISSING['positional_conv']['torch', 'cpu'])"
    excluded = python(code, FASTSSL_EXCLUDE="varlen_attention.triton, positional_conv.torch")
    assert excluded.stdout == "('reference',) excluded by FASTSSL_EXCLUDE\n", excluded.stderr
    for typo in ("positional_conv", "positional.torch", "positional_conv.reference"):
        assert f"FASTSSL_EXCLUDE: '{typo}' is no kernel" in python(code, FASTSSL_EXCLUDE=typo).stderr
