"""A run's TensorBoard file: each row is appended at once, without a thread, and never through a symbolic link."""

import io
import itertools
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from fastssl.files import append

_numbers = itertools.count()


class EventFile:
    """A file of scalars for TensorBoard, which shows all files of a folder as one run.

    TensorBoard's own writer has a thread that writes up to two minutes later; its errors, such as a full disk, end only
    that thread.

    Args:
        folder: Existing folder for the file.
        resume_at: TensorBoard then drops what earlier files say about later updates; None for a new run.
    """

    def __init__(self, folder: Path, *, resume_at: int | None = None) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        host, number = socket.gethostname(), next(_numbers)
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}.{number}"
        events = [Event(file_version="brain.Event:2")]
        if resume_at is not None:
            events.append(Event(step=resume_at + 1, session_log=SessionLog(status=SessionLog.START)))
        self._append(events)

    def add(self, row: Mapping[str, float], update: int) -> None:
        """Append values.

        Args:
            row: Values by name.
            update: Update that they belong to.

        Raises:
            WriteError: The system refused to write.
        """
        self._append(
            Event(step=update, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
            for name, value in row.items()
        )

    def _append(self, events: Iterable[Event]) -> None:
        content = io.BytesIO()
        records = RecordWriter(content)
        for event in events:
            event.wall_time = time.time()
            records.write(event.SerializeToString())
        append(self.path, content.getvalue())
