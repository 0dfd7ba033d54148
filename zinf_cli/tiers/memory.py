"""The device tier and the CPU tier: extents that are tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.streams import Event, Stream, streams_of
from zinf_cli.tiers.tier import DONE, Extent, Transfer
from zinf_cli.trace import Trace


class MemoryTier:
    """Extents in the memory of `device`, for compute on `compute_device`.

    If both are the same, `view` gives the memory itself and nothing is copied. Between CPU memory and an accelerator,
    copies run on two streams, one for each direction. With `pin` the CPU memory is page-locked. If the system refuses
    that, `notice` is called once with a line for the user.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        compute_device: torch.device,
        trace: Trace,
        *,
        pin: bool = False,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.in_place = device == compute_device
        self.on_streams = True
        self.used = self.peak = 0
        self.read_bytes = 0
        self.write_bytes = 0
        self._device = device
        self._trace = trace
        self._pin = pin
        self._notice = notice
        self._arenas: list[Arena] = []
        self._freed: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._compute_device = compute_device
        streams = streams_of(compute_device)
        self._in, self._out = streams.new(compute_device), streams.new(compute_device)

    def allocate(self, num_bytes: int, label: str) -> Extent:
        try:
            memory = self._freed[num_bytes].pop() if self._freed[num_bytes] else self._new(num_bytes)
        except (RuntimeError, OSError) as error:
            raise CapacityError(
                f"no room for {format_bytes(num_bytes)} of {label} in {self.name} memory",
                hint="move a class of state to another tier (offload.*), or use more ranks",
            ) from error
        self.used += num_bytes
        self.peak = max(self.peak, self.used)
        return Extent(self, num_bytes, label, memory=memory)

    def _new(self, num_bytes: int) -> torch.Tensor:
        if self._device.type != "cpu":
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        pin = self._pin and not self.in_place
        arena = Arena(num_bytes, self._device, pin_for=self._compute_device if pin else None)
        if pin and not arena.pinned and self._notice is not None:
            self._notice("the system refuses page-locked memory (ulimit -l): copies to the device will be slower")
            self._notice = None
        self._arenas.append(arena)
        buffer = arena.allocate(num_bytes)
        assert buffer is not None
        return buffer.data

    def free(self, extent: Extent) -> None:
        assert extent.memory is not None
        self.used -= extent.num_bytes
        self._freed[extent.num_bytes].append(extent.memory)
        extent.memory = None

    def view(self, extent: Extent) -> torch.Tensor | None:
        return extent.memory if self.in_place else None

    def read(self, extent: Extent, offset: int, into: torch.Tensor) -> Transfer:
        assert extent.memory is not None
        self.read_bytes += into.numel()
        with self._trace.span("copy in", extent.label, into.numel()):
            source = extent.memory[offset : offset + into.numel()]
            if self.in_place:
                into.copy_(source)
                return DONE
            return self._copy(f"copy in {extent.label}", self._in, into, source, after=extent.writes)

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> Transfer:
        assert extent.memory is not None
        self.write_bytes += source.numel()
        with self._trace.span("copy out", extent.label, source.numel()):
            memory = extent.memory[offset : offset + source.numel()]
            if self.in_place:
                memory.copy_(source)
                return DONE
            copy = self._copy(f"copy out {extent.label}", self._out, memory, source)
            extent.writes = [copy]  # the stream makes it behind all that were asked for before
            return copy

    def _copy(
        self, what: str, stream: Stream, into: torch.Tensor, source: torch.Tensor, after: Sequence[Transfer] = ()
    ) -> StreamCopy:
        return StreamCopy(what, stream, self._compute_device, into, source, after)

    def close(self) -> None:
        for stream in (self._in, self._out):
            stream.synchronize()  # its copies use memory that is unlocked and freed now
        self._freed.clear()
        for arena in self._arenas:
            arena.unpin()


class StreamCopy:
    """One copy on `stream`. It starts after what the compute stream has queued so far, and after the copies `after`."""

    def __init__(
        self,
        what: str,
        stream: Stream,
        device: torch.device,
        into: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Transfer],
    ) -> None:
        """`device` computes."""
        self.what = what
        self._device = device
        streams = streams_of(device)
        stream.wait_stream(streams.current(device))
        for copy in after:
            assert isinstance(copy, StreamCopy)
            stream.wait_event(copy._event)
        with streams.use(stream):
            into.copy_(source, non_blocking=True)
        self._event: Event = streams.event()
        self._event.record(stream)

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        """Let the compute stream wait, and not the CPU: kernels that are queued from now on see the bytes."""
        streams_of(self._device).current(self._device).wait_event(self._event)
