"""Products that a recompute leaves out: backward needs nothing that follows from their results.

A block often ends with a Linear whose result is only added to the residual stream. Backward needs the Linear's input
and its weight, and no sum. The recompute has to build the graph, and the values behind that product are nobody's.

Which Linears are like this, the survey finds (`Unneeded`). It follows the result of each through views, additions and
multiplications by a number. If autograd saves one of these tensors, or if any other operation takes one, the Linear is
needed.

In the run (`Spared`) nothing is left to that finding. A recompute only defers such a product, and what is added to it.
If an operation other than these asks for one of their results after all, all that was deferred is computed first, in
its order and into the memory that it has from the start. So the bits are the same whatever the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zinf_cli.engine.units.forwards import replace_forward
from zinf_cli.engine.units.written_weights import storage_of

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: _aten.mm.out, _aten.addmm.default: _aten.addmm.out}
_FOLLOWING = {_aten.add.Tensor: _aten.add.out, _aten.mul.Tensor: _aten.mul.out}
"""Operations that are deferred, and those that compute the same into memory that is there. Autograd saves no argument
of an addition, and of a multiplication none if the other factor is a number."""


class Unneeded(TorchDispatchMode):
    """Finds, while the units of a model run forward within it, the Linears whose results no backward needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[nn.Module, str] = {
            module: name for name, module in model.named_modules() if type(module) is nn.Linear
        }
        self._called, self._needed = set[str](), set[str]()
        self._origins: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}
        """By storage: the Linears that it follows from. A reference to it reserves its number after it is freed."""

    @property
    def found(self) -> frozenset[str]:
        """Their names."""
        return frozenset(self._called - self._needed)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for one call of a unit."""
        hook = nn.modules.module.register_module_forward_hook(self._called_linear)
        try:
            with self:
                yield
        finally:
            hook.remove()
            self._origins.clear()

    def save(self, tensor: torch.Tensor) -> None:
        """Autograd saves `tensor`."""
        self._needed |= self._from([tensor])

    def _called_linear(self, module: nn.Module, args: Any, result: Any) -> None:
        if (name := self._names.get(module)) is not None:
            self._called.add(name)
            self._note(result, self._from([result]) | {name})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        origins = self._from(pytree.tree_leaves((args, kwargs))) if self._origins else frozenset[str]()
        result = func(*args, **(kwargs or {}))
        if origins and not _is_view(func):
            if _follows(func, args):
                self._note(result, origins)
            else:
                self._needed |= origins
        return result

    def _from(self, values: Sequence[Any]) -> frozenset[str]:
        held = (self._origins.get(storage_of(value)) for value in values if isinstance(value, torch.Tensor))
        return frozenset[str]().union(*(names for _, names in filter(None, held)))

    def _note(self, result: torch.Tensor, origins: frozenset[str]) -> None:
        self._origins[storage_of(result)] = StorageWeakRef(result.untyped_storage()), origins


class Spared:
    """Has recomputes leave out the products of some Linears of a model."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._linears = [model.get_submodule(name) for name in sorted(names)]
        self._depth: int | None = None
        """How many modes of torch's dispatch were on when the recompute began; None if none is under way."""
        self._deferred: _Deferred | None = None

    def replace_forwards(self) -> list[Callable[[], None]]:
        """Have the Linears tell when they are called. Returns what undoes it."""
        return [replace_forward(linear, partial(self._forward, linear.forward)) for linear in self._linears]

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """A context for a recompute whose results nobody reads."""
        self._depth = torch._C._len_torch_dispatch_stack()
        try:
            yield
        finally:
            self._depth = None
            if self._deferred is not None:
                self._deferred.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._deferred = None

    def _forward(self, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._deferred is None and self._depth == torch._C._len_torch_dispatch_stack():
            self._deferred = _Deferred()  # stays on until the recompute is over
            self._deferred.__enter__()  # type: ignore[no-untyped-call]
        if self._deferred is None:
            return forward(*args, **kwargs)
        with self._deferred.product():
            return forward(*args, **kwargs)


class _Deferred(TorchDispatchMode):
    """Defers products within `product`, and what is added to their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._in_product = False
        self._waiting: list[tuple[Any, Any, Any, torch.Tensor]] = []
        """Operations, the oldest first: each with its arguments and the tensor that its result goes to."""
        self._results: set[int] = set()
        """The storages of these results."""

    @contextmanager
    def product(self) -> Iterator[None]:
        """A context for the forward of a Linear."""
        self._in_product = True
        try:
            yield
        finally:
            self._in_product = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = any(
            isinstance(value, torch.Tensor) and storage_of(value) in self._results
            for value in pytree.tree_leaves((args, kwargs))
        )
        if asked and _follows(func, args):
            return self._defer(_FOLLOWING[func], func, args, kwargs)
        if (asked and not _is_view(func)) or (self._waiting and func._schema.is_mutable):
            self._compute()
        elif not asked and self._in_product and func in _PRODUCTS:
            return self._defer(_PRODUCTS[func], func, args, kwargs)
        return func(*args, **kwargs)

    def _defer(self, into: Any, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        meta_args, meta_kwargs = pytree.tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
        like = func(*meta_args, **meta_kwargs)
        device = next(value.device for value in args if isinstance(value, torch.Tensor) and value.dim())
        result = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        self._waiting.append((into, args, kwargs, result))
        self._results.add(storage_of(result))
        return result

    def _compute(self) -> None:
        for func, args, kwargs, result in self._waiting:
            func(*args, **kwargs, out=result)
        self._waiting.clear()
        self._results.clear()


def _follows(func: Any, args: Sequence[Any]) -> bool:
    return func in _FOLLOWING and (func is _aten.add.Tensor or not isinstance(args[1], torch.Tensor))


def _is_view(func: Any) -> bool:
    return bool(func.is_view) or func is _aten._unsafe_view.default


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.dim():
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
