"""Which tier each class of state lies on: all ways there are, and of those that fit the ones worth timing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

TIERS = ("device", "cpu", "nvme")
"""Fastest first."""
T = TypeVar("T")


def placements(asked: Mapping[str, str], compute_tier: str) -> Iterator[dict[str, str]]:
    """Every placement that keeps the classes the user pinned; the fastest first, the most frugal last."""
    free = TIERS[TIERS.index(compute_tier) :]
    for tiers in itertools.product(*(free if tier == "auto" else (tier,) for tier in asked.values())):
        yield dict(zip(asked, tiers, strict=True))


def undominated(items: Sequence[tuple[Mapping[str, str], T]]) -> list[T]:
    """Those for whose placement there is no other with every class on a tier as fast or faster."""

    def as_fast(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
        return all(TIERS.index(one[state]) <= TIERS.index(other[state]) for state in other)

    return [
        item
        for placement, item in items
        if not any(other != placement and as_fast(other, placement) for other, _ in items)
    ]
