"""The route: the order in which a sweep is expected to visit units (see "The route" in sweep.py).

Experts that were cut apart (tiles.py) are *on demand*. Which of a layer's experts a sweep visits shows only when its
tokens are routed. So the route says where a layer's experts come, and not which of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.units import UnitLayout

Experts = tuple[int, ...]
"""Units that have a layer's experts, in order."""


@dataclass
class Route:
    """The visits of the last sweep, which are expected of the next."""

    forward: list[int]
    """Without experts."""
    backward: list[int]
    """Without experts and without the turn."""
    experts: Mapping[int, Sequence[Experts]]
    """The layers whose experts come before a unit of `forward`, by its place."""

    @classmethod
    def expected(cls, called: Sequence[int], learned: Sequence[int] | None, layers: Mapping[int, Experts]) -> Route:
        """The route of a forward that calls these units. Those `learned` have a backward; without it all have one."""
        back = list(called if learned is None else learned)
        return cls.of(called, back[-2::-1] if back[-1:] == list(called[-1:]) else back[::-1], layers)

    @classmethod
    def of(cls, called: Sequence[int], backward: Sequence[int], layers: Mapping[int, Experts]) -> Route:
        """The route of a forward that has `called` these units. `backward` has those behind the turn, newest first."""
        forward: list[int] = []
        experts: dict[int, list[Experts]] = {}
        for unit in called:
            if (layer := layers.get(unit)) is None:
                forward.append(unit)
            elif layer not in experts.setdefault(len(forward), []):
                experts[len(forward)].append(layer)
        return cls(forward, [unit for unit in backward if unit not in layers], experts)

    def forward_visits(self, *, turn: bool) -> Iterator[Visit]:
        """Those before the turn, or all of them. Each layer of experts has an OPEN visit."""
        for place, unit in enumerate(self.forward):
            for experts in self.experts.get(place, ()):
                yield Visit(experts[0], Kind.OPEN)
            if not turn or place < len(self.forward) - 1:
                yield Visit(unit, Kind.FORWARD)

    def turn_and_backward(self, backwards: Counter[int], *, last: bool) -> Iterator[Visit]:
        """The other visits. The arguments are those of `back_visits`."""
        return back_visits(self.forward[-1:] + self.backward, backwards, turns=True, last=last)


def layers_of_experts(layouts: Sequence[UnitLayout]) -> dict[int, Experts]:
    """The layer of each unit that has experts, by the unit's number."""
    lists: dict[str, list[int]] = {}
    for number, layout in enumerate(layouts):
        if layout.on_demand:
            lists.setdefault(layout.modules[0].rpartition(".")[0], []).append(number)
    return {number: tuple(numbers) for numbers in lists.values() for number in numbers}


def back_visits(units: Sequence[int], backwards: Counter[int], *, turns: bool, last: bool) -> Iterator[Visit]:
    """The visits of a sweep's backward, of which the first one may be the turn. `last`: no sweep of the step follows.

    `backwards` counts the backward visits of the step by unit, and these, too.
    """
    left = Counter(units)
    for place, unit in enumerate(units):
        left[unit] -= 1
        kind = Kind.TURN if turns and not place else Kind.BACKWARD
        yield Visit(unit, kind, nth=backwards[unit], final=last and not left[unit])
        backwards[unit] += 1


def recorded(visited: Sequence[int], records: Sequence[list[int]], layers: Mapping[int, Experts]) -> list[bool]:
    """Whether a micro-batch has recorded a call, of each visit. `records`: the units that each has recorded, in order.

    The visit of an expert has all calls that follow each other, any other visit has one.
    """
    found = [False] * len(visited)
    for units in records:
        left = list(units)
        for place in reversed(range(len(visited))):
            while left and left[-1] == visited[place]:
                found[place] = True
                left.pop()
                if visited[place] not in layers:
                    break
    return found
