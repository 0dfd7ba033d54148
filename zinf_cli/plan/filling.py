"""Which units fill the memory that a placement leaves: with activations, or with all of their state."""

from __future__ import annotations

from collections.abc import Iterator

from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import KEPT_MORE, Choice, activations_left, cached_cost, glue_leaves, staying_cost


def spread(number: int) -> float:
    """A key by which any first few numbers of a row are spread evenly over it: multiples of the golden ratio are so,
    modulo 1."""
    return number * 0.618034 % 1


def keepable(figures: Figures, choice: Choice, room: int) -> frozenset[int]:
    """The units whose activations fit in `room` more bytes. Those that spare the most compute per byte come first.
    Of units that are alike, those with less compute in backward are spread among the others: so are the bytes that
    each sends meanwhile."""
    kept = []
    model = figures.model
    costs = {
        number: max(1, choice.per_sweep * (int(unit.saved_bytes * KEPT_MORE) - unit.input_bytes))
        for number, unit in enumerate(model.units)
        if number in model.order and number != model.turn
    }
    for number in sorted(costs, key=lambda number: (costs[number] / max(1, model.units[number].numel), spread(number))):
        if costs[number] <= room:
            kept.append(number)
            room -= costs[number]
    return frozenset(kept)


def stayable(figures: Figures, choice: Choice, room: int) -> frozenset[int]:
    """The units whose activations may stay in `room` bytes, though their tier is another; spread over the sweep.

    Of a model in parts a tier takes much more than of whole blocks: each part's inputs, and what is saved between them.
    Of a whole block the latter is in memory for as long as the block is computed.
    """
    if not glue_leaves(figures, choice) or not figures.model.surveyed:
        return frozenset()
    units = range(len(figures.model.units))
    cost = {number: staying_cost(choice, sum(left)) for number, left in enumerate(activations_left(figures, choice))}
    if sum(cost.values()) <= room:  # then those without a cost find all that they need in memory
        return frozenset(units)
    staying = []
    for number in sorted(units, key=spread):
        if 0 < cost[number] <= room:
            staying.append(number)
            room -= cost[number]
    return frozenset(staying)


def cacheable(figures: Figures, choice: Choice, room: int) -> list[int]:
    """The units to cache in `room` bytes, the smallest first: so with more room these are among them.

    Those that are alike are spread over the sweep, the first few of them too: while one is computed, the drive brings
    others.
    """
    costs = {
        number: cost
        for number, unit in enumerate(figures.model.units)
        if unit.calls and (cost := cached_cost(figures, choice, number))
    }
    cached = []
    for number in sorted(costs, key=lambda number: (costs[number], spread(number))):
        room -= costs[number]
        if room < 0:
            break
        cached.append(number)
    return cached


def cacheable_on_device(figures: Figures, choice: Choice, room: int) -> Iterator[frozenset[int]]:
    """Units to cache in `room` bytes of the device: one, two, four, and so on, the most worth it first.

    Forward begins with the first one on the route, whose update is the last to come back, and backward with the last
    one. So their bytes have least compute to hide behind. The others are spread over the sweep.
    """
    model = figures.model
    ends = {*model.order[:1], *model.order[-1:]}
    cached: list[int] = []
    for number in sorted(model.order, key=lambda number: (number not in ends, spread(number))):
        room -= cached_cost(figures, choice, number)
        if room < 0 or number in cached:
            break
        cached.append(number)
        if len(cached).bit_count() == 1:
            yield frozenset(cached)
