"""Counts signals to stop, such as Ctrl-C. A run decides what the first and the second one mean."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Counts SIGINT and SIGTERM while it is open. They do nothing else meanwhile.

    SIGHUP counts once, since a terminal that closes may send several. Under nohup it stays ignored.
    """

    def __enter__(self) -> StopSignals:
        self.received = 0
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._count) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.received = max(1, self.received) if number == signal.SIGHUP else self.received + 1
