"""What a place of a model holds at a moment, as a copy that is compared and put back (moving_state.py).

A value that can't change is held as it is. Of a list, dict, set or object its items are held, and those of what they
lead to; of a tensor, an array or a generator a copy of its state. Weights are left out: updates alone change them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from operator import is_
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from zinf_cli.engine.compute.carriers import BARE, Carrier, ends_walk, holds_values, read_carrier
from zinf_cli.engine.compute.spaces import PLAIN
from zinf_cli.engine.units.tiles import TiledWeight
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
class Held:
    """What a place held at some moment, with all that was reached from there and from no earlier place."""

    value: Any
    carriers: Sequence[Carrier] = ()
    states: Sequence[tuple[Any, Any]] = ()
    """(object, its state)."""

    def same_as(self, other: Held) -> bool:
        return (
            _same(self.value, other.value)
            and len(self.carriers) == len(other.carriers)
            and len(self.states) == len(other.states)
            and all(map(_same_carrier, self.carriers, other.carriers))
            and all(_same(one, two) for (_, one), (_, two) in zip(self.states, other.states, strict=True))
        )


States = Mapping[int, tuple[Any, Any]]
"""(object, its state), by the object's id."""


@dataclass(frozen=True)
class Settled:
    """A module at the last look, if nothing that its places held then can change unseen.

    A model with adapters has thousands of modules, and few of them keep more. So these are compared at once.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    """All of its attributes."""
    own: frozenset[int]
    """The ids of the lists, dicts and sets that they lead to, and that no earlier place leads to."""
    shared: frozenset[int]
    """Those of the lists, dicts and sets among them that earlier places lead to."""
    empty: Sequence[Any]
    filled: Sequence[Carrier]

    @classmethod
    def found(cls, owner: Any, held: Mapping[str, Held]) -> Settled | None:
        """What is settled of the space of `owner`, whose places hold `held`; None if that is no such module."""
        containers = [one for one in held.values() if type(one.value) not in PLAIN]
        carriers = [carrier for one in containers for carrier in one.carriers]
        own = frozenset(id(carrier.owner) for carrier in carriers)
        shared = frozenset(id(one.value) for one in containers if not one.carriers)
        bare = all(type(one.value) in BARE and not one.states for one in containers)
        if not isinstance(owner, nn.Module) or owner._buffers or not bare or not own.isdisjoint(shared):
            return None
        filled = [carrier for carrier in carriers if carrier.held]
        if not all(_holds_the_same(carrier, own) for carrier in filled):
            return None
        empty = [carrier.owner for carrier in carriers if not carrier.held]
        return cls(owner, vars(owner).copy(), own, shared, empty, filled)

    def is_so(self, seen: set[int]) -> bool:
        """Whether the module still holds the same; then `seen` gets the ids of its containers."""
        now, before = vars(self.module), self.variables
        if list(now) != list(before) or not all(map(is_, now.values(), before.values())) or self.module._buffers:
            return False
        if any(self.empty) or not self.own.isdisjoint(seen) or not self.shared <= seen:
            return False
        if not all(_holds_the_same(carrier, self.own) for carrier in self.filled):
            return False
        seen |= self.own
        return True


def held_now(value: Any, seen: set[int], known: States, asked: list[torch.Tensor] | None = None) -> Held:
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
    return Held(value, carriers, states)


def is_still(value: Any, known: Held, seen: set[int]) -> bool:
    """Whether `value` is the list, dict or set that was `known`, with the very items, none of which can change.

    Items may be such containers. Most objects that models keep are like this, so that nothing is made anew for them.
    `seen` has the ids of what earlier places lead to, and gets those of what this one does.
    """
    if known.value is not value or known.states or type(value) not in BARE:
        return False
    if not known.carriers:  # it belongs to an earlier place
        return id(value) in seen
    own = {id(carrier.owner) for carrier in known.carriers}
    if not own.isdisjoint(seen) or not all(_holds_the_same(carrier, own) for carrier in known.carriers):
        return False
    seen |= own
    return True


def _holds_the_same(carrier: Carrier, own: Set[int]) -> bool:
    """Whether a list, dict or set has its items still, and these are values that can't change, or in `own`."""
    owner, held = carrier.owner, carrier.held
    if type(owner) not in BARE or len(owner) != len(held):
        return False
    keyed = type(owner) is dict
    return all(
        old is item and (type(item) in PLAIN or id(item) in own) and (not keyed or place[1] is key)
        for (place, old), (key, item) in zip(held.items(), owner.items() if keyed else enumerate(owner), strict=True)
    )


def _still(tensor: torch.Tensor, state: torch.Tensor, asked: list[torch.Tensor] | None) -> bool:
    """Whether a tensor still holds `state`, or is taken to: see `held_now`."""
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
