"""One order of gathers and reductions on all ranks, where a backend needs that: "Order of collectives" in ranks.py.

When the bytes of a coming unit have been read depends on a rank's drives, so a rank alone can't decide to gather ahead.
All ranks make the same visits, so they meet at the same points: when a visit has its unit, and when it ends, before its
gradient is reduced. At each point a rank offers the gathers that it is ready for, and those begin that every rank had
offered at the point before. The offers travel while the visit is computed, so nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, takewhile

from zinf_cli.engine.ranks import Least, Ranks
from zinf_cli.engine.traffic.fetch import Fetch


class OneOrder:
    """Which of the announced fetches may gather before their visit."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._needed = ranks.world_size > 1 and ranks.whole
        self._visits = 0
        """Announced visits that have their unit. Offers count from the first one on, whenever they were made."""
        self._offered: Least | None = None

    def may_gather(self, fetch: Fetch) -> bool:
        """Whether its gather may begin, or go on, as soon as its bytes are there."""
        return fetch.gathering or not self._needed

    def visited(self, coming: Iterable[Fetch]) -> None:
        """The first of the announced visits has its unit; `coming` are the fetches of the others."""
        self._visits += 1
        self.meet(coming)

    def meet(self, coming: Iterable[Fetch]) -> None:
        """A point that all ranks come to between the same visits: begin what all have offered, and offer anew."""
        if not self._needed:
            return
        for fetch in islice(coming, self._agreed()):
            fetch.start_gather()
        ready = list(takewhile(lambda fetch: not fetch.open and fetch.prepare(), coming))
        self._offered = self._ranks.least(self._visits + len(ready))

    def withdraw(self) -> None:
        """The announced visits change, on all ranks: what was offered begins when its visit comes."""
        self._agreed()

    def _agreed(self) -> int:
        """How many of the coming fetches all ranks have offered."""
        offered, self._offered = self._offered, None
        return 0 if offered is None else max(0, offered.wait() - self._visits)
