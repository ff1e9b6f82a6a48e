"""Processes of a data loader: one that cannot hand over what it has read ends, so that nobody waits for it for ever."""

import multiprocessing.queues
import os
import sys


def end_if_unable_to_send(worker: int) -> None:
    """Let a data loader's worker end if it cannot send a batch: its `worker_init_fn`.

    PyTorch sends tensors through shared memory. If that is full, Python drops the batch with a traceback, and the
    process that wants the batch waits for ever. Once the worker has ended, it gets an error instead.

    Args:
        worker: Number of the worker; ignored.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: Exception, item: object) -> None:
    print(f"a process that reads audio cannot send what it has read: {error}", file=sys.stderr, flush=True)
    os._exit(1)
