"""Which unit a sweep visits next, when its members, or ranks, call several.

Members of one sweep share its visits. Each of them may leave out units that others call: experts that its tokens are
not routed to, layers that LayerDrop drops. The unit that comes first is visited first, for all members that call it.
So the others are there when it is over. Any order would be right, since a visit changes nothing for members that do
not call the unit. This one visits each unit once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zinf_cli.engine.ranks import Ranks


class Disagreement(Exception):  # noqa: N818 (it is no error: the engine goes on)
    """A micro-batch changes what another one reads, or leaves the route that several ranks follow."""


_NOTHING = -1
"""What a rank tells instead of a unit when its micro-batches have ended."""


class NextUnit:
    """The choice of the next unit, the same on every rank."""

    def __init__(self, ranks: Ranks, on_demand: frozenset[int]) -> None:
        self._ranks = ranks
        self._on_demand = on_demand

    def of(self, called: Iterable[int | None], route: Sequence[int]) -> int | None:
        """The unit to visit next; None at the end. Experts come first, the others as in the `route`."""
        mine = self._first([unit for unit in called if unit is not None], route)
        if self._ranks.world_size == 1:
            return mine
        units = self._ranks.all(_NOTHING if mine is None else mine)
        return self._first([unit for unit in units if unit != _NOTHING], route)

    def _first(self, units: Sequence[int], route: Sequence[int]) -> int | None:
        if len(set(units)) < 2:
            return next(iter(units), None)
        places = {unit: place for place, unit in reversed(list(enumerate(route)))}
        return min(units, key=lambda unit: (unit not in self._on_demand, places.get(unit, len(route)), unit))

    def agree(self, agreed: bool) -> None:
        """Raise Disagreement on every rank, if one of them has not `agreed`."""
        if min(self._ranks.all(int(agreed))) == 0:
            raise Disagreement
