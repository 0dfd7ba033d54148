"""Counts signals to stop, such as Ctrl-C. A run decides what the first and the second one mean."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType, TracebackType
from typing import Any

_ONE_ORDER_S = 1.0
"""SIGTERMs that are no further apart are one order: Slurm sends each step two when a job is to end."""


class StopSignals:
    """Counts SIGINT, SIGTERM and SIGUSR1 while it is open. They do nothing else meanwhile.

    SIGUSR1 is Slurm's warning before a time limit (--signal=B:USR1@120). It counts once, and so does SIGHUP, since a
    terminal that closes may send several. Under nohup SIGHUP stays ignored.
    """

    def __enter__(self) -> StopSignals:
        self.received = 0
        self._last_term = -math.inf
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._count) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def told_elsewhere(self) -> None:
        """Count a SIGTERM that other processes of the run have got. It comes to this one, too, or has come already."""
        if self.received == 0:
            self._count(signal.SIGTERM, None)

    def _count(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGHUP, signal.SIGUSR1):
            self.received = max(1, self.received)
            return
        if number == signal.SIGTERM:
            before, self._last_term = self._last_term, time.monotonic()
            if self._last_term - before < _ONE_ORDER_S:
                return
        self.received += 1
