"""The protocol of a tier. Code above works with any tier and never asks which it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from zinf_cli.tiers.checksums import Checksums
from zinf_cli.tiers.streams import Event


class Transfer(Protocol):
    """Bytes on their way."""

    @property
    def what(self) -> str:
        """What is moved, for traces: "read model.layers.3 exp_avg"."""

    @property
    def event(self) -> Event | None:
        """Its end, if a stream makes it: then `wait` is queued, and holds up no thread."""

    def done(self) -> bool:
        """Whether `wait` would return at once. It orders nothing: who goes on because of it calls `wait`."""

    def wait(self) -> None:
        """Return when the bytes have arrived and the compute stream may use them. TierError if the transfer failed."""


@dataclass
class Extent:
    """A range of `num_bytes` (whole pages) that a tier keeps."""

    tier: Tier
    num_bytes: int
    label: str
    """What lies here, for errors and traces: "model.layers.3 exp_avg"."""
    start: int = 0
    """First byte in the tier's own address space."""
    memory: torch.Tensor | None = None
    """The bytes as uint8, if the tier keeps them in memory."""
    writes: list[Transfer] = field(default_factory=list, repr=False)
    """Writes that may be under way. A later read or write of the same bytes waits for them."""
    checksums: Checksums = field(default_factory=Checksums, repr=False)
    """Checksums of what was written, if the tier keeps them."""

    def read(self, offset: int, into: torch.Tensor, after: Sequence[Event] | None = None) -> Transfer:
        """Start to fill `into` (contiguous uint8 on the compute device) from byte `offset` of the extent on.

        It begins behind all that the current stream has queued so far or, if they are given, behind the events `after`.
        """
        return self.tier.read(self, offset, into, after)

    def write(self, offset: int, source: torch.Tensor) -> Transfer:
        """Start to write `source` at byte `offset`. `source` must not change until the transfer is done."""
        return self.tier.write(self, offset, source)

    def view(self) -> torch.Tensor | None:
        """The extent's own memory as uint8, if the compute device can use it in place; else None."""
        return self.tier.view(self)


class Tier(Protocol):
    """A place for extents: device memory, CPU memory or NVMe."""

    name: str
    in_place: bool
    """Whether the compute device uses extents in place, without a copy."""
    used: int
    """Bytes in extents now."""
    peak: int
    """The highest value of `used` since the caller last set `peak`."""
    read_bytes: int
    write_bytes: int

    def allocate(self, num_bytes: int, label: str) -> Extent:
        """A new extent, zeros unless it takes the place of a freed one. CapacityError if there is no room."""

    def free(self, extent: Extent) -> None: ...

    def read(
        self, extent: Extent, offset: int, into: torch.Tensor, after: Sequence[Event] | None = None
    ) -> Transfer: ...

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> Transfer: ...

    def view(self, extent: Extent) -> torch.Tensor | None: ...

    def close(self) -> None: ...


def under_way(transfers: Iterable[Transfer]) -> list[Transfer]:
    """Those that are not over. The others are waited for, so that what follows comes after them.

    TierError where one of these failed.
    """
    left = []
    for transfer in transfers:
        if transfer.done():
            transfer.wait()
        else:
            left.append(transfer)
    return left


Wait = Callable[[Transfer], bool]
"""Waits for a transfer, or returns False where it would have to wait too long."""


def wait_if_done(transfer: Transfer) -> bool:
    """Wait for what would return at once."""
    if not transfer.done():
        return False
    transfer.wait()
    return True


def wait_if_queued(transfer: Transfer) -> bool:
    """Wait for what holds up no thread: it is done, or a stream waits for it."""
    if transfer.event is None:
        return wait_if_done(transfer)
    transfer.wait()
    return True


class Done:
    """A transfer that is done from the start."""

    what = "nothing"
    event: Event | None = None

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


DONE = Done()
