"""Which unit a sweep visits next, when its members and other ranks call several.

Members of one sweep share every visit, so they have to call the same units in the same order. Experts that were cut
apart (tiles.py) are *on demand*: each member calls those that its tokens are routed to. In forward the least expert
that a member calls is visited first, until no member calls one; then all of them call the same ordinary unit again. In
backward the greatest comes first in the same manner.
"""

from __future__ import annotations

from collections.abc import Callable

from zinf_cli.engine.ranks import Ranks


class Disagreement(Exception):  # noqa: N818 (it is no error: the engine goes on)
    """Micro-batches can't share a sweep: they call different units next, or one changes what another reads."""


_NOTHING, _PARTED = -1, -2
"""What a rank tells instead of a unit: its micro-batches have ended; they call different units."""


class NextUnit:
    """The choice of the next unit, the same on every rank."""

    def __init__(self, ranks: Ranks, on_demand: frozenset[int]) -> None:
        self._ranks = ranks
        self._on_demand = on_demand

    def of(self, called: set[int | None], choose: Callable[[list[int]], int]) -> int | None:
        """The unit to visit next; None at the end. `choose` picks it among experts, or among the units of ranks."""
        experts = [unit for unit in called if unit in self._on_demand and unit is not None]
        if experts:
            called = {choose(experts)}
        if self._ranks.world_size == 1:
            self.agree(len(called) == 1)
            return called.pop()
        mine = _PARTED if len(called) > 1 else _NOTHING if called == {None} else called.pop()
        units = self._ranks.all(mine if mine is not None else _NOTHING)
        experts = [unit for unit in units if unit in self._on_demand]
        if experts:
            return choose(experts)
        if _PARTED in units:
            raise Disagreement
        wanted = [unit for unit in units if unit != _NOTHING]
        return choose(wanted) if wanted else None

    def agree(self, agreed: bool) -> None:
        """Raise Disagreement on every rank, if one of them has not `agreed`."""
        if min(self._ranks.all(int(agreed))) == 0:
            raise Disagreement
