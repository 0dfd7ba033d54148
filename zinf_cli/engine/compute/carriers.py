"""What a call of a unit can reach beside its plain arguments: tensors inside lists, dicts and objects it may change.

Layers leave keys and values in a dict for later layers, append to a list they were handed, update a cache object.
`Reach` walks all of that, whatever its class, and remembers what each object holds. So the tape can hand a unit objects
that hold other tensors, see which of them a call has replaced or added, and put the objects back as they were.

A function holds what it has closed over, a partial its arguments. Modules, classes and values such as strings or dtypes
end the walk. So does what hides its state from Python.
"""

from __future__ import annotations

import enum
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zinf_cli.engine.units.tiles import TiledWeight
from zinf_cli.errors import ModelError

MOST_OBJECTS = 100_000
"""In the arguments of one call; what holds more is no argument but the whole program."""

_Place = tuple[str, Any]
"""Where a value stands: ("item", key or index), ("attribute", name), ("slot", its descriptor), ("cell", its
number in a closure) or ("partial", 0 to 2: function, arguments, named arguments)."""

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
    TiledWeight,
)


@dataclass
class Carrier:
    """An object, and what it holds at some moment."""

    owner: Any
    held: dict[_Place, Any]

    def with_each(self, replace: Callable[[Any], Any]) -> Carrier:
        """The same object, to hold each value as `replace` has it (tuples are opened)."""
        return Carrier(self.owner, {place: mapped(value, replace) for place, value in self.held.items()})

    def put(self) -> None:
        """Let the object hold this again."""
        _write(self.owner, self.held)


class Reach:
    """What can be reached from `roots`, in an order that follows from its structure alone."""

    def __init__(self, roots: Sequence[Any], most: int = MOST_OBJECTS) -> None:
        self._roots = roots
        self.tensors: list[torch.Tensor] = []
        """Those inside objects, each once."""
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
        """From the same roots, as it is now that a call has returned `outputs`, and into objects among these."""
        objects = [leaf for leaf in pytree.tree_leaves(outputs) if not isinstance(leaf, torch.Tensor)]
        return Reach([*self._roots, *objects])

    def added_since(self, before: Reach) -> list[torch.Tensor]:
        """Tensors with a gradient that were not there before."""
        known = {id(tensor) for tensor in before.tensors}
        known |= {id(root) for root in self._roots if isinstance(root, torch.Tensor)}
        return [tensor for tensor in self.tensors if id(tensor) not in known and differentiable(tensor)]

    def put(self, replace: Callable[[Any], Any] | None = None) -> None:
        """Let all objects hold this again, each value as `replace` has it."""
        for carrier in self.carriers:
            (carrier.with_each(replace) if replace is not None else carrier).put()


def differentiable(value: Any) -> bool:
    """Whether a gradient can come to it."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def opened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's arguments. A list or dict is one, since a call may change it: `Reach` opens it."""
    return pytree.tree_flatten((args, kwargs), lambda value: value is not kwargs and not isinstance(value, tuple))


def mapped(value: Any, replace: Callable[[Any], Any]) -> Any:
    """`value` as `replace` has it; a tuple, which can't be changed, is made anew where one of its parts differs."""
    if type(value) is torch.Size or not isinstance(value, tuple):
        return replace(value)
    values = [mapped(part, replace) for part in value]
    if all(new is old for new, old in zip(values, value, strict=True)):
        return value
    if hasattr(value, "_make"):  # a named tuple
        return value._make(values)
    return tuple(values) if type(value) is tuple else type(value)(values)


def parts_of(value: Any) -> Iterator[Any]:
    """`value`, or what a tuple holds; not what is in objects, which are carriers of their own."""
    if type(value) is torch.Size or not isinstance(value, tuple):
        yield value
    else:
        for part in value:
            yield from parts_of(part)


def ends_walk(value: Any) -> bool:
    """Whether nothing is to be reached from here."""
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
        held.update((("cell", number), cell.cell_contents) for number, cell in cells if _filled(cell))
    held.update((("attribute", name), value) for name, value in getattr(owner, "__dict__", {}).items())
    for slot in _slots(owner):
        try:
            held["slot", slot] = slot.__get__(owner)
        except AttributeError:
            continue
    return held


def _write(owner: Any, held: dict[_Place, Any]) -> None:
    """Past whatever the class makes of a change: this is no change the model knows of."""
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


def _filled(cell: types.CellType) -> bool:
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
    return [
        slot
        for kind in type(owner).__mro__
        if "__slots__" in kind.__dict__
        for slot in kind.__dict__.values()
        if isinstance(slot, types.MemberDescriptorType)
    ]
