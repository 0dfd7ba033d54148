"""Weights that a model's own forward writes to, as the dry forward shows them.

A forward writes to a copy in a slot, and the write is lost with the slot. One kind of write is kept: Gemma 3n clamps
whole weights to fixed bounds, `weight.data.clamp_(-c, c)`. The layout keeps the bounds with the parameter; the unit's
backward and its update begin by clamping to them. That comes to the same, since nothing but a forward reads a weight
before. All other writes are only named; constant_weights.py refuses those that change something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zinf_cli.engine.units.tiles import Bodiless
from zinf_cli.engine.units.units import UnitLayout

Bounds = tuple[float | None, float | None]

_CLAMPS = {"clamp_": ("min", "max"), "clip_": ("min", "max"), "clamp_min_": ("min",), "clamp_max_": ("max",)}
_NO_WRITE = {"requires_grad_", "detach_", "share_memory_"}
"""They end in "_" as writes in place do, and write nothing."""
_SET_DATA = vars(torch._C.TensorBase)["data"].__set__


class WrittenWeights:
    """Watches functions run, and notices those that write to parameters."""

    def __init__(self) -> None:
        self._params: dict[int, tuple[str, nn.Parameter]] = {}
        self._bounds: dict[str, Bounds] = {}
        self._otherwise: set[str] = set()

    def watch(self, name: str, param: nn.Parameter) -> None:
        """From now on a write to the memory of `param` counts as a write to the parameter `name`."""
        self._params[storage_of(param)] = (name, param)

    def see(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note what `func(*args, **kwargs)`, which is about to run, writes to."""
        name = getattr(func, "__name__", "")
        written = args[0] if func == _SET_DATA else _written(name, args, kwargs)
        for tensor in written if isinstance(written, list | tuple) else (written,):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) in self._params:
                parameter, whole = self._params[storage_of(tensor)]
                bounds = _bounds(name, args[1:], kwargs) if tensor.numel() == whole.numel() else None
                if bounds is None or self._bounds.setdefault(parameter, bounds) != bounds:
                    self._otherwise.add(parameter)

    @property
    def names(self) -> frozenset[str]:
        """Parameters with a write that can't be kept."""
        return frozenset(self._otherwise)

    def bounds_in(self, units: Sequence[UnitLayout]) -> tuple[UnitLayout, ...]:
        """`units` with the bounds that were noticed."""
        return bounded(units, {name: bounds for name, bounds in self._bounds.items() if name not in self._otherwise})


def bounded(units: Sequence[UnitLayout], bounds: Mapping[str, Bounds]) -> tuple[UnitLayout, ...]:
    """`units`, whose parameters have the `bounds` (by parameter name: the least and the most, None where open)."""
    if not bounds:
        return tuple(units)
    return tuple(
        replace(
            unit,
            flats=tuple(
                replace(flat, params=tuple(replace(p, bounds=bounds.get(p.name)) for p in flat.params))
                for flat in unit.flats
            ),
        )
        for unit in units
    )


def _written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function of that name writes to; None where it writes to nothing."""
    if kwargs.get("out") is not None:
        return kwargs["out"]
    if name == "embedding" and (kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None)):
        return args[1] if len(args) > 1 else kwargs.get("weight")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE
    operator = name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__int__", "__index__"))
    return args[0] if args and (in_place or operator) else None


def _bounds(name: str, given: Sequence[Any], kwargs: Mapping[str, Any]) -> Bounds | None:
    """The bounds of a clamp to numbers; None where the function is no such clamp."""
    if name not in _CLAMPS:
        return None
    found = {**dict(zip(_CLAMPS[name], given, strict=False)), **kwargs}
    low, high = found.get("min"), found.get("max")
    if any(isinstance(bound, torch.Tensor) for bound in (low, high)):
        return None
    return low, high


def storage_of(tensor: torch.Tensor) -> int:
    """A number of the tensor's storage, which its views share and no other tensor. A wrapper of vmap's has the number
    of the tensor it wraps."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def shares_memory_with(tensors: Iterable[torch.Tensor]) -> Callable[[torch.Tensor], bool]:
    """The question whether a tensor is a view of one of `tensors`."""
    storages = {storage_of(tensor) for tensor in tensors if not isinstance(tensor, Bodiless)}
    return lambda tensor: not isinstance(tensor, Bodiless) and storage_of(tensor) in storages
