"""Where an update writes: a home of the unit, or a checkpoint in passing.

An update reads parameters and optimizer states and writes them all anew. In a checkpoint step the new values go into
the checkpoint's file instead of in place, if that lies on the drive of the tier: not a byte more is moved. The unit
then lies in the checkpoint, which nothing changes any more. The next update reads it there and writes to a home again.
What an update leaves in memory, or on another drive, is written to the file as well, behind the update.

What is not updated in the step (frozen parameters, a unit without a gradient) is copied: see `Engine.train_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from zinf_cli.engine.units.store import Flat
from zinf_cli.tiers.tier import Extent


class StateSink(Protocol):
    """Where the state after one step goes: a region for each field of each flat.

    A region is written once, from its start on, in the pieces of its checksums. It may be read from then on.
    """

    def region(self, unit: str, flat: int, field: str) -> Extent:
        """The region of a field: `flat` is the flat's place in the unit, `field` the name in a checkpoint."""

    def replaces(self, extent: Extent) -> bool:
        """Whether a flat may lie in a region instead of this extent for a step."""

    def holds(self, extent: Extent) -> bool:
        """Whether an extent is one of its regions."""

    def complete(self) -> None:
        """Every region has been given its bytes. Writes may be under way."""

    def close(self) -> None:
        """No flat lies here any more."""


@dataclass(frozen=True)
class Destination:
    """Where an update puts what it changes of a flat, by name of the field."""

    into: dict[str, Extent]
    """Where the flat lies from now on."""
    also: Mapping[str, Extent] = field(default_factory=dict)
    """Where a copy goes."""


def destination(flat: Flat, sink: StateSink | None, *, speculative: bool) -> Destination:
    """Where an update of `flat` writes; a `speculative` one leaves the present version as it is."""
    into = flat.next_home(speculative=speculative)
    also: dict[str, Extent] = {}
    if sink is None:
        return Destination(into)
    for field_ in flat.stored:
        region = sink.region(flat.unit, flat.number, field_.stored)
        if sink.replaces(into[field_.name]):
            into[field_.name] = region
        else:
            also[field_.name] = region
    return Destination(into, also)
