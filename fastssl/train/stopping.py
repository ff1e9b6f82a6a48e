"""Stop a run after an update when a signal asks for it, in all processes after the same update."""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

#: Signals that stop a run after the current update: Ctrl-C, and what `kill`, SLURM and torchrun send.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: What a process can ask for, as names of counts that are summed over the processes with those of each update.
REQUESTS = ("save", *(one.name for one in SIGNALS))
#: Launchers such as `uv run` pass a Ctrl-C on to a process that the terminal has already sent it to.
_SAME_CTRL_C_S = 0.5


class Stopped(SystemExit):
    """Raised when a signal has ended a run early, after a checkpoint.

    The exit status is 128 + the signal's number (130 for SIGINT, 143 for SIGTERM), as if the signal had ended the
    process. A script or SLURM can therefore tell such a run from a finished one, and knows why it ended.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Requests:
    """What this process asks all processes to do after the current update: save a checkpoint, or save and stop.

    Requests are summed over the processes together with the other counts of an update, so agreeing on them costs no
    communication of its own.
    """

    def __init__(self) -> None:
        #: Time of `time.monotonic` from which on a checkpoint is requested; None requests none.
        self.save_at: float | None = None
        self._received: dict[int, float] = {}
        self._before: dict[int, Any] = {}
        self._first = True

    def counts(self) -> tuple[float, ...]:
        """Return 1 for each of `REQUESTS` that this process makes, else 0."""
        save = self.save_at is not None and time.monotonic() >= self.save_at
        return (float(save), *(float(one in self._received) for one in SIGNALS))

    def listen(self, *, first: bool) -> None:
        """Turn the signals into requests. They replace Lightning's handler, which communicates inside the handler.

        Only Python's main thread can do that; in another one, nothing changes.

        Args:
            first: Whether this process confirms a signal on standard error.
        """
        self._first = first
        self._received.clear()
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {one: signal.signal(one, self._receive) for one in SIGNALS}

    def ignore(self) -> None:
        """Give the signals back to the handlers that they had before `listen`."""
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        received = self._received.setdefault(signum, now)
        if signum == signal.SIGINT and now - received > _SAME_CTRL_C_S:
            raise KeyboardInterrupt
        if received == now and self._first:
            again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            name = signal.Signals(signum).name
            # `print` is not safe here: the handler may have interrupted another `print`.
            os.write(2, f"fastssl: {name}: saving a checkpoint after this update, then stopping{again}\n".encode())


def agreed_signal(counts: dict[str, float]) -> int | None:
    """Return the number of the signal that stops the run; None if no process has received one.

    Args:
        counts: Sums over all processes, with those of `REQUESTS`.
    """
    return max((one for one in SIGNALS if counts.get(one.name)), default=None)


def leave_signals_to_the_parent(worker: int) -> None:
    """Let a data loader's worker live on when all processes of a run get a signal, because the update needs its batch.

    Ctrl-C in a terminal and `scancel` signal the workers too. Only the process that started the worker may end it. If
    that process is killed, the worker ends without a traceback.

    Args:
        worker: Number of the worker; ignored.
    """
    parent, show = os.getppid(), sys.excepthook

    def show_for_the_parent(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getppid() != parent:
            os._exit(1)
        show(kind, error, trace)

    sys.excepthook = show_for_the_parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_the_parent, args=(parent,), daemon=True).start()


def _end_for_the_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
