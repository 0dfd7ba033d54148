"""The device tier and the CPU tier: extents that are tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.streams import Event, Stream, now, streams_of, wait_for
from zinf_cli.tiers.tier import DONE, Extent, Transfer
from zinf_cli.trace import Trace


class MemoryTier:
    """Extents in the memory of `device`, for compute on `compute_device`.

    If both are the same, `view` gives the memory itself and nothing is copied. Between CPU memory and an accelerator,
    copies run on two streams, one for each direction; what another stream than compute's asks for, on two others. With
    `pin` the CPU memory is page-locked. If the system refuses that, `notice` is called once with a line for the user.
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
        self._beside: dict[Stream, tuple[Stream, Stream]] = {}
        """(in, out) of the copies that a stream asks for: these come one after another, and hold up no others."""

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

    def read(self, extent: Extent, offset: int, into: torch.Tensor, after: Sequence[Event] | None = None) -> Transfer:
        assert extent.memory is not None
        self.read_bytes += into.numel()
        with self._trace.span("copy in", extent.label, into.numel()):
            source = extent.memory[offset : offset + into.numel()]
            if self.in_place:
                assert not after, "what lies in memory of the device is used there"
                into.copy_(source)
                return DONE
            written = [write.event for write in extent.writes if write.event is not None]
            stream, _ = self._streams()
            if after is None:
                stream.wait_stream(streams_of(self._compute_device).current(self._compute_device))
            return StreamCopy(
                f"copy in {extent.label}", stream, self._compute_device, into, source, [*(after or ()), *written]
            )

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> Transfer:
        assert extent.memory is not None
        self.write_bytes += source.numel()
        with self._trace.span("copy out", extent.label, source.numel()):
            memory = extent.memory[offset : offset + source.numel()]
            if self.in_place:
                memory.copy_(source)
                return DONE
            _, stream = self._streams()
            stream.wait_stream(streams_of(self._compute_device).current(self._compute_device))
            copy = StreamCopy(f"copy out {extent.label}", stream, self._compute_device, memory, source, [])
            extent.writes = [copy]  # the stream makes it behind all that were asked for before
            return copy

    def _streams(self) -> tuple[Stream, Stream]:
        """For copies in and out that the current stream asks for."""
        streams = streams_of(self._compute_device)
        asks = streams.current(self._compute_device)
        if asks not in self._beside:
            self._beside[asks] = streams.new(self._compute_device), streams.new(self._compute_device)
        return self._beside[asks]

    def close(self) -> None:
        for pair in self._beside.values():
            for stream in pair:
                stream.synchronize()  # its copies use memory that is unlocked and freed now
        self._freed.clear()
        for arena in self._arenas:
            arena.unpin()


class StreamCopy:
    """One copy on `stream`, behind the events `after`."""

    def __init__(
        self,
        what: str,
        stream: Stream,
        device: torch.device,
        into: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Event],
    ) -> None:
        """`device` computes."""
        self.what = what
        self._device = device
        streams = streams_of(device)
        for event in after:
            stream.wait_event(event)
        with streams.use(stream):
            into.copy_(source, non_blocking=True)
            self.event = now(device)

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        """Let the current stream wait, and not the CPU: kernels that are queued there from now on see the bytes."""
        wait_for([self.event], self._device)
