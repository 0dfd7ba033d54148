"""Tells the checker of happens_before.py which memory each operation touches."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from happens_before import DEVICE, Checker


class Touches(TorchDispatchMode):
    """Tells a checker what each operation of this thread touches."""

    def __init__(self, checker: Checker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._checker = checker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._checker.has_found():
            return func(*args, **(kwargs or {}))
        name, takes = _taken(func)
        if takes:
            touched: list[tuple[int, int, bool]] = []
            for number, (argument, writes) in enumerate(takes):
                value = args[number] if number < len(args) else kwargs.get(argument) if kwargs else None
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    span = self._span(tensor) if isinstance(tensor, torch.Tensor) else None
                    if span is not None:
                        touched.append((*span, writes))
            if touched:
                self._checker.launch(name, touched)
            if name == "aten::_local_scalar_dense" and not self._checker.read_told(args[0]):
                self._checker.thread.join(self._checker.current(DEVICE).reached())
        result = func(*args, **(kwargs or {}))
        if self._checker.may_use_allocated():
            self._checker.uses_allocated(name, *map(self._allocated, ((args, kwargs), result)))
        return result

    def _allocated(self, tree: Any) -> set[int]:
        """The addresses of the storages of all tensors in a tree that lie in no arena."""
        tensors = [leaf for leaf in tree_leaves(tree) if type(leaf) in (torch.Tensor, torch.nn.Parameter)]
        begins = {leaf.untyped_storage().data_ptr() for leaf in tensors if leaf.device.type == "cpu"}
        return {begin for begin in begins if begin and not self._checker.in_arena(begin)}

    def _span(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The addresses [begin, end) of a tensor in an arena."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or not tensor.numel():
            return None
        begin = tensor.data_ptr()
        if not self._checker.in_arena(begin):
            return None
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return begin, begin + (last + 1) * tensor.element_size()


@cache
def _taken(func: Any) -> tuple[str, tuple[tuple[str, bool], ...]]:
    """The name of an operation; its arguments and whether it writes to them. A view touches nothing."""
    name, kinds = func._schema.name, [result.alias_info for result in func._schema.returns]
    if name == "aten::set_" or any(kind is not None and not kind.is_write for kind in kinds):
        return name, ()
    return name, tuple((a.name, a.alias_info is not None and a.alias_info.is_write) for a in func._schema.arguments)
