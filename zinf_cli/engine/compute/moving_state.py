"""Follows what a forward changes in the model itself: buffers (of BatchNorm), attributes, counters, generators.

Plain PyTorch runs one micro-batch after the other, and each layer once. In a sweep all micro-batches pass a unit before
any goes on, and a unit runs again in backward. A call that reads what an earlier call has left in the model would read
something else. So `MovingState` compares the whole model before a step's first unit and after a sweep's last. If
something has moved, the model is put back, and the step begins again with one micro-batch a sweep, in plain PyTorch's
order. From then on every call notes what the places that move hold, and its recompute finds the same there.

What lies on an accelerator is compared there, and the answers come back together, once: at the end of a sweep's
forward, when they are needed. To wait for each of them would hold up the CPU until the device has come so far.

A place is a variable of a space (spaces.py): an attribute or buffer of a module, an attribute of a class, a global or a
closure that the model's code names. What can be reached from there is part of it. The global generators of Python and
numpy are places, too. Objects that hide their state from Python (an iterator, a file) are not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from zinf_cli.engine.compute.carriers import Reach
from zinf_cli.engine.compute.held import WEIGHTS, Held, Settled, States, held_now, is_still, stateful
from zinf_cli.engine.compute.spaces import ABSENT, PLAIN, Search
from zinf_cli.errors import ModelError

Moment = dict[tuple[str, str], Held]
"""What places held, by space and name."""
_Look = dict[str, dict[str, Held]]
"""The same of all places, by space and then by name."""
_ABSENT = Held(ABSENT)


class MovingState:
    """The places of a model that its forward changes."""

    def __init__(self, model: nn.Module, is_of_weight: Callable[[torch.Tensor], bool] = lambda tensor: False) -> None:
        """`is_of_weight(tensor)`: whether a tensor shares its memory with weights."""
        self._search = Search(model)
        self._is_of_weight = is_of_weight
        self._new = True
        """Whether there may be spaces that the search has not found yet."""
        self._before: _Look = {}
        self._settled: dict[str, Settled | None] = {}
        """By space, of those that are compared at once."""
        self._last: Moment = {}
        self._states: States = {}
        """States of the last look at the whole model. An object that still holds its state is not copied again."""
        self._asked: list[tuple[tuple[str, str], torch.Tensor]] = []
        """(place, whether it holds something else than at `begin`: a bool scalar on an accelerator), not read yet."""
        self._moved: set[tuple[str, str]] = set()
        self.moving: set[tuple[str, str]] = set()
        """The places that are known to move."""
        self.changed: set[tuple[str, str]] = set()
        """The places that have ever moved."""

    def begin(self) -> None:
        """Look at the model, before a step or an evaluation."""
        if self._new:
            self._search.look()
            self._new = False
            self._refuse_weights_beside()
        self.changed |= self.moved
        self._moved.clear()
        self._before = self._now()

    def look(self) -> None:
        """See what has moved since `begin`."""
        now, before = self._now(self._asked), self._before
        for label in before.keys() | now.keys():
            held, known = now.get(label, {}), before.get(label, {})
            if held is not known:
                self._moved |= {(label, name) for name in known.keys() - held.keys()}
                self._moved |= {
                    (label, name)
                    for name, one in held.items()
                    if (other := known.get(name, _ABSENT)) is not one and not one.same_as(other)
                }

    @property
    def moved(self) -> set[tuple[str, str]]:
        """The places that were seen to hold something else than at `begin`, also if they hold the same again."""
        if self._asked and torch.stack([differs for _, differs in self._asked]).any().item():
            self._moved |= {place for place, differs in self._asked if differs.item()}
        self._asked.clear()
        return self._moved

    def notices(self) -> bool:
        """Whether a place has moved since `begin` that was not known to move. It is known from then on."""
        self.look()
        new = self.moved - self.moving
        self.refuse_views(new)
        self.moving |= new
        self._new |= bool(new)
        return bool(new)

    @property
    def may_leak(self) -> bool:
        """Whether a forward may leave tensors where the next layers find them, as far as is known."""
        return bool(self.moving) or self._search.hides

    def refuse_views(self, places: Iterable[tuple[str, str]] | None = None) -> None:
        """ModelError if one of the `places`, or of all, holds a view of a weight. It would not follow the weight."""
        for place in _flat(self._now()) if places is None else places:
            value = self.value(place)
            for tensor in [value] if isinstance(value, torch.Tensor) else Reach([value], most=sys.maxsize).tensors:
                if not isinstance(tensor, WEIGHTS) and self._is_of_weight(tensor):
                    raise ModelError(
                        f"the model keeps a view of a weight in {named(place)}, which does not follow the weight",
                        hint="a copy of it, or the parameter itself, can be kept",
                    )

    def _refuse_weights_beside(self) -> None:
        """ModelError if a module that is none of the model's has weights, which nothing would fill."""
        for label, module in self._search.modules_beside():
            if any(param.is_meta for param in module.parameters(recurse=False)):
                raise ModelError(
                    f"{label} has parameters, and is no module of the model's own: nothing would load or train them",
                    hint="a module in a list or dict belongs into an nn.ModuleList or nn.ModuleDict",
                )

    def found(self, space: str) -> bool:
        """Whether the model has a space of that name."""
        if self._new:
            self._search.look()
            self._new = False
        return space in self._search.spaces

    def value(self, place: tuple[str, str]) -> Any:
        """What a place holds; ABSENT for nothing."""
        return self._search.spaces[place[0]].values().get(place[1], ABSENT)

    def put(self, place: tuple[str, str], value: Any) -> None:
        """Make a place hold `value`. It counts as one that has moved."""
        self.changed.add(place)
        self._search.spaces[place[0]].put(place[1], value)

    def put_back(self) -> None:
        """Put the model back to what it was at `begin`."""
        self.go_to({**dict.fromkeys(_flat(self._now()), _ABSENT), **_flat(self._before)})

    def moment(self) -> Moment:
        """What the places that move hold now. A place that is unchanged since the last moment is not copied again."""
        last = self._last
        self._last = {
            place: last[place] if place in last and held.same_as(last[place]) else held
            for place, held in self._of_those_that_move().items()
        }
        self._moved |= {
            (label, name)
            for (label, name), held in self._last.items()
            if not held.same_as(self._before.get(label, {}).get(name, _ABSENT))
        }
        return self._last

    def go_to(self, moment: Moment) -> None:
        """Make the places hold what they held at `moment`."""
        for (space, name), held in moment.items():
            self._search.spaces[space].put(name, held.value)
            for carrier in held.carriers:
                carrier.put()
            for owner, state in held.states:
                stateful(owner)[1](owner, state)

    def _now(self, asked: list[tuple[tuple[str, str], torch.Tensor]] | None = None) -> _Look:
        """What all places hold. Objects on an accelerator are copied or, with `asked`, taken to be as they were at the
        last look, and compared with that there: `asked` gets the answers to come."""
        seen: set[int] = set()
        now: _Look = {}
        for label, space in self._search.spaces.items():
            settled, known = self._settled.get(label), self._before.get(label, {})
            if settled is not None and settled.is_so(seen):
                now[label] = known
                continue
            now[label] = held = {}
            for name, value in space.values().items():
                held[name] = self._held_at((label, name), value, known.get(name), seen, asked)
            if len(held) == len(known) and all(known.get(name) is one for name, one in held.items()):
                now[label] = known
            self._settled[label] = Settled.found(space.owner, held) if now[label] is known else None
        self._states = {
            id(pair[0]): pair
            for label, held in now.items()
            if self._settled[label] is None
            for one in held.values()
            for pair in one.states
        }
        return now

    def _held_at(
        self,
        place: tuple[str, str],
        value: Any,
        known: Held | None,
        seen: set[int],
        asked: list[tuple[tuple[str, str], torch.Tensor]] | None,
    ) -> Held:
        """What a place holds now, as `known` if it is that."""
        if type(value) in PLAIN:  # most values: what was held before is that same object
            return known if known is not None and known.value is value else Held(value)
        if known is not None and is_still(value, known, seen):
            return known
        answers: list[torch.Tensor] | None = None if asked is None else []
        held = held_now(value, seen, self._states, answers)
        if asked is not None:
            asked.extend((place, differs) for differs in answers or ())
        return held

    def _of_those_that_move(self) -> Moment:
        seen: set[int] = set()
        values = {label: self._search.spaces[label].values() for label, _ in self.moving}
        return {
            (label, name): held_now(values[label].get(name, ABSENT), seen, {}) for label, name in sorted(self.moving)
        }


def _flat(look: _Look) -> Moment:
    return {(label, name): held for label, part in look.items() for name, held in part.items()}


def named(place: tuple[str, str]) -> str:
    """A place in words for the user."""
    return ".".join(part for part in place if part)
