"""A drive that writes at the last moment: when somebody waits for it. What was changed too early shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from zinf_cli.tiers import nvme
from zinf_cli.tiers.bounce import Moment
from zinf_cli.tiers.tier import Extent


class _LateJob(nvme._Job):
    """A write that is made by whoever waits for it."""

    moves: list[Callable[[], None]]
    turn: threading.Lock

    def done(self) -> bool:
        return not self.moves and super().done()

    def wait(self) -> None:
        with self.turn:
            while self.moves:
                self.moves.pop(0)()
        super().wait()


@contextmanager
def late_writes(label: str = "") -> Iterator[None]:
    """Writes to extents whose label contains `label` are late."""
    start = nvme.NvmeTier._start

    def late(self: Any, extent: Extent, offset: int, data: torch.Tensor, moment: Moment, *, write: bool) -> nvme._Job:
        if not write or label not in extent.label:
            return start(self, extent, offset, data, moment, write=write)
        moves: list[Callable[[], None]] = []
        queues = self._queues
        self._queues = (queues[0], SimpleNamespace(put=moves.append))
        try:
            job = start(self, extent, offset, data, moment, write=True)
        finally:
            self._queues = queues
        job.__class__ = _LateJob
        job.moves, job.turn = moves, threading.Lock()  # type: ignore[attr-defined]
        return job

    with patch.object(nvme.NvmeTier, "_start", late):
        yield
