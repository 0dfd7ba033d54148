"""Finds the rank that holds up a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

STRAGGLING = 0.2
"""The share of a step that the others have to wait longer, for a rank to count as the slowest."""


def straggler_of(waits: Sequence[float], step_s: float) -> int | None:
    """The rank that the others wait for, found by the seconds that each has waited in a step. None if there is none.

    All ranks end a step at the same time, so the slowest waits least. It counts if the others, by their median, wait a
    fifth of the step longer.
    """
    if len(waits) < 2:
        return None
    least = min(range(len(waits)), key=lambda rank: waits[rank])
    others = statistics.median(wait for rank, wait in enumerate(waits) if rank != least)
    return least if others - waits[least] > STRAGGLING * step_s else None
