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

import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from zinf_cli.engine.compute.carriers import BARE, Carrier, Reach, ends_walk, holds_values, read_carrier
from zinf_cli.engine.compute.spaces import ABSENT, PLAIN, Search
from zinf_cli.engine.units.tiles import TiledWeight
from zinf_cli.errors import ModelError
from zinf_cli.tiers.streams import streams_of

WEIGHTS = (nn.Parameter, TiledWeight)
"""Classes of what updates alone change."""

_STATEFUL: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    torch.Generator: (lambda own: own.get_state(), lambda own, state: own.set_state(state)),
    random.Random: (lambda own: own.getstate(), lambda own, state: own.setstate(state)),
    np.random.RandomState: (lambda own: own.get_state(), lambda own, state: own.set_state(state)),
    np.random.Generator: (lambda own: own.bit_generator.state, lambda own, state: _set_bits(own, state)),
    np.ndarray: (lambda own: own.copy(), lambda own, state: np.copyto(own, state)),
    torch.Tensor: (lambda own: own.detach().clone(), lambda own, state: _set_values(own, state)),
}
"""Functions that read and that restore the state of an object of a class."""


@dataclass
class _Held:
    """What a place held at some moment, with all that was reached from there and from no earlier place."""

    value: Any
    carriers: Sequence[Carrier] = ()
    states: Sequence[tuple[Any, Any]] = ()
    """(object, its state)."""

    def same_as(self, other: _Held) -> bool:
        return (
            _same(self.value, other.value)
            and len(self.carriers) == len(other.carriers)
            and len(self.states) == len(other.states)
            and all(map(_same_carrier, self.carriers, other.carriers))
            and all(_same(one, two) for (_, one), (_, two) in zip(self.states, other.states, strict=True))
        )


_States = Mapping[int, tuple[Any, Any]]
"""(object, its state), by the object's id."""
Moment = dict[tuple[str, str], _Held]
"""What places held, by space and name."""
_ABSENT = _Held(ABSENT)


class MovingState:
    """The places of a model that its forward changes."""

    def __init__(self, model: nn.Module, is_of_weight: Callable[[torch.Tensor], bool] = lambda tensor: False) -> None:
        """`is_of_weight(tensor)`: whether a tensor shares its memory with weights."""
        self._search = Search(model)
        self._is_of_weight = is_of_weight
        self._new = True
        """Whether there may be spaces that the search has not found yet."""
        self._before: Moment = {}
        self._last: Moment = {}
        self._states: _States = {}
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
        self._moved |= before.keys() - now.keys()
        self._moved |= {
            place
            for place, held in now.items()
            if (known := before.get(place, _ABSENT)) is not held and not held.same_as(known)
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
        for place in self._now() if places is None else places:
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
        self.go_to({**dict.fromkeys(self._now(), _ABSENT), **self._before})

    def moment(self) -> Moment:
        """What the places that move hold now. A place that is unchanged since the last moment is not copied again."""
        last = self._last
        self._last = {
            place: last[place] if place in last and held.same_as(last[place]) else held
            for place, held in self._of_those_that_move().items()
        }
        self._moved |= {
            place for place, held in self._last.items() if not held.same_as(self._before.get(place, _ABSENT))
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

    def _now(self, asked: list[tuple[tuple[str, str], torch.Tensor]] | None = None) -> Moment:
        """What all places hold. Objects on an accelerator are copied or, with `asked`, taken to be as they were at the
        last look, and compared with that there: `asked` gets the answers to come."""
        seen: set[int] = set()
        now: Moment = {}
        for label, space in self._search.spaces.items():
            for name, value in space.values().items():
                place = label, name
                known = self._before.get(place)
                if type(value) in PLAIN:  # most values: what was held before is that same object
                    now[place] = known if known is not None and known.value is value else _Held(value)
                elif known is not None and id(value) not in seen and _is_still(value, known):
                    seen.add(id(value))
                    now[place] = known
                else:
                    answers: list[torch.Tensor] | None = None if asked is None else []
                    now[place] = _held(value, seen, self._states, answers)
                    if asked is not None:
                        asked.extend((place, differs) for differs in answers or ())
        self._states = {id(pair[0]): pair for held in now.values() for pair in held.states}
        return now

    def _of_those_that_move(self) -> Moment:
        seen: set[int] = set()
        values = {label: self._search.spaces[label].values() for label, _ in self.moving}
        return {(label, name): _held(values[label].get(name, ABSENT), seen, {}) for label, name in sorted(self.moving)}


def named(place: tuple[str, str]) -> str:
    """A place in words for the user."""
    return ".".join(part for part in place if part)


def _held(value: Any, seen: set[int], known: _States, asked: list[torch.Tensor] | None = None) -> _Held:
    """What `value` holds now. The state of an object is taken from `known` if the object still holds it.

    Whether one on an accelerator does is not known yet: with `asked`, which gets the answer to come, it is taken to do.
    """
    carriers: list[Carrier] = []
    states: list[tuple[Any, Any]] = []
    ahead = [value]
    while ahead:
        part = ahead.pop()
        kind = type(part)
        if kind in PLAIN or id(part) in seen:
            continue
        if kind in BARE:
            seen.add(id(part))
            carriers.append(Carrier(part, read_carrier(part)))
            ahead.extend(reversed(carriers[-1].held.values()))
        elif isinstance(part, tuple):
            ahead.extend(reversed(part))
        elif kind is MethodType:
            ahead.append(part.__self__)
        elif isinstance(part, torch.Tensor) and (isinstance(part, WEIGHTS) or part.grad_fn is not None):
            continue  # updates alone change a weight; a tensor with a graph belongs to one call
        elif (access := stateful(part)) is not None:
            seen.add(id(part))
            owner, state = known.get(id(part), (None, None))
            still = owner is part and isinstance(part, torch.Tensor) and _still(part, state, asked)
            states.append((part, state if still else access[0](part)))
        elif not ends_walk(part) and not foreign(kind) and holds_values(part):
            seen.add(id(part))
            carriers.append(Carrier(part, read_carrier(part)))
            ahead.extend(reversed(carriers[-1].held.values()))
    return _Held(value, carriers, states)


def _is_still(value: Any, known: _Held) -> bool:
    """Whether `value` is the list, dict or set that was `known`, with the very items, none of which can change.

    Most objects that models keep are such, so that nothing is made anew for them.
    """
    if type(value) not in BARE or known.value is not value or len(known.carriers) != 1:
        return False
    held, keyed = known.carriers[0].held, isinstance(value, dict)
    return len(held) == len(value) and all(
        old is item and type(item) in PLAIN and (not keyed or before[1] is key)
        for (before, old), (key, item) in zip(held.items(), value.items() if keyed else enumerate(value), strict=True)
    )


def _still(tensor: torch.Tensor, state: torch.Tensor, asked: list[torch.Tensor] | None) -> bool:
    """Whether a tensor still holds `state`, or is taken to: see `_held`."""
    if tensor.is_meta or streams_of(tensor.device).on_cpu:
        return _same(tensor, state)
    if asked is None or not _alike(tensor, state):
        return False
    asked.append((_bits(tensor) != _bits(state)).any())
    return True


def stateful(value: Any) -> Any:
    """The functions that read and restore the state of an object; None if it is not of such a class."""
    return next((_STATEFUL[base] for base in type(value).__mro__ if base in _STATEFUL), None)


def foreign(kind: type) -> bool:
    """Whether a class is one of Python's library (a logger, a lock): its objects lead into the whole program."""
    room = kind.__module__.partition(".")[0]
    own = room in ("builtins", "collections") or kind in (SimpleNamespace, FunctionType, partial)
    return not own and room in sys.stdlib_module_names


def _same(one: Any, two: Any) -> bool:
    """Whether two values are the same. Tensors and arrays are the same if they hold the same bytes."""
    if one is two:
        return True
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return _alike(one, two) and (one.is_meta or torch.equal(_bits(one), _bits(two)))
    if isinstance(one, np.ndarray):
        return one.shape == two.shape and one.dtype == two.dtype and bool(one.tobytes() == two.tobytes())
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(map(_same, one.values(), two.values()))
    return type(one) in PLAIN and repr(one) == repr(two)


def _same_carrier(one: Carrier, two: Carrier) -> bool:
    return (
        one.owner is two.owner
        and list(one.held) == list(two.held)
        and all(map(_same, one.held.values(), two.held.values()))
    )


def _alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers, 1-D. As numbers a NaN would differ from itself, and 0.0 would equal -0.0."""
    if tensor.dtype is torch.bool or tensor.element_size() > 8:
        integer = torch.uint8
    else:  # as wide as an element: torch compares single bytes many times slower
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().reshape(-1).view(integer)


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


def _set_values(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Set values without autograd's count of changes: to a graph that has saved the tensor, it is as it was."""
    if not _same(tensor, values):
        tensor.data = tensor.data if tensor.shape == values.shape else torch.empty_like(values)
        tensor.data.copy_(values)
