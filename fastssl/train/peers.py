"""Notice when another process of a run ends early, say which one it was, and end this process too."""

import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from fastssl.train.module import TrainingError

logger = logging.getLogger(__name__)

#: Time that this process has to end by itself after another has ended. It cannot do so while it waits for a GPU.
_GRACE_S = 15.0
#: Time between an error in the communication and the message that says whose end caused it.
_EXPLANATION_S = 5.0
#: A machine that has lost power closes no connection; it is noticed after 20 + 3 * 10 s.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_LONGEST_REASON, _LONGEST_LINE = 300, 4096


class Peers(Callback):
    """Lightning callback that connects every process with the first one, to learn at once when a process ends.

    The operating system closes a process's connection whatever ends it, even SIGKILL. A process that ends as planned
    says so first. The first process tells the others about an end that was not planned, and all of them stop. Nothing
    is sent as long as all is well. A process that only hangs keeps its connection; then, PyTorch's communication fails
    after `timeout_minutes`, and this callback explains its error.

    Args:
        continuation: Function that says what `--resume` will do.
        timeout_minutes: Minutes after which PyTorch's communication fails, for the message.
    """

    def __init__(self, continuation: Callable[[], str], *, timeout_minutes: float) -> None:
        self.continuation = continuation
        self.timeout_minutes = timeout_minutes
        #: Whether the run failed because of another process; the reason has been logged.
        self.lost = False
        self._rank, self._training = 0, False
        self._listener: socket.socket | None = None
        self._token = b""
        self._links: dict[int, socket.socket] = {}
        self._children: list[Any] = []
        self._ending = threading.Event()
        self._found = threading.Event()
        self._lock = threading.Lock()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the processes."""
        if trainer.world_size == 1:
            return
        self._rank = trainer.global_rank
        here = trainer.num_nodes == 1
        if trainer.is_global_zero:
            self._token = secrets.token_hex(16).encode()
            self._listener = _listen(here=here)
        hosts = ["127.0.0.1"] if here else [os.environ.get("MASTER_ADDR", "127.0.0.1"), socket.gethostname()]
        port = 0 if self._listener is None else self._listener.getsockname()[1]
        hosts, port, self._token = trainer.strategy.broadcast((hosts, port, self._token))
        if not trainer.is_global_zero and not self._connect(hosts, port):
            logger.warning("process %d cannot connect to process 0, so it may notice its end late", self._rank)
            return
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            # Lightning's own watch kills all processes with SIGKILL and without a message, even after a planned stop.
            self._children = list(launcher.procs)
            launcher.procs.clear()
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that settings and data have been checked; from here on, an error may occur in one process only."""
        self._training = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other processes why this one ends, or find out which process caused the error."""
        if trainer.world_size == 1:
            return
        if is_of_communication(exception):
            self.lost = True
            if not self._found.wait(_EXPLANATION_S):
                self._explain(exception)
            self._say_goodbye()
        elif isinstance(exception, TrainingError) or (isinstance(exception, ValueError) and not self._training):
            self._say_goodbye()  # all processes raise it
        else:
            first_line = (str(exception).strip().splitlines() or ["interrupted"])[0]
            self._ending.set()  # first, because the others answer that this process is lost
            self._tell(f"failed {type(exception).__name__}: {first_line}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the connections as planned."""
        self._say_goodbye()

    def end_children(self) -> None:
        """Kill the processes that this one has started, if they do not end by themselves; they may hang."""
        deadline = time.monotonic() + _GRACE_S
        while any(child.poll() is None for child in self._children) and time.monotonic() < deadline:
            time.sleep(0.1)
        for child in self._children:
            child.kill()  # does nothing to one that has ended

    def _connect(self, hosts: list[str], port: int) -> bool:
        for host in hosts:
            try:
                link = socket.create_connection((host, port), timeout=10)
                link.sendall(self._token + f" {self._rank}\n".encode())
            except OSError:
                continue
            link.settimeout(None)
            _keep_alive(link)
            self._links[0] = link
            return True
        return False

    def _watch(self) -> None:
        """Wait for messages and for ends of connections."""
        with selectors.DefaultSelector() as selector:
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, [rank, b""])
            while selector.get_map():
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif not self._read(key):
                        selector.unregister(key.fileobj)
                if self._ending.is_set():
                    return

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        try:
            link, _ = self._listener.accept()
        except OSError:
            selector.unregister(self._listener)
            return
        _keep_alive(link)
        selector.register(link, selectors.EVENT_READ, [None, b""])

    def _read(self, key: selectors.SelectorKey) -> bool:
        """Read from a connection; return whether it stays open."""
        link, state = key.fileobj, key.data
        assert isinstance(link, socket.socket)
        try:
            received = link.recv(4096)
        except OSError:
            received = b""
        if not received:
            if state[0] is not None:
                self._lose(state[0], "was killed or crashed")
            return False
        *lines, state[1] = (state[1] + received).split(b"\n")
        if len(state[1]) > _LONGEST_LINE:
            return False
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if state[0] is None:
                if not secrets.compare_digest(word.encode(), self._token):
                    return False  # a stranger
                state[0] = rank = int(rest)
                self._links[rank] = link
            elif word == "bye":
                return False
            elif word == "failed":
                self._lose(state[0], f"failed: {rest}")
            elif word == "lost":
                lost, _, reason = rest.partition(" ")
                self._lose(int(lost), reason)
        return True

    def _lose(self, rank: int, reason: str) -> None:
        """Say that another process has ended, and end this one if it does not end by itself."""
        with self._lock:
            if self._ending.is_set() or self._found.is_set():
                return
            self._found.set()
            self.lost = True
        # Whichever process is the first that is left says it.
        if self._rank == (0 if rank else 1):
            logger.error("process %d %s; all processes end; %s", rank, reason, self.continuation())
        self._tell(f"lost {rank} {reason}")
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        """End this process if its main thread does not: PyTorch lets it wait for a GPU until the timeout."""
        time.sleep(_GRACE_S)
        for child in self._children:
            child.kill()
        logging.shutdown()
        os._exit(1)

    def _explain(self, error: BaseException) -> None:
        """Log an error in the communication of which no process is known to be the cause."""
        with self._lock:
            if self._found.is_set() or self._rank > 1:
                return
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            what = f"another process did not answer within trainer.timeout_minutes={self.timeout_minutes:g}"
        else:
            what = f"the connection to another process broke ({str(error).strip().splitlines()[0][:_LONGEST_REASON]})"
        logger.error("%s; all processes end; %s", what, self.continuation())

    def _tell(self, message: str) -> None:
        for link in list(self._links.values()):
            try:
                link.sendall(f"{message[:_LONGEST_REASON]}\n".encode(errors="backslashreplace"))
            except OSError:
                continue

    def _say_goodbye(self) -> None:
        with self._lock:
            if self._ending.is_set():
                return
            self._ending.set()
        self._tell("bye")


def is_of_communication(error: BaseException) -> bool:
    """Return whether PyTorch's communication between the processes raised an error; Gloo's have no class of their own.

    Args:
        error: Any exception.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl"))


def _listen(*, here: bool) -> socket.socket:
    if here:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
