"""The device tier and the CPU tier: extents that are tensors."""

from __future__ import annotations

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError
from zinf_cli.tiers.tier import DONE, Extent, Transfer
from zinf_cli.trace import Trace


class MemoryTier:
    """Extents in the memory of `device`, read and written by a compute device that may be another one.

    Where both are the same, `view` hands out the memory itself and nothing is copied. From CPU memory to a CUDA device,
    copies run on two streams of their own (in and out), from page-locked memory where `pin` is set.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        compute_device: torch.device,
        trace: Trace,
        *,
        pin: bool = False,
    ) -> None:
        self.name = name
        self.used = self.peak = 0
        self.read_bytes = 0
        self.write_bytes = 0
        self._device = device
        self._compute_device = compute_device
        self._trace = trace
        self._pin = pin and compute_device.type == "cuda"
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if compute_device.type == "cuda" and device != compute_device:
            self._streams = (torch.cuda.Stream(compute_device), torch.cuda.Stream(compute_device))

    def allocate(self, num_bytes: int, label: str) -> Extent:
        try:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pin)
        except RuntimeError as error:
            raise CapacityError(
                f"no room for {format_bytes(num_bytes)} of {label} in {self.name} memory",
                hint="move a class of state to another tier (offload.*), or use more ranks",
            ) from error
        self.used += num_bytes
        self.peak = max(self.peak, self.used)
        return Extent(self, num_bytes, label, memory=memory)

    def free(self, extent: Extent) -> None:
        self.used -= extent.num_bytes
        extent.memory = None

    def view(self, extent: Extent) -> torch.Tensor | None:
        return extent.memory if self._device == self._compute_device else None

    def read(self, extent: Extent, offset: int, into: torch.Tensor) -> Transfer:
        assert extent.memory is not None
        self.read_bytes += into.numel()
        return self._copy(into, extent.memory[offset : offset + into.numel()], inward=True, label=extent.label)

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> Transfer:
        assert extent.memory is not None
        self.write_bytes += source.numel()
        memory = extent.memory[offset : offset + source.numel()]
        return self._copy(memory, source, inward=False, label=extent.label)

    def _copy(self, into: torch.Tensor, source: torch.Tensor, *, inward: bool, label: str) -> Transfer:
        lane = "copy in" if inward else "copy out"
        with self._trace.span(lane, label, source.numel()):
            if self._streams is None:
                into.copy_(source)
                return DONE
            return StreamCopy(self._streams[0 if inward else 1], into, source)

    def close(self) -> None:
        return


class StreamCopy:
    """One copy on a stream of its own; it starts after what the compute stream has queued so far."""

    def __init__(self, stream: torch.cuda.Stream, into: torch.Tensor, source: torch.Tensor) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        """The compute stream waits, not the CPU: kernels queued from here on see the bytes."""
        torch.cuda.current_stream().wait_event(self._event)
