"""Writes TensorBoard's event file of a run. A step is in the file when `add` returns: no thread, nothing to flush."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """A new event file in `folder`. OSError if it can't be written.

    TensorBoard forgets what a crashed run has written of the first step here and of later ones.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab", buffering=0)  # noqa: PTH123, SIM115
        self._begun = False

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the point of each curve at `step`."""
        if not self._begun:
            self._write(file_version="brain.Event:2")
            self._write(step=step, session_log={"status": "START"})
            self._begun = True
        self._write(step=step, summary={"value": [{"tag": tag, "simple_value": at} for tag, at in values.items()]})

    def close(self, status: str) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        rest = record.getbuffer()
        while rest:
            rest = rest[self._file.write(rest) :]
