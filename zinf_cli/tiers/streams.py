"""Streams, events and the device that a thread works on: all that orders work on an accelerator.

Work that is queued on a stream runs in that order. Streams run beside each other, and beside the CPU; only an event
orders work of two of them. Code that queues or waits asks `streams_of(device)` and never what kind of device it has. On
the CPU nothing is queued: an operation is over when it returns, so there is nothing to wait for.

`implementations` has those of each kind of device. A test puts another one there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A moment on a stream: all that had been queued there when `record` was called."""

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool:
        """Whether it is over."""

    def synchronize(self) -> None:
        """Let this thread wait for it."""


class Stream(Protocol):
    """A queue of work on a device. What is queued after one of these waits begins when what it names is over."""

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None:
        """Wait for all that `stream` has queued so far."""

    def synchronize(self) -> None:
        """Let this thread wait for all that is queued here."""


class Streams(Protocol):
    """The streams of one kind of device."""

    on_cpu: bool
    """Whether the CPU and its drives work on the memory of the device, and nothing is ever queued."""

    def new(self, device: torch.device) -> Stream: ...

    def current(self, device: torch.device) -> Stream:
        """The stream on which this thread queues its work for `device`."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which `stream` is the current one of its device, and that the current device."""

    def event(self) -> Event: ...

    def set_device(self, device: torch.device) -> None:
        """Make `device` the current one of this thread. Every new thread begins with the first one."""

    def synchronize(self, device: torch.device) -> None:
        """Let this thread wait for all streams of `device`."""


class _CudaStream(torch.cuda.Stream):
    def synchronize(self) -> None:
        """Sleep until it is over. torch's own method keeps a core busy: one for each thread of a drive."""
        event = torch.cuda.Event(blocking=True)
        event.record(self)
        event.synchronize()


class _Cuda:
    on_cpu = False

    def new(self, device: torch.device) -> Stream:
        return _CudaStream(device)  # type: ignore[no-untyped-call]

    def current(self, device: torch.device) -> Stream:
        return torch.cuda.current_stream(device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def event(self) -> Event:
        return torch.cuda.Event()

    def set_device(self, device: torch.device) -> None:
        torch.cuda.set_device(device)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)


class _Nothing:
    """A stream, or an event, where nothing is ever queued."""

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool:
        return True

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


_NOTHING = _Nothing()


class _Cpu:
    on_cpu = True

    def new(self, device: torch.device) -> Stream:
        return _NOTHING

    def current(self, device: torch.device) -> Stream:
        return _NOTHING

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def event(self) -> Event:
        return _NOTHING

    def set_device(self, device: torch.device) -> None: ...

    def synchronize(self, device: torch.device) -> None: ...


implementations: dict[str, Streams] = {"cpu": _Cpu(), "cuda": _Cuda()}
"""By the type of a device."""


def streams_of(device: torch.device) -> Streams:
    """The streams of the kind of device that `device` is."""
    return implementations[device.type]


def now(device: torch.device) -> Event:
    """The moment at which all is over that the current stream of `device` has queued so far."""
    streams = streams_of(device)
    event = streams.event()
    event.record(streams.current(device))
    return event


def wait_for(events: Iterable[Event], device: torch.device) -> None:
    """Let the current stream of `device` wait for `events`, and not the CPU."""
    current = streams_of(device).current(device)
    for event in events:
        current.wait_event(event)
