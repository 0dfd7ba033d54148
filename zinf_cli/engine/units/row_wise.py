"""Proves that a module computes each token by itself, so that it can be called with chunks of tokens (token_chunks.py).

The module runs once on the meta device. Its input is a tensor whose leading dimensions are the tokens, and every
operation below autograd has to keep them so: a product with a weight from the right, a function of each element, a
view, a sum or a norm of the others. Whatever else is done to such a tensor ends the proof. So do operations that draw
random numbers or make a tensor of nothing, since such a one may depend on how many tokens there are.

A proof holds for one shape. Code may ask for a shape, so the same operations with the same numbers have to be found for
the shapes of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


@dataclass(frozen=True)
class RowWise:
    """What a proof has found: bytes that autograd saves inside, beside the input and the result, and all operations."""

    saved_bytes: int
    operations: tuple[Any, ...]


class _NoProofError(Exception):
    pass


def proof(module: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> RowWise | None:
    """Whether `module` computes the rows of an input of `shape` and `dtype`, each by itself; None if it may not.

    Its parameters are on the meta device. All but the last dimension of `shape` count the rows.
    """
    inside = list(module.modules())
    if any(True for _ in module.buffers()) or any(part._forward_hooks or part._forward_pre_hooks for part in inside):
        return None
    before = [dict(vars(part)) for part in inside]
    given = torch.empty(shape, dtype=dtype, device="meta")
    mode = _Proof(tuple(shape[:-1]), given)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, _Rows):
            storage = tensor.bare.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
            mode.held.append(storage)
        return tensor.detach()

    try:
        with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            result = module.forward(_Rows.of(given, as_given=True).requires_grad_())
    except Exception:  # the module may do anything
        return None
    finally:
        unchanged = all(_same(old, vars(part)) for old, part in zip(before, inside, strict=True))
        for old, part in zip(before, inside, strict=True):
            vars(part).clear()
            vars(part).update(old)
    if not unchanged or not isinstance(result, _Rows) or not result.as_given or result.dim() != len(shape):
        return None
    if _storage(result.bare) == _storage(given):  # a change in place of the one would be one of the other
        return None
    for tensor in (given, result.bare):
        saved.pop(_storage(tensor), None)
    return RowWise(sum(saved.values()), tuple(mode.operations))


def _storage(tensor: torch.Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(after[name] is value for name, value in before.items())


class _Rows(torch.Tensor):
    """A tensor whose leading dimensions are the rows: as they were given, or, if not `as_given`, as one."""

    bare: torch.Tensor
    as_given: bool

    @classmethod
    def of(cls, bare: torch.Tensor, *, as_given: bool) -> _Rows:
        made: _Rows = torch.Tensor._make_wrapper_subclass(
            cls, bare.shape, bare.stride(), bare.storage_offset(), dtype=bare.dtype, device=bare.device
        )
        made.bare, made.as_given = bare, as_given
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _NoProofError


class _Proof(TorchDispatchMode):
    def __init__(self, lead: tuple[int, ...], given: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lead = lead
        self._given = given
        self.operations: list[Any] = []
        self.held: list[Any] = []
        """Storages that were saved, so that no other gets their number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        rows = [leaf for leaf in leaves if isinstance(leaf, _Rows)]
        if torch.Tag.nondeterministic_seeded in func.tags or func is _aten.lift_fresh.default:
            raise _NoProofError
        if not rows:
            if func._schema.is_mutable or not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
                raise _NoProofError
            self._note(func, leaves)
            return func(*args, **kwargs)
        as_given = rows[0].as_given
        if any(each.as_given != as_given for each in rows):
            raise _NoProofError
        bare_args, bare_kwargs = pytree.tree_map(lambda leaf: _bare(leaf), (args, kwargs))
        result = func(*bare_args, **bare_kwargs)
        self.held.append(result)
        if func in _VIEWS:
            as_given = self._viewed(result)
            self.operations.append(func)
        else:
            self._note(func, leaves)
            count = len(self._lead) if as_given else 1
            if torch.Tag.pointwise in func.tags:
                self._check_elements(rows, leaves, result, count)
            elif func not in _RULES or not _RULES[func](args, kwargs, count):
                raise _NoProofError
        if func._schema.is_mutable:
            inside = args[0] is rows[0] and _storage(rows[0].bare) != _storage(self._given)
            if torch.Tag.pointwise not in func.tags or not inside:
                raise _NoProofError
            return args[0]
        return pytree.tree_map(
            lambda leaf: _Rows.of(leaf, as_given=as_given) if isinstance(leaf, torch.Tensor) else leaf, result
        )

    def _note(self, func: Any, leaves: Sequence[Any]) -> None:
        self.operations.append((func, *(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))))

    def _viewed(self, result: torch.Tensor) -> bool:
        """Whether rows are split in a view, which keeps the order of elements."""
        if tuple(result.shape[: len(self._lead)]) == self._lead and result.dim() > len(self._lead):
            return True
        if result.dim() > 1 and result.shape[0] == prod(self._lead):
            return False
        raise _NoProofError

    def _check_elements(self, rows: Sequence[_Rows], leaves: Sequence[Any], result: Any, count: int) -> None:
        """Of a function of each element: the same row of all tensors, and nothing else that differs between rows."""
        for leaf in leaves:
            if isinstance(leaf, _Rows):
                fine = leaf.dim() == result.dim() and leaf.shape[:count] == result.shape[:count]
            else:
                differs = (
                    leaf.shape[: max(0, leaf.dim() - result.dim() + count)] if isinstance(leaf, torch.Tensor) else ()
                )
                fine = all(size == 1 for size in differs)
            if not fine:
                raise _NoProofError


def _bare(leaf: Any) -> Any:
    return leaf.bare if isinstance(leaf, _Rows) else leaf


_Rule = Callable[[Sequence[Any], dict[str, Any], int], bool]
"""Whether an operation with these arguments keeps rows apart; the first so many dimensions of its rows count them."""


def _only_first(args: Sequence[Any], kwargs: dict[str, Any], count: int) -> bool:
    """The first argument alone has rows."""
    return isinstance(args[0], _Rows) and not any(
        isinstance(leaf, _Rows) for leaf in pytree.tree_leaves((args[1:], kwargs))
    )


def _product(place: int) -> _Rule:
    def rule(args: Sequence[Any], kwargs: dict[str, Any], count: int) -> bool:
        having = [isinstance(leaf, _Rows) for leaf in args]
        added = args[0] if place else None
        bias = added is None or added.dim() == 1 or added.shape[0] == 1
        return having == [number == place for number in range(len(args))] and count == 1 and bias

    return rule


def _linear(args: Sequence[Any], kwargs: dict[str, Any], count: int) -> bool:
    return _only_first(args, kwargs, count) and args[0].dim() > count


def _along(place: int, default: int | None = None) -> _Rule:
    """Along dimensions that count no rows; they are the argument at `place`."""

    def rule(args: Sequence[Any], kwargs: dict[str, Any], count: int) -> bool:
        dims = args[place] if len(args) > place else kwargs.get("dim", default)
        if not _only_first(args, kwargs, count) or dims is None:
            return False
        dims = dims if isinstance(dims, Sequence) else [dims]
        return bool(dims) and all(dim % args[0].dim() >= count for dim in dims)

    return rule


def _joined(args: Sequence[Any], kwargs: dict[str, Any], count: int) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return all(isinstance(each, _Rows) for each in args[0]) and dim % args[0][0].dim() >= count


def _norm(args: Sequence[Any], kwargs: dict[str, Any], count: int) -> bool:
    return _only_first(args, kwargs, count) and len(args[1]) <= args[0].dim() - count


_VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.unsqueeze.default,
          _aten.squeeze.dim}  # fmt: skip
_RULES: dict[Any, _Rule] = {
    _aten.mm.default: _product(0),
    _aten.addmm.default: _product(1),
    _aten.linear.default: _linear,
    _aten.detach.default: _only_first,
    _aten.alias.default: _only_first,
    _aten.clone.default: _only_first,
    _aten._to_copy.default: _only_first,
    _aten.split.Tensor: _along(2, 0),
    _aten.split_with_sizes.default: _along(2, 0),
    _aten.slice.Tensor: _along(1, 0),
    _aten.select.int: _along(1, 0),
    _aten.unbind.int: _along(1, 0),
    _aten.glu.default: _along(1, -1),
    _aten.sum.dim_IntList: _along(1),
    _aten.mean.dim: _along(1),
    _aten.amax.default: _along(1),
    _aten._softmax.default: _along(1),
    _aten.cat.default: _joined,
    _aten.native_layer_norm.default: _norm,
    _aten._fused_rms_norm.default: _norm,
}
