"""Finds the tensors that a call of a unit reaches through its arguments: in lists, dicts and objects (carriers).

Layers use such objects to hand tensors to later layers: a dict of keys and values, a list, a cache. `Reach` walks
through them, whatever their class, and notes what each object holds. With that the tape can let the objects hold other
tensors during a call, see which tensors the call has replaced or added, and put the objects back as they were.

A function holds the variables of its closure; a partial holds its arguments. The walk ends at modules, at classes, at
values such as strings and dtypes, and at objects that hide their state from Python.
"""

from __future__ import annotations

import enum
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zinf_cli.engine.units.tiles import Bodiless
from zinf_cli.errors import ModelError

MOST_OBJECTS = 100_000
"""The most objects in the arguments of one call. With more, the walk has found its way into the whole program."""

_Place = tuple[str, Any]
"""The place of a value in an object: ("item", key or index), ("attribute", name), ("slot", its descriptor), ("cell",
its number in a closure) or ("partial", 0 for the function, 1 for its arguments, 2 for its named arguments)."""

BARE = frozenset({dict, list, set})
"""Types of objects that hold items and nothing else. Most objects that models keep are of these."""
_ENDS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type,
    enum.Enum,
    types.BuiltinFunctionType,
    types.ModuleType,
    nn.Module,
    torch.Size,
    torch.dtype,
    torch.device,
    torch.Generator,
    Bodiless,
)


@dataclass
class Carrier:
    """An object, and what it holds at some moment."""

    owner: Any
    held: dict[_Place, Any]

    def with_each(self, replace: Callable[[Any], Any]) -> Carrier:
        """The same object with `replace(value)` in place of each value. In a tuple, each part is replaced."""
        return Carrier(self.owner, {place: mapped(value, replace) for place, value in self.held.items()})

    def put(self) -> None:
        """Make the object hold `held` again."""
        _write(self.owner, self.held)


class Reach:
    """All that can be reached from `roots`. The order depends only on how the objects are nested."""

    def __init__(self, roots: Sequence[Any], most: int = MOST_OBJECTS) -> None:
        self._roots = roots
        self.tensors: list[torch.Tensor] = []
        """The tensors inside objects, each once."""
        self.carriers: list[Carrier] = []
        seen = {id(root) for root in roots if isinstance(root, torch.Tensor)}
        ahead = [root for root in reversed(roots) if not isinstance(root, torch.Tensor)]
        while ahead:
            value = ahead.pop()
            if isinstance(value, tuple):
                ahead.extend(reversed(value))
            elif isinstance(value, types.MethodType):
                ahead.append(value.__self__)
            elif ends_walk(value) or id(value) in seen:
                continue
            elif isinstance(value, torch.Tensor):
                seen.add(id(value))
                self.tensors.append(value)
            elif holds_values(value):
                seen.add(id(value))
                self.carriers.append(Carrier(value, read_carrier(value)))
                ahead.extend(reversed(self.carriers[-1].held.values()))
                if len(seen) > most:
                    raise ModelError(f"an argument of a layer holds more than {most} objects")

    def after(self, outputs: Any) -> Reach:
        """A new walk, after a call has returned `outputs`: from the same roots, and from the objects in `outputs`."""
        objects = [leaf for leaf in pytree.tree_leaves(outputs) if not isinstance(leaf, torch.Tensor)]
        return Reach([*self._roots, *objects])

    def added_since(self, before: Reach) -> list[torch.Tensor]:
        """Tensors that can have a gradient and that `before` did not reach."""
        known = {id(tensor) for tensor in before.tensors}
        known |= {id(root) for root in self._roots if isinstance(root, torch.Tensor)}
        return [tensor for tensor in self.tensors if id(tensor) not in known and differentiable(tensor)]

    def put(self, replace: Callable[[Any], Any] | None = None) -> None:
        """Make all objects hold again what they held, with `replace(value)` in place of each value."""
        for carrier in self.carriers:
            (carrier.with_each(replace) if replace is not None else carrier).put()


def differentiable(value: Any) -> bool:
    """Whether `value` is a tensor that can have a gradient."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def opened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's arguments. A list or dict is one leaf, since a call may change it: `Reach` opens it."""
    return pytree.tree_flatten((args, kwargs), lambda value: value is not kwargs and not isinstance(value, tuple))


def mapped(value: Any, replace: Callable[[Any], Any]) -> Any:
    """`replace(value)`. Of a tuple, each part is replaced; if that changes none, the same tuple is returned."""
    if type(value) is torch.Size or not isinstance(value, tuple):
        return replace(value)
    values = [mapped(part, replace) for part in value]
    if all(new is old for new, old in zip(values, value, strict=True)):
        return value
    if hasattr(value, "_make"):  # a named tuple
        return value._make(values)
    return tuple(values) if type(value) is tuple else type(value)(values)


def parts_of(value: Any) -> Iterator[Any]:
    """`value`, or the parts of a tuple. Other objects are not opened: they are carriers themselves."""
    if type(value) is torch.Size or not isinstance(value, tuple):
        yield value
    else:
        for part in value:
            yield from parts_of(part)


def ends_walk(value: Any) -> bool:
    """Whether the walk goes no further than `value`."""
    return isinstance(value, _ENDS)


def holds_values(value: Any) -> bool:
    return isinstance(value, list | dict | set | deque) or hasattr(value, "__dict__") or bool(_slots(value))


def read_carrier(owner: Any) -> dict[_Place, Any]:
    held: dict[_Place, Any] = {}
    if isinstance(owner, dict):
        keys = OrderedDict.keys(owner) if isinstance(owner, OrderedDict) else dict.keys(owner)
        held.update((("item", key), dict.__getitem__(owner, key)) for key in keys)
    elif isinstance(owner, list | set | deque):
        held.update((("item", index), value) for index, value in enumerate(iter(owner)))
    elif isinstance(owner, partial):
        held.update(
            (("partial", number), value) for number, value in enumerate((owner.func, owner.args, owner.keywords))
        )
    elif isinstance(owner, types.FunctionType):
        cells = enumerate(owner.__closure__ or ())
        held.update((("cell", number), cell.cell_contents) for number, cell in cells if is_filled(cell))
    if type(owner) in BARE:
        return held
    held.update((("attribute", name), value) for name, value in getattr(owner, "__dict__", {}).items())
    for slot in _slots(owner):
        try:
            held["slot", slot] = slot.__get__(owner)
        except AttributeError:
            continue
    return held


def _write(owner: Any, held: dict[_Place, Any]) -> None:
    """Make `owner` hold `held`, without the methods of its own class: these may do more than to store a value."""
    before = read_carrier(owner)
    if list(before) == list(held) and all(before[place] is value for place, value in held.items()):
        return
    items = {key: value for (kind, key), value in held.items() if kind == "item"}
    attributes = {name: value for (kind, name), value in held.items() if kind == "attribute"}
    if isinstance(owner, OrderedDict):
        _fill_dict(OrderedDict, owner, items)
    elif isinstance(owner, dict):
        _fill_dict(dict, owner, items)
    elif isinstance(owner, list):
        list.__setitem__(owner, slice(None), list(items.values()))
    elif isinstance(owner, deque):
        deque.clear(owner)
        deque.extend(owner, items.values())
    elif isinstance(owner, set):
        set.clear(owner)
        set.update(owner, items.values())
    elif isinstance(owner, partial):
        owner.__setstate__((*(held["partial", number] for number in range(3)), owner.__dict__))  # type: ignore[attr-defined]
    elif isinstance(owner, types.FunctionType):
        for number, cell in enumerate(owner.__closure__ or ()):
            if ("cell", number) in held:
                cell.cell_contents = held["cell", number]
    if hasattr(owner, "__dict__"):
        owner.__dict__.clear()
        owner.__dict__.update(attributes)
    for slot in _slots(owner):
        if ("slot", slot) in held:
            slot.__set__(owner, held["slot", slot])
        elif ("slot", slot) in before:
            slot.__delete__(owner)


def is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _fill_dict(kind: Any, owner: Any, items: dict[Any, Any]) -> None:
    if list(kind.keys(owner)) != list(items):
        kind.clear(owner)
    for key, value in items.items():
        kind.__setitem__(owner, key, value)


def _slots(owner: Any) -> Sequence[types.MemberDescriptorType]:
    kind: Any = type(owner)
    return _slots_of(kind)


@cache
def _slots_of(kind: Any) -> Sequence[types.MemberDescriptorType]:
    """Those of the objects of a class."""
    return [
        slot
        for base in kind.__mro__
        if "__slots__" in base.__dict__
        for slot in base.__dict__.values()
        if isinstance(slot, types.MemberDescriptorType)
    ]
