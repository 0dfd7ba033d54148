"""What backward needs of the forward, meanwhile: kept as it is, or on a tier, written behind and read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError, ModelError
from zinf_cli.model_state import PAGE, round_up
from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.tier import Extent, Tier, Transfer

SMALL = PAGE // 2
"""Bytes below which a tensor is kept: its page on the tier would be larger than it is."""

PARCEL = 16 * 2**20
"""Bytes up to which what one call saves goes together. Larger transfers are not faster, and need more room at once."""


class Saved(Protocol):
    """One tensor that will be needed again in the backward pass."""

    def prefetch(self) -> bool:
        """Start bringing it back if there is room; True when it is on its way or there."""

    def get(self) -> torch.Tensor:
        """The tensor, detached."""

    def evict(self) -> None:
        """Not needed for now, but again later."""

    def free(self) -> None: ...


class Kept:
    """The tensor itself; changing it in place meanwhile would change the result, so that is an error."""

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
                hint="keep offload.activations on nvme, where a copy is taken",
            )
        return self._tensor

    def evict(self) -> None:
        return

    def free(self) -> None:
        self._tensor = None


class Activations:
    """Saves tensors on `tier` through `staging`, an arena of the compute device; without one, keeps them."""

    def __init__(self, tier: Tier, staging: Arena | None, wait: Callable[[Transfer], None]) -> None:
        self._tier = tier
        self._staging = staging
        self.wait = wait
        self._leaving: deque[tuple[Transfer, Buffer]] = deque()
        self.ahead: list[Parcel] = []
        """What was prefetched and is not in use yet, what is needed last at the end."""

    def keeps(self, num_bytes: int) -> bool:
        """Whether a tensor of this size stays where it is."""
        return self._staging is None or num_bytes < SMALL

    def save(self, tensor: torch.Tensor, label: str) -> Saved:
        if self.keeps(tensor.numel() * tensor.element_size()):
            return Kept(tensor)
        return self.save_together([tensor], label)[0]

    def save_together(self, tensors: Sequence[torch.Tensor], label: str) -> list[Offloaded]:
        """Several tensors in one transfer; they are at home on the tier from now on."""
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + round_up(tensor.numel() * tensor.element_size()))
        buffer = self.take(starts[-1])
        for tensor, start in zip(tensors, starts, strict=False):
            _part(buffer.data, start, tensor.shape, tensor.dtype).copy_(tensor)
        extent = self._tier.allocate(starts[-1], f"{label} activations")
        self._leaving.append((extent.write(0, buffer.data), buffer))
        parcel = Parcel(self, self._tier, extent)
        return [Offloaded(parcel, start, t.shape, t.dtype) for t, start in zip(tensors, starts, strict=False)]

    def take(self, num_bytes: int) -> Buffer:
        """A staging buffer. Where none is free, it waits for the oldest writes, and lets go of what was read ahead."""
        buffer = self.try_take(num_bytes)
        while buffer is None:
            if not self._leaving and self.ahead:
                self.ahead[-1].evict()
                buffer = self.try_take(num_bytes)
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
            buffer = self.try_take(num_bytes)
        return buffer

    def try_take(self, num_bytes: int) -> Buffer | None:
        while self._leaving and self._leaving[0][0].done():
            transfer, leaving = self._leaving.popleft()
            transfer.wait()
            leaving.free()
        assert self._staging is not None
        return self._staging.allocate(num_bytes)


class Parcel:
    """Tensors that went to a tier together, and come back together."""

    def __init__(self, home: Activations, tier: Tier, extent: Extent) -> None:
        self._home = home
        self._tier = tier
        self._extent: Extent | None = extent
        self._buffer: Buffer | None = None
        self._read: Transfer | None = None
        self._held = False

    def prefetch(self) -> bool:
        if self._read is None and self._extent is not None:
            self._start(self._home.try_take(self._extent.num_bytes))
            if self._read is not None:
                self._home.ahead.append(self)
        return self._read is not None

    def get(self) -> torch.Tensor:
        """Its bytes, which stay until it is evicted or freed."""
        self._held = True
        if self in self._home.ahead:
            self._home.ahead.remove(self)
        return self._bytes()

    def peek(self) -> torch.Tensor:
        """Its bytes; a copy of them, unless they stay."""
        if self._held:
            return self._bytes()
        coming = self._read is not None
        copy = self._bytes().clone()
        if not coming:
            self.evict()
        return copy

    def _bytes(self) -> torch.Tensor:
        assert self._extent is not None
        if self._read is None:
            self._start(self._home.take(self._extent.num_bytes))
        assert self._read is not None
        assert self._buffer is not None
        self._home.wait(self._read)
        return self._buffer.data

    def evict(self) -> None:
        self._held = False
        if self in self._home.ahead:
            self._home.ahead.remove(self)
        if self._read is not None and self._buffer is not None:
            self._home.wait(self._read)
            self._buffer.free()
        self._buffer = self._read = None

    def free(self) -> None:
        self.evict()
        if self._extent is not None:
            for write in self._extent.writes:
                self._home.wait(write)  # the extent may be handed out again at once
            self._tier.free(self._extent)
        self._extent = None

    def _start(self, buffer: Buffer | None) -> None:
        if buffer is not None and self._extent is not None:
            self._buffer = buffer
            self._read = self._extent.read(0, buffer.data)


class Offloaded:
    """A tensor in a parcel; what is done to it is done to all of the parcel."""

    def __init__(self, parcel: Parcel, start: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.parcel = parcel
        self._start = start
        self._shape = shape
        self._dtype = dtype
        self.prefetch = parcel.prefetch
        self.evict = parcel.evict
        self.free = parcel.free

    def get(self) -> torch.Tensor:
        return _part(self.parcel.get(), self._start, self._shape, self._dtype)

    def peek(self) -> torch.Tensor:
        """The tensor; a copy, unless the parcel stays."""
        return _part(self.parcel.peek(), self._start, self._shape, self._dtype)


def _part(data: torch.Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return data[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
