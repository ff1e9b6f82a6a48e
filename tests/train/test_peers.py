"""Test that the processes of a run end together: stopped by a signal to one, killed, or hanging."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastssl.train.checkpoints import saved_update
from fastssl.train.config import PretrainConfig
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import TrainingError
from fastssl.train.peers import Peers, is_of_communication
from tests.train.conftest import WORKER, MakeConfig, as_yaml_file

_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
#: Marks the processes of a test in their environment.
_MARK = "FASTSSL_TEST_RUN"


@pytest.fixture
def make_config(make_config: MakeConfig) -> MakeConfig:
    """Make settings that let every process start a worker of its own."""
    return partial(make_config, **WORKER, **{"trainer.checkpoint_every": 3})


def _peers(rank: int, others: list[tuple[Peers, Any]]) -> Peers:
    """Connect a process in a thread's place: the first one's address is known to those made after it."""
    peers = Peers(lambda: "--resume continues after update 5", timeout_minutes=30)
    first = others[0][0] if others else peers

    def broadcast(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if first is peers:
            return values
        assert first._listener is not None
        return ["127.0.0.1"], first._listener.getsockname()[1], first._token

    strategy = SimpleNamespace(broadcast=broadcast, launcher=None)
    trainer: Any = SimpleNamespace(
        world_size=3, num_nodes=1, global_rank=rank, is_global_zero=rank == 0, strategy=strategy
    )
    peers.setup(trainer, None, "fit")  # type: ignore[arg-type]
    others.append((peers, trainer))
    return peers


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Peers, Any]]:
    """Make three connected processes, none of which ends itself."""
    monkeypatch.setattr("fastssl.train.peers.Peers._end", lambda self: None)
    monkeypatch.setattr("fastssl.train.peers._EXPLANATION_S", 0.1)
    processes: list[tuple[Peers, Any]] = []
    for rank in range(3):
        _peers(rank, processes)
    deadline = time.monotonic() + 10
    while len(processes[0][0]._links) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return processes


def test_all_learn_which_process_ended(three: list[tuple[Peers, Any]], caplog: pytest.LogCaptureFixture) -> None:
    three[2][0]._links[0].shutdown(socket.SHUT_RDWR)  # as the operating system does for a process that was killed
    for peers, _ in three[:2]:
        assert peers._found.wait(10)
    message = "process 2 was killed or crashed; all processes end; --resume continues after update 5"
    deadline = time.monotonic() + 10
    while not caplog.messages and time.monotonic() < deadline:  # it is said just after it is found
        time.sleep(0.01)
    assert caplog.messages == [message]
    assert [peers.lost for peers, _ in three[:2]] == [True, True]


def test_the_end_of_the_first_process_is_noticed(
    three: list[tuple[Peers, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for link in three[0][0]._links.values():
        link.shutdown(socket.SHUT_RDWR)
    for peers, _ in three[1:]:
        assert peers._found.wait(10)
    deadline = time.monotonic() + 10
    while not (said := sum("process 0 was killed or crashed" in message for message in caplog.messages)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert said == 1


def test_an_error_of_one_process_ends_the_others(
    three: list[tuple[Peers, Any]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, trainer = three[1]
    tell = peers._tell

    def tell_slowly(message: str) -> None:
        tell(message)
        time.sleep(0.3)  # the others answer meanwhile

    monkeypatch.setattr(peers, "_tell", tell_slowly)
    peers.on_exception(trainer, None, OSError("the disk is full\nand more"))  # type: ignore[arg-type]
    for other in (three[0][0], three[2][0]):
        assert other._found.wait(10)
    assert [message.partition(";")[0] for message in caplog.messages] == ["process 1 failed: OSError: the disk is full"]
    assert not peers.lost


def test_planned_ends_and_common_failures_say_nothing(
    three: list[tuple[Peers, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for (peers, trainer), error in zip(three, (None, None, TrainingError("the loss is nan")), strict=True):
        if error is None:
            peers.teardown(trainer, None, "fit")  # type: ignore[arg-type]
        else:
            peers.on_exception(trainer, None, error)  # type: ignore[arg-type]
    time.sleep(0.2)
    assert not caplog.messages
    assert not any(peers.lost for peers, _ in three)


def test_a_hanging_process_is_not_named(three: list[tuple[Peers, Any]], caplog: pytest.LogCaptureFixture) -> None:
    peers, trainer = three[0]
    error = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation")
    with caplog.at_level(logging.INFO):
        peers.on_exception(trainer, None, error)  # type: ignore[arg-type]
    assert caplog.messages == [
        "another process did not answer within trainer.timeout_minutes=30; all processes end; "
        "--resume continues after update 5"
    ]
    assert is_of_communication(torch.distributed.DistBackendError("NCCL"))
    assert not is_of_communication(RuntimeError("out of memory"))
    assert not is_of_communication(OSError("gloo"))


def _start(config: PretrainConfig, folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> Any:
    command = [sys.executable, *launcher, "-m", "fastssl", "pretrain", "--config", str(as_yaml_file(config, folder))]
    return subprocess.Popen(
        [*command, "--output", config.output, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _second_process(folder: Path) -> int:
    """Find the second process in /proc; its data loader's workers have the same environment."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if f"{_MARK}={folder}".encode() in environment and b"LOCAL_RANK=1" in environment:
            found[int(path.name)] = parent
    (process,) = (pid for pid, parent in found.items() if parent not in found)
    return process


def _signal_second(config: PretrainConfig, process: Any, folder: Path, signum: int) -> tuple[str, str]:
    """Send a signal to the second process when the run has finished its fifth update, and return the output."""
    metrics = Path(config.output) / "metrics.csv"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 7:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = _second_process(folder)
    os.kill(second, signum)
    try:
        output: tuple[str, str] = process.communicate(timeout=120)
    finally:
        process.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{second}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return output


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_update(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"trainer.devices": 2, "trainer.max_steps": 40, "trainer.checkpoint_every": 100}
    stopped, unbroken = make_config("stopped", **changes), make_config("unbroken", **changes)
    process = _start(stopped, tmp_path)
    output, errors = _signal_second(stopped, process, tmp_path, signal.SIGTERM)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    updates = saved_update(Path(stopped.output) / "checkpoints" / "last.ckpt")
    assert f"stopped after update {updates}; checkpoint saved: continue with --resume" in output
    for config, options in ((stopped, ("--resume",)), (unbroken, ())):
        process = _start(config, tmp_path, *options)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    weights, expected = (
        torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for config in (stopped, unbroken)
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    rows, expected_rows = (
        [row | {"audio_s_per_s": 0.0} for row in read_metrics(Path(config.output) / "metrics.csv")]
        for config in (stopped, unbroken)
    )
    assert rows == expected_rows


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_a_killed_process_ends_the_other_with_one_line(launcher: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**{"trainer.max_steps": 10_000, "trainer.devices": 2 if launcher == "own" else 1})
    process = _start(config, tmp_path, launcher=_TORCHRUN if launcher == "torchrun" else ())
    _, errors = _signal_second(config, process, tmp_path, signal.SIGKILL)
    assert process.returncode == 1
    line = r"^fastssl: process 1 was killed or crashed; all processes end; --resume continues after update \d+$"
    assert len(re.findall(line, errors, re.MULTILINE)) == 1, errors
    if launcher == "own":
        assert "Traceback" not in errors


@pytest.mark.slow
def test_a_hanging_process_is_noticed_by_the_timeout(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"trainer.max_steps": 10_000, "trainer.devices": 2, "trainer.timeout_minutes": 0.5}
    config = make_config(**changes)
    process = _start(config, tmp_path)
    _, errors = _signal_second(config, process, tmp_path, signal.SIGSTOP)
    assert process.returncode == 1
    assert "another process did not answer within trainer.timeout_minutes=0.5; all processes end; --resume" in errors
    assert "Traceback" not in errors
