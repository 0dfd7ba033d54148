"""A checkpoint in passing: the updates of one step write the new state into it as they are made.

An update reads parameters and optimizer states and writes them all anew. In a checkpoint step the new values go into
the checkpoint's file instead of in place, if that lies on the drive of the tier: not a byte more is moved. The unit
then lies in the checkpoint, which nothing changes any more; the next update reads it there and writes to the unit's
home. What an update leaves in memory, or on another drive, is written to the file as well, behind the update.

What no update touches in the step (frozen parameters, a unit without a gradient) is copied, see `Engine.train_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from zinf_cli.engine.units.store import Flat
from zinf_cli.tiers.tier import Extent


class StateSink(Protocol):
    """Where the state after one step goes: a region for each field of each flat, which is written once, from its start
    on in pieces of PIECE bytes, and may be read from then on."""

    def region(self, unit: str, flat: int, field: str) -> Extent:
        """Of the flat by its place in the unit, and the field by its name in a checkpoint."""

    def replaces(self, extent: Extent) -> bool:
        """Whether a flat may lie in a region instead of this extent for a step."""

    def holds(self, extent: Extent) -> bool:
        """Whether an extent is one of its regions."""

    def complete(self) -> None:
        """Everything has been handed to its region; writes may be under way."""

    def close(self) -> None:
        """No flat lies here any more."""


@dataclass(frozen=True)
class Destination:
    """Where an update puts what it changes of a flat, by names of `Flat.at`."""

    into: dict[str, Extent]
    """Where it lies from now on."""
    also: Mapping[str, Extent] = field(default_factory=dict)
    """Where a copy goes."""


def destination(flat: Flat, sink: StateSink | None, *, keep: bool) -> Destination:
    """Where an update of `flat` goes; with `keep` it leaves the present version as it is."""
    into = flat.places(keep=keep)
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
