"""What every place for bytes can do; code above never asks which one it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from zinf_cli.tiers.checksums import Checksums


class Transfer(Protocol):
    """Bytes on their way."""

    @property
    def what(self) -> str:
        """For traces: "read model.layers.3 exp_avg"."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> None:
        """Return when the bytes are where they were sent, and usable on the compute stream; raise TierError."""


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
    """uint8, where the tier keeps bytes in memory."""
    writes: list[Transfer] = field(default_factory=list, repr=False)
    """Writes that may be under way: a later read or write of the same bytes waits for them."""
    checksums: Checksums = field(default_factory=Checksums, repr=False)
    """Of what was written, where the tier keeps them."""

    def read(self, offset: int, into: torch.Tensor) -> Transfer:
        """Start filling `into` (contiguous uint8 on the compute device) from `offset` bytes into the extent."""
        return self.tier.read(self, offset, into)

    def write(self, offset: int, source: torch.Tensor) -> Transfer:
        """Start writing `source` at `offset`; it must stay unchanged until the transfer is done."""
        return self.tier.write(self, offset, source)

    def view(self) -> torch.Tensor | None:
        """The extent itself as a uint8 tensor, where the compute device can use it in place."""
        return self.tier.view(self)


class Tier(Protocol):
    """A place for extents: device memory, CPU memory or NVMe."""

    name: str
    in_place: bool
    """Whether the compute device uses extents where they lie."""
    used: int
    """Bytes in extents now."""
    peak: int
    """The most `used` has been since the caller last set this."""
    read_bytes: int
    write_bytes: int

    def allocate(self, num_bytes: int, label: str) -> Extent:
        """A new extent, zeros unless it takes the place of a freed one; CapacityError where there is no room."""

    def free(self, extent: Extent) -> None: ...

    def read(self, extent: Extent, offset: int, into: torch.Tensor) -> Transfer: ...

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> Transfer: ...

    def view(self, extent: Extent) -> torch.Tensor | None: ...

    def close(self) -> None: ...


class Done:
    """A transfer with nothing left to do."""

    what = "nothing"

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


DONE = Done()
