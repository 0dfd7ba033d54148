"""How a drive's thread reaches the memory of an accelerator: through a page-locked buffer of its own.

A drive reads and writes CPU memory only. Each thread of the NVMe tier owns one buffer of a block and one stream, so a
block is copied to or from the device while other threads are at the drive, and no more memory is taken than threads
times blocks. The compute thread is not involved; the device is waited for in the drive's thread, without the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from zinf_cli.tiers.arena import Arena

_own = threading.local()


class Moment:
    """What the compute stream had queued when a transfer was asked for; on the CPU nothing is ever queued."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self, data: torch.Tensor, read: Callable[[torch.Tensor], None]) -> None:
        """Fill `data` by means of `read`, which fills CPU memory; earlier users of `data` are done by then."""
        if self._event is None:
            read(data)
            return
        bounce, stream = _buffer_and_stream(data)
        read(bounce)
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            data.copy_(bounce, non_blocking=True)
        stream.synchronize()

    def write(self, data: torch.Tensor, write: Callable[[torch.Tensor], None]) -> None:
        """Hand `data` to `write`, which takes CPU memory, once it has been computed."""
        if self._event is None:
            write(data)
            return
        bounce, stream = _buffer_and_stream(data)
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            bounce.copy_(data, non_blocking=True)
        stream.synchronize()
        write(bounce)


def _buffer_and_stream(data: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Stream]:
    """This thread's page-locked buffer, as long as `data`, and its stream on the device of `data`."""
    if getattr(_own, "stream", None) is None or _own.region.numel() < data.numel():
        region = Arena(data.numel(), torch.device("cpu"), pin=True).allocate(data.numel())
        assert region is not None
        _own.region = region.data
        _own.stream = torch.cuda.Stream(data.device)
    return _own.region[: data.numel()], _own.stream
