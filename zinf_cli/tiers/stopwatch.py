"""How long compute stands still for data.

On the CPU that is how long a wait takes. On an accelerator a wait is queued and returns at once, so two events stand on
the compute stream, just before it and just after it. Nothing is computed between them: what lies between is waiting,
also where this thread was held up by a drive while the stream had nothing left to do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch

Span = tuple[str, float, float]
"""What was waited for, from when until when, in seconds of time.perf_counter()."""


class Stopwatch(Protocol):
    """Times the waits of one thread that computes."""

    def time(self, what: str, wait: Callable[[], None]) -> None:
        """Call `wait`, which lets compute wait for `what`."""

    def over(self) -> Iterator[Span]:
        """The waits that are over and were not told yet."""


class HostStopwatch:
    """Of compute that is over when its call returns."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()

    def time(self, what: str, wait: Callable[[], None]) -> None:
        start = time.perf_counter()
        wait()
        self._spans.append((what, start, time.perf_counter()))

    def over(self) -> Iterator[Span]:
        while self._spans:
            yield self._spans.popleft()


class EventStopwatch:
    """Of compute on the current stream. `event` makes an event that keeps its time, as torch.cuda.Event does."""

    def __init__(self, event: Callable[[], Any]) -> None:
        self._event = event
        self._waits: deque[tuple[str, Any, Any]] = deque()
        self._origin: Any = None
        self._origin_s = 0.0

    def time(self, what: str, wait: Callable[[], None]) -> None:
        if self._origin is None:
            self._origin = self._recorded()
            self._origin.synchronize()
            self._origin_s = time.perf_counter()
        before = self._recorded()
        wait()
        self._waits.append((what, before, self._recorded()))

    def over(self) -> Iterator[Span]:
        while self._waits and self._waits[0][2].query():
            what, before, after = self._waits.popleft()
            start = self._origin_s + self._origin.elapsed_time(before) / 1e3
            end = start + before.elapsed_time(after) / 1e3
            # from there on: CUDA tells a difference with 24 bits, which is to 8 ms after a day
            self._origin, self._origin_s = after, end
            yield what, start, end

    def _recorded(self) -> Any:
        event = self._event()
        event.record()
        return event


_OF_KIND: dict[str, Callable[[], Stopwatch]] = {
    "cpu": HostStopwatch,
    "cuda": lambda: EventStopwatch(partial(torch.cuda.Event, enable_timing=True)),
}
"""By the type of a device."""


def stopwatch_of(device: torch.device) -> Stopwatch:
    """A stopwatch for what `device` computes."""
    return _OF_KIND[device.type]()
