"""Test that a worker which cannot send what it has read ends the command instead of letting it wait for ever."""

import multiprocessing
import signal
from collections.abc import Callable

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from fastssl import cli
from fastssl.data.workers import end_if_unable_to_send
from tests.soak.cases import run_case


class _Unsendable:
    def __reduce__(self) -> str:
        raise OSError("no shared memory")


class _Batches(Dataset[object]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        return _Unsendable() if index else torch.zeros(1)


def test_a_batch_that_cannot_be_sent_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def read() -> str | None:
        loader = DataLoader(_Batches(), None, num_workers=1, timeout=5, worker_init_fn=end_if_unable_to_send)
        # PyTorch's handler raises the same error once more, at any moment.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = True
        try:
            list(loader)
        except (RuntimeError, OSError, EOFError) as error:
            return f"caught: {error}"
        return None

    # In a process of its own, because PyTorch's handlers of signals are those of a whole process.
    outcome = run_case(read, name="caught: ", seconds=20)
    assert outcome.kind == "named", outcome
    assert "cannot send what it has read: no shared memory" in capfd.readouterr().err


def _take_from_an_ended_process() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    ours.recv()


def _exit_unexpectedly() -> None:
    raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")


def _end_early() -> None:
    raise EOFError


@pytest.mark.parametrize("end", [_take_from_an_ended_process, _exit_unexpectedly])
def test_the_command_line_says_what_to_do(
    end: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastssl.data.corpus.open_corpus", lambda *_, **__: end())
    assert cli.main(["prepare", "audio", "--output", "a.jsonl.gz"]) == 1
    assert capsys.readouterr().err.startswith("fastssl prepare: a process that reads audio ended early; if the shared")


def test_another_early_end_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastssl.data.corpus.open_corpus", lambda *_, **__: _end_early())
    with pytest.raises(EOFError):
        cli.main(["prepare", "audio", "--output", "a.jsonl.gz"])
