"""Moves bytes between a drive and the memory of an accelerator, through a page-locked buffer of each drive thread.

A drive reads and writes CPU memory only. Each thread of the NVMe tier owns a buffer of one block, and a stream. So one
thread copies a block to or from the device while others are at the drive, and together they take one block of memory a
thread. The compute thread takes no part. A drive's thread waits for the device without the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.streams import Event, Stream, now, streams_of


class _Own(threading.local):
    bounce: _Bounce | None = None


_own = _Own()


class Moment:
    """The moment from which on a transfer may touch the device: that of the events `after` or, without them, of all
    that the current stream has queued so far.

    On the CPU nothing is ever queued.
    """

    def __init__(self, device: torch.device, after: Sequence[Event] | None = None) -> None:
        self._streams = streams_of(device)
        self._events = [now(device)] if after is None else after

    def read(self, data: torch.Tensor, read: Callable[[torch.Tensor], None]) -> None:
        """Fill `data` with what `read` puts into CPU memory, once the kernels that use `data` are done."""
        if self._streams.on_cpu:
            read(data)
            return
        bounce, stream = _buffer_and_stream(data)
        read(bounce)
        for event in self._events:
            stream.wait_event(event)
        with self._streams.use(stream):
            data.copy_(bounce, non_blocking=True)
        stream.synchronize()

    def write(self, data: torch.Tensor, write: Callable[[torch.Tensor], None]) -> None:
        """Hand `data`, in CPU memory, to `write`, once the kernels that compute it are done."""
        if self._streams.on_cpu:
            write(data)
            return
        bounce, stream = _buffer_and_stream(data)
        for event in self._events:
            stream.wait_event(event)
        with self._streams.use(stream):
            bounce.copy_(data, non_blocking=True)
        stream.synchronize()
        write(bounce)


class _Bounce:
    """What this thread copies through: page-locked memory of `num_bytes`, and a stream of `device`."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        streams = streams_of(device)
        streams.set_device(device)
        self._arena = Arena(num_bytes, torch.device("cpu"), pin_for=device)
        buffer = self._arena.allocate(num_bytes)
        assert buffer is not None
        self.memory = buffer.data
        self.stream = streams.new(device)

    def close(self) -> None:
        self._arena.unpin()  # nothing is on the stream: whoever moves bytes waits for its copies


def _buffer_and_stream(data: torch.Tensor) -> tuple[torch.Tensor, Stream]:
    """This thread's page-locked buffer, as long as `data`, and its stream on the device of `data`."""
    if (bounce := _own.bounce) is None or bounce.memory.numel() < data.numel():
        close_own()
        bounce = _own.bounce = _Bounce(data.numel(), data.device)
    return bounce.memory[: data.numel()], bounce.stream


def close_own() -> None:
    """Free this thread's buffer, if it has one. To be called before a thread ends that has moved bytes."""
    if _own.bounce is not None:
        _own.bounce.close()
    _own.bounce = None
