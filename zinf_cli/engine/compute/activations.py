"""Holds the tensors that backward needs of the forward: in memory, or on a tier, written behind and read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError, ModelError
from zinf_cli.model_state import PAGE, round_up
from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.streams import Event, streams_of
from zinf_cli.tiers.tier import Extent, Tier, Transfer

SMALL = PAGE // 2
"""A tensor of fewer bytes stays in memory: on the tier it would take a page, at least twice as much."""

PARCEL = 16 * 2**20
"""Most bytes in one transfer of what a call saves. Larger transfers are not faster, and need more room at once."""


class Saved(Protocol):
    """One tensor that will be needed again in the backward pass."""

    def prefetch(self) -> bool:
        """Start to bring it back if there is room. True if it is there or on its way."""

    def get(self) -> torch.Tensor:
        """The tensor, detached."""

    def evict(self) -> None:
        """Give up its memory for now. A later `get` brings it back."""

    def free(self) -> None:
        """Give up the tensor for good, in memory and on its tier."""


class Kept:
    """The tensor itself. It is not copied, so a change in place before `get` is a ModelError there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor.detach()
        self._version = tensor._version

    def prefetch(self) -> bool:
        return True

    def get(self) -> torch.Tensor:
        assert self._tensor is not None
        if self._tensor._version != self._version:
            raise ModelError(
                "a tensor that backward needs was changed in place after it had been used",
                hint="let the model change a copy of it, or set activation_checkpointing=none",
            )
        return self._tensor

    def evict(self) -> None:
        return

    def free(self) -> None:
        self._tensor = None


class Activations:
    """Saves tensors on `tier` through `staging`, an arena of the compute device. Without one they stay in memory."""

    def __init__(self, tier: Tier, staging: Arena | None, wait: Callable[[Transfer], object]) -> None:
        self._tier = tier
        self._staging = staging
        self._stream = None if staging is None else streams_of(staging.device).new(staging.device)
        self.wait = wait
        self._leaving: deque[tuple[Transfer, Buffer]] = deque()
        self.ahead: list[Part] = []
        """What was prefetched and is not in use yet. What is needed last is at the end."""

    def beside(self) -> AbstractContextManager[Any]:
        """A context for a read whose copy begins when its room is free on the device.

        Copies of one stream begin in their order, and a parameter's copy may wait for room that compute gives back only
        when it has these activations.
        """
        assert self._staging is not None
        return streams_of(self._staging.device).use(self._stream)

    def keeps(self, num_bytes: int) -> bool:
        """Whether a tensor of `num_bytes` stays in memory."""
        return self._staging is None or num_bytes < SMALL

    def save(self, tensor: torch.Tensor, label: str, *, stays: bool = False) -> Saved:
        """Send a copy of the tensor to the tier, or hold it in memory if it `stays`. Hold the tensor itself if it is
        small or memory is its tier. Errors: `take`."""
        if stays and self._staging is not None:
            return Kept(tensor.clone())
        if self.keeps(tensor.numel() * tensor.element_size()):
            return Kept(tensor)
        return self.save_together([tensor], label)[0]

    def save_together(self, tensors: Sequence[torch.Tensor], label: str) -> list[Offloaded]:
        """Send several tensors to the tier in one transfer, as copies.

        CapacityError if the staging arena is too small for them.
        """
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + round_up(tensor.numel() * tensor.element_size()))
        buffer, _ = self.take(starts[-1])  # the stream that gave it back is the one that fills it
        for tensor, start in zip(tensors, starts, strict=False):
            _part(buffer.data, start, tensor.shape, tensor.dtype).copy_(tensor)
        extent = self._tier.allocate(starts[-1], f"{label} activations")
        self._leaving.append((extent.write(0, buffer.data), buffer))
        parcel = Parcel(self, self._tier, extent)
        return [Offloaded(parcel, start, t.shape, t.dtype) for t, start in zip(tensors, starts, strict=False)]

    def take(self, num_bytes: int) -> tuple[Buffer, list[Event]]:
        """A staging buffer, and what a stream waits for before it uses that (`Arena.allocate_ahead`).

        If none is free, wait for the oldest writes; then drop what was read ahead. CapacityError if the staging arena
        is too small for it.
        """
        found = self.try_take(num_bytes)
        while found is None:
            if not self._leaving and self.ahead:
                self.ahead[-1].evict()
                found = self.try_take(num_bytes)
                continue
            if not self._leaving:
                assert self._staging is not None
                raise CapacityError(
                    f"an activation of {format_bytes(num_bytes)} does not fit the planned staging memory of "
                    f"{format_bytes(self._staging.capacity)}",
                    hint="raise offload.cpu_memory, or set offload.activations=cpu",
                )
            transfer, leaving = self._leaving.popleft()
            self.wait(transfer)
            leaving.free()
            found = self.try_take(num_bytes)
        return found

    def try_take(self, num_bytes: int) -> tuple[Buffer, list[Event]] | None:
        """The same, if one is free now."""
        while self._leaving and self._leaving[0][0].done():
            transfer, leaving = self._leaving.popleft()
            transfer.wait()
            leaving.free()
        assert self._staging is not None
        return self._staging.allocate_ahead(num_bytes)


class Part:
    """A range of what went to a tier, which comes back by itself."""

    def __init__(self, home: Activations, extent: Extent, start: int, num_bytes: int) -> None:
        self._home = home
        self._extent: Extent | None = extent
        self._start, self._num_bytes = start, num_bytes
        self._buffer: Buffer | None = None
        self._read: Transfer | None = None
        self.held = False
        """Whether it stays in memory, once it is there, until it is evicted or freed."""
        self.seen = False
        """Whether some of it was needed before its turn, and so probably is not needed again."""

    @property
    def coming(self) -> bool:
        """Whether it is in memory, or on its way."""
        return self._read is not None

    def prefetch(self) -> bool:
        if not self.coming and not self.seen:
            self._bring(self._home.try_take(self._num_bytes))
            if self.coming:
                self._home.ahead.append(self)
        return self.coming or self.seen

    def hold(self) -> None:
        """From now on it stays in memory, as soon as somebody asks for it."""
        self.held = True
        if self in self._home.ahead:
            self._home.ahead.remove(self)

    def get(self) -> torch.Tensor:
        """Its bytes (1-D uint8, on the compute device). They stay in memory until it is evicted or freed."""
        self.hold()
        return self.bytes()

    def bytes(self) -> torch.Tensor:
        """Its bytes, which stay in memory as long as no other needs the room."""
        if not self.coming:
            self._bring(self._home.take(self._num_bytes))
        assert self._read is not None
        assert self._buffer is not None
        self._home.wait(self._read)
        return self._buffer.data

    def evict(self) -> None:
        self.held = False
        if self in self._home.ahead:
            self._home.ahead.remove(self)
        if self._read is not None and self._buffer is not None:
            self._home.wait(self._read)
            self._buffer.free()
        self._buffer = self._read = None

    def free(self) -> None:
        self.evict()

    def _bring(self, found: tuple[Buffer, list[Event]] | None) -> None:
        if found is not None:
            assert self._extent is not None
            self._buffer, events = found
            with self._home.beside():
                self._read = self._extent.read(self._start, self._buffer.data, events)


class Parcel(Part):
    """Tensors that went to a tier together, and come back together."""

    def __init__(self, home: Activations, tier: Tier, extent: Extent) -> None:
        super().__init__(home, extent, 0, extent.num_bytes)
        self._tier = tier

    def part(self, start: int, num_bytes: int) -> Part:
        """Some of it, from byte `start` on."""
        assert self._extent is not None
        return Part(self._home, self._extent, start, num_bytes)

    def free(self) -> None:
        super().free()
        if self._extent is not None:
            for write in self._extent.writes:
                self._home.wait(write)  # freed, the extent may be allocated again at once
            self._tier.free(self._extent)
        self._extent = None


class Offloaded:
    """A tensor in a parcel. To prefetch, evict or free it does so to the whole parcel."""

    def __init__(self, parcel: Parcel, start: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.parcel = parcel
        self._start = start
        self._shape = shape
        self._dtype = dtype
        self._alone: list[Part] = []
        self.prefetch = parcel.prefetch
        self.evict = parcel.evict
        self.free = parcel.free

    def get(self) -> torch.Tensor:
        return _part(self.parcel.get(), self._start, self._shape, self._dtype)

    def alone(self) -> Part:
        """The tensor without the rest of its parcel, for a `peek` while this is held."""
        self._alone.append(self._part_alone())
        return self._alone[-1]

    def peek(self) -> torch.Tensor:
        """The tensor: a copy, unless it is held and so stays in memory."""
        if self.parcel.held:
            return self.get()
        held = next((part for part in self._alone if part.held), None)
        if held is not None:
            return _part(held.bytes(), 0, self._shape, self._dtype)
        if self.parcel.coming:
            return _part(self.parcel.bytes(), self._start, self._shape, self._dtype).clone()
        self.parcel.seen = True
        alone = self._part_alone()
        copy = _part(alone.get(), 0, self._shape, self._dtype).clone()
        alone.evict()
        return copy

    def _part_alone(self) -> Part:
        return self.parcel.part(self._start, round_up(self._shape.numel() * self._dtype.itemsize))


def _part(data: torch.Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a parcel. A change of it is not one of the others (see Buffer)."""
    return data[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape).data
