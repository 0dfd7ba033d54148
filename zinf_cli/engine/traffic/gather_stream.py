"""The stream that gathers are asked for on. They run beside compute, behind what they need and nothing else.

NCCL begins a collective when the current stream comes to where it was asked for. On the stream of compute that would be
behind all that this thread has queued there, and the thread is far ahead. So a gather is asked for on a stream of its
own. That waits for what used the unit's room before, for what compute had queued when the unit got its room, or when it
was updated, and for the copies of this rank's slices. This thread waits for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from zinf_cli.tiers.streams import Event, streams_of, wait_for


class GatherStream:
    """One for all gathers, which have one order."""

    def __init__(self, device: torch.device) -> None:
        """`device` computes."""
        self._device = device
        self._streams = streams_of(device)
        self._stream = self._streams.new(device)

    @contextmanager
    def behind(self, moments: Sequence[Event]) -> Iterator[None]:
        """A context in which all that is queued, and waits that are queued, come on this stream, behind `moments`."""
        with self._streams.use(self._stream):
            wait_for(moments, self._device)
            yield
