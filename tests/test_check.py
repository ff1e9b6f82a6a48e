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

    right = worker._Unit(broken(0.0), broken(0.0), broken(0.0), "native")
    wrong = worker._Unit(broken(0.0)._replace(run=fails), broken(0.0), broken(0.0), "triton")
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
    units = [worker._Unit(some, some, some, backend) for backend in ("triton", "torch", "native")]
    monkeypatch.setattr(worker, "_units", lambda device: iter(units))
    for dtype, expected in (("float32", ["native"]), ("bfloat16", ["torch", "native"])):
        assert worker.main(["cpu", dtype, "0"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["backend"] for line in lines if "backend" in line] == expected


def test_crashes_and_errors_are_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_WORKER", "tests.crashing_worker")
    monkeypatch.setattr(command, "_LIMIT_S", 5.0)
    output = tmp_path / "check.json"
    assert cli.main(["check", "--device", "cpu", "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert "the process ended with signal SIGSEGV" in printed.out
    assert printed.out.count("RuntimeError: no such instruction") == 2
    assert "no result after 5 s" in printed.out
    wrong = ",".join(f"some_op.kernel{number}" for number in (1, 2, 3, 5, 6))
    assert f"FASTSSL_EXCLUDE={wrong} to run" in printed.err
    kernels = json.loads(output.read_text())["kernels"]
    assert [command.Checked(**kernel).is_right for kernel in kernels] == [
        True,
        False,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert "NaN" not in output.read_text()


def test_a_backend_that_cannot_run_here_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch's attention exists for every GPU, but runs on some only."""
    (case,) = (case for title, case in titles(SMALL).items() if title == "varlen_attention")
    right = broken(0.0)
    units = [worker._Unit(case, case, case, "native"), worker._Unit(right, right, right, "native")]
    monkeypatch.setitem(BACKENDS["varlen_attention"], "cpu", ("reference",))
    monkeypatch.setattr(worker, "_units", lambda device: iter(units))
    assert worker.main(["cpu", "float32", "0"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["number"], "error" in line) for line in lines] == [(0, False), (0, False), (1, False), (1, True)]
    monkeypatch.setattr(command, "_WORKER", "tests.crashing_worker")
    assert [one.backend for one in command._checked("cpu", "unavailable")] == ["kernel7"]


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_dtype_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert command._default_dtype("cuda") == dtype
    assert command._default_dtype("cpu") == "float32"


@pytest.mark.parametrize("damage", [math.inf, math.nan])
def test_reports_are_json_whatever_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: float
) -> None:
    some = broken(damage)
    monkeypatch.setattr(worker, "_units", lambda device: iter([worker._Unit(some, some, some, "native")]))
    assert worker.main(["cpu", "float32", "0"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["error"] is None


def test_what_others_print_is_no_report() -> None:
    """Triton prints code that the assembler refuses, and C libraries write to the standard output themselves."""
    code = (
        "import os; from fastssl.cli.check.worker import own_output; own = own_output(); print('noise', flush=True); "
        "os.system('echo more noise'); own.write('report'); own.flush(); os._exit(0)"
    )
    done = python(code)
    assert done.stdout == "report"
    assert sorted(done.stderr.splitlines()) == ["more noise", "noise"]


def test_a_failed_kernel_ends_the_process_at_once(tmp_path: Path) -> None:
    """What PyTorch does at the end of a process may abort it, and take long, if the device no longer answers."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\natexit.register(os.abort)\n"
        "import fastssl.cli.check.cases as cases\ncases.cases = lambda lengths: iter(())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "fastssl.cli.check.worker", "cpu", "float32", "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_small_batches_are_compared_in_fp64(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On a GPU, the reference of the front end takes 20 GB for the batch that is timed."""
    monkeypatch.setitem(BACKENDS["varlen_attention"], "cuda", ("triton",))
    units = (one for one in worker._units(torch.device(device)) if one.awkward.op == "varlen_attention")
    unit = next(units, None)
    if device == "cpu" and unit is None:
        pytest.skip("no kernel for the CPU")
    assert unit is not None
    frames = [len(case.inputs["q"]) for case in unit[:3]]
    assert max(frames[:2]) <= 2_000
    assert frames[2] == (6 * frames[1] if device == "cuda" else frames[1])


def test_the_worker_runs_the_package_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The current folder may be a clone without compiled kernels, because README.md installs from one."""
    (tmp_path / "fastssl").mkdir()
    (tmp_path / "fastssl" / "__init__.py").write_text("raise ImportError('the wrong package')")
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(command, "_WORKER", "tests.crashing_worker")
    assert [one.backend for one in command._checked("cpu", "unavailable")] == ["kernel7"]
    monkeypatch.setattr(command, "_WORKER", "fastssl.cli.check.worker")
    monkeypatch.setenv("FASTSSL_EXCLUDE", ",".join(f"{op}.{one}" for op in BACKENDS for one in ("native", "torch")))
    assert list(command._checked("cpu", "float32")) == []


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
