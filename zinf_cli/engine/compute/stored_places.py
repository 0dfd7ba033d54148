"""The places that a forward has moved (moving_state.py), as tensors for a checkpoint and back.

Buffers are in a checkpoint anyway. Attributes, globals and generators that have moved are written beside them: numbers,
text, tensors, arrays, generators, and containers and objects of these. What is read goes into the objects that are
there, since layers may share them. A place that holds something else is left out, and is named.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from zinf_cli.engine.compute.carriers import holds_values
from zinf_cli.engine.compute.held import WEIGHTS, foreign, stateful
from zinf_cli.engine.compute.moving_state import MovingState, named
from zinf_cli.engine.compute.spaces import ABSENT

_TREE = "moved places"
"""The name of the tensor (uint8) that holds the JSON of all places."""
_SAID = (bool, int, float, str, type(None))
_MANY: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "deque": deque}


class _CantStoreError(Exception):
    pass


def store(model: nn.Module, state: MovingState) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors by name with all that has moved, without buffers; and the places, in words, that can't be written."""
    buffers = {(path, name) for path, module in model.named_modules() for name in module._buffers}
    tensors: dict[str, torch.Tensor] = {}
    places: list[Any] = []
    left_out: list[str] = []
    for place in sorted((state.changed | state.moved) - buffers):
        try:
            places.append([*place, _tree_of(state.value(place), tensors)])
        except (_CantStoreError, RecursionError):
            left_out.append(named(place))
    if places or left_out:
        text = json.dumps({"places": places, "left_out": left_out}).encode()
        tensors[_TREE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors, left_out


def take_out(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split what a checkpoint holds into (buffers, what `store` has given)."""
    stored = {name: tensor for name, tensor in tensors.items() if name == _TREE or name.startswith(f"{_TREE} ")}
    return {name: tensor for name, tensor in tensors.items() if name not in stored}, stored


def restore(state: MovingState, stored: Mapping[str, torch.Tensor]) -> list[str]:
    """Put back what `store` has given. Returns the places, in words, that are not what they were."""
    if _TREE not in stored:
        return []
    told = json.loads(bytes(stored[_TREE].numpy()))
    missing = list(told["left_out"])
    for space, name, tree in told["places"]:
        if not state.found(space):
            missing.append(named((space, name)))
        else:
            state.put((space, name), _value_of(tree, state.value((space, name)), stored))
    return missing


def _tree_of(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    kind = type(value)
    if value is ABSENT:
        return ["absent"]
    if kind in _SAID:
        return ["said", value]
    if isinstance(value, WEIGHTS):
        raise _CantStoreError
    if kind is torch.Tensor:
        return ["tensor", _add(value, tensors)]
    if kind is np.ndarray and value.dtype != object:
        return ["array", _add(torch.from_numpy(value.copy()), tensors)]
    if kind is np.int64 or kind is np.uint64:
        return ["said", int(value)]
    for name, many in _MANY.items():
        if kind is many:
            return [name, [_tree_of(part, tensors) for part in value]]
    if kind is dict:
        return ["dict", [[_tree_of(key, tensors), _tree_of(part, tensors)] for key, part in value.items()]]
    if (known := stateful(value)) is not None:
        return ["state", _tree_of(known[0](value), tensors)]
    if holds_values(value) and not foreign(kind) and hasattr(value, "__dict__") and not isinstance(value, type):
        return ["object", kind.__qualname__, _tree_of(vars(value), tensors)]
    raise _CantStoreError


def _add(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    name = f"{_TREE} {len(tensors)}"
    tensors[name] = tensor.detach().cpu().contiguous().clone()
    return name


def _value_of(tree: Any, present: Any, stored: Mapping[str, torch.Tensor]) -> Any:
    """The value of a tree. Where `present` can hold it, it is put in there."""
    kind, *rest = tree
    if kind == "absent":
        return ABSENT
    if kind == "said":
        return rest[0]
    if kind == "tensor":
        return _tensor_of(stored[rest[0]], present)
    if kind == "array":
        array = stored[rest[0]].numpy().copy()
        if isinstance(present, np.ndarray) and (present.shape, present.dtype) == (array.shape, array.dtype):
            np.copyto(present, array)
            return present
        return array
    if kind == "dict":
        return _dict_of(rest[0], present, stored)
    if kind in _MANY:
        return _many_of(_MANY[kind], rest[0], present, stored)
    known = stateful(present) if kind == "state" else None
    if known is not None:
        known[1](present, _value_of(rest[0], None, stored))
    elif kind == "object" and type(present).__qualname__ == rest[0]:
        _value_of(rest[1], vars(present), stored)
    return present


def _tensor_of(values: torch.Tensor, present: Any) -> torch.Tensor:
    if not isinstance(present, torch.Tensor) or isinstance(present, WEIGHTS):
        return values.clone()
    if (present.shape, present.dtype) != (values.shape, values.dtype) or present.is_meta:
        return values.to(present.device if not present.is_meta else "cpu", copy=True)
    present.data.copy_(values)
    return present


def _dict_of(pairs: Any, present: Any, stored: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    before = dict(present) if isinstance(present, dict) else {}
    found = {}
    for key_tree, part in pairs:
        key = _value_of(key_tree, None, stored)
        found[key] = _value_of(part, before.get(key), stored)
    if type(present) is not dict:
        return found
    present.clear()
    present.update(found)
    return present


def _many_of(kind: Callable[[Any], Any], parts: Any, present: Any, stored: Mapping[str, torch.Tensor]) -> Any:
    same = type(present) is kind
    before = [*present] if same and kind is not set else []
    before += [None] * (len(parts) - len(before))
    found = [_value_of(part, old, stored) for part, old in zip(parts, before, strict=False)]
    if not same or kind is tuple:
        return kind(found)
    present.clear()
    (present.update if kind is set else present.extend)(found)
    return present
