"""Placements: which tier each class of state lies on. Lists them all, and of those that fit, the ones worth timing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

TIERS = ("device", "cpu", "nvme")
"""Fastest first."""
T = TypeVar("T")


def placements(asked: Mapping[str, str], compute_tier: str) -> Iterator[dict[str, str]]:
    """Every placement that leaves the classes where `asked` pins them ("auto" pins none); the fastest first, the most
    frugal last."""
    free = TIERS[TIERS.index(compute_tier) :]
    for tiers in itertools.product(*(free if tier == "auto" else (tier,) for tier in asked.values())):
        yield dict(zip(asked, tiers, strict=True))


def undominated(items: Sequence[tuple[Mapping[str, str], T]]) -> list[T]:
    """The items whose placement no other beats. A placement beats another if each class lies on a tier as fast or
    faster."""

    def as_fast(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
        return all(TIERS.index(one[state]) <= TIERS.index(other[state]) for state in other)

    return [
        item
        for placement, item in items
        if not any(other != placement and as_fast(other, placement) for other, _ in items)
    ]
