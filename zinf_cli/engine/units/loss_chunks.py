"""Loss in chunks: logits of a few tokens at a time, so that tokens × vocabulary never lie in memory.

`put_off_logits` leaves a HeadWeight in the place of the head's weight. F.linear with it gives LazyLogits, which have
shape, dtype and device, and no bytes; they remember the head's input and what the model does to each logit (a cast, a
scale, a cap). F.cross_entropy of them is one call of each of the head's tiles (chunked_loss.py); unless the head was
cut, one tile is all of it. So the model's code stays as it is. Whatever else a model does with its logits has them made
as a whole, and then works on these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from zinf_cli.engine.units.chunked_loss import (
    Operation,
    after_operations,
    joined,
    loss_in_chunks,
    more_than_a_chunk,
    sums_in_chunks,
)
from zinf_cli.engine.units.tiles import (
    OF_THE_SHAPE,
    Bodiless,
    TiledWeight,
    can_be_cut,
    in_one_tile,
    linear,
    put_back,
    replace_tiled,
)
from zinf_cli.errors import ModelError

_OPERATIONS = {"float", "to", "mul", "div", "true_divide", "tanh", "add", "sub"}
"""Functions of each logit by itself, with numbers or dtypes as further arguments."""
_ROWS_STAY = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
"""Functions that change no order; where the last dimension stays, so do rows."""
_HARMLESS = OF_THE_SHAPE | {"nelement"}
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout"}


def has_many_logits(model: nn.Module, num_tokens: int) -> bool:
    """Whether logits of `num_tokens` are more than a chunk, and `model` lets them be computed in several.

    A head that is no Linear does not, nor one that shares its weight with what is no Linear and no Embedding.
    """
    weight = _weight_of_head(model)
    if weight is None or not more_than_a_chunk(num_tokens * weight.shape[0]):
        return False
    return isinstance(weight, TiledWeight) or can_be_cut(model, weight)


def put_off_logits(model: nn.Module) -> None:
    """Have the loss of `model`, which has many logits, computed in chunks."""
    weight = _weight_of_head(model)
    assert weight is not None
    tiled = weight if isinstance(weight, TiledWeight) else in_one_tile(model, weight)
    replace_tiled(model, tiled, _as(HeadWeight, tiled))


def keep_logits(model: nn.Module) -> None:
    """Undo `put_off_logits`."""
    weight = _weight_of_head(model)
    assert isinstance(weight, HeadWeight)
    if len(weight.tiles) == 1:
        put_back(model, weight)
    else:
        replace_tiled(model, weight, _as(TiledWeight, weight))


def _as(kind: type[TiledWeight], tiled: TiledWeight) -> TiledWeight:
    return kind.of(tiled, tiled.device, tiled.origin, tiled.weight, tiled.tiles)


def _weight_of_head(model: nn.Module) -> torch.Tensor | None:
    """The weight of the Linear that makes logits, or what stands for it."""
    find: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    return head.weight if isinstance(head, nn.Linear) and not hasattr(head, "parametrizations") else None


class HeadWeight(TiledWeight):
    """Stands for the weight of a head: what it is multiplied with waits for the loss."""

    @classmethod
    def instead_of(cls, func: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
        return _lazy_linear if func is F.linear else super().instead_of(func, args)


def _lazy_linear(input: torch.Tensor, weight: HeadWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    if input.dim() < 2 or (not input.is_meta and torch.is_autocast_enabled(input.device.type)):
        return linear(input, weight, bias)
    return LazyLogits.of(input, bias, weight, (), input.dtype)


class LazyLogits(Bodiless):
    """Logits to come, [..., vocabulary]: `operations` on `hidden` [..., width] times the head's weight, plus `bias`."""

    hidden: torch.Tensor
    bias: torch.Tensor | None
    head: HeadWeight
    operations: tuple[Operation, ...]
    aliases: list[None]
    """One for each of those that would share memory."""
    whole: torch.Tensor | None
    """Once something needed them."""

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        bias: torch.Tensor | None,
        head: HeadWeight,
        operations: tuple[Operation, ...],
        dtype: torch.dtype,
        aliases: list[None] | None = None,
    ) -> LazyLogits:
        made = cls.standing_for(torch.Size((*hidden.shape[:-1], head.shape[0])), dtype, hidden.device)
        made.hidden, made.bias, made.head, made.operations, made.whole = hidden, bias, head, operations, None
        made.aliases = aliases if aliases is not None else []
        made.aliases.append(None)
        return made

    @classmethod
    def instead_of(cls, func: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        harmless = attribute in _ATTRIBUTES if name == "__get__" else name in _HARMLESS
        return None if harmless else partial(_lazily, func)


def whole_logits(value: Any) -> Any:
    """The logits themselves, if `value` is lazy ones; else `value`."""
    if not isinstance(value, LazyLogits):
        return value
    if value.whole is None:
        value.whole = after_operations(linear(value.hidden, value.head, value.bias), value.operations)
    return value.whole


def with_whole_logits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the logits themselves in the place of lazy ones."""
    return tuple(map(whole_logits, args)), {key: whole_logits(value) for key, value in kwargs.items()}


def _lazily(func: Any, *args: Any, **kwargs: Any) -> Any:
    """`func` where lazy logits are among its arguments."""
    logits, name = args[0] if args else None, getattr(func, "__name__", "")
    if isinstance(logits, LazyLogits) and logits.whole is None:
        found: torch.Tensor | None = None
        if func is F.cross_entropy:
            found = _loss(logits, *args[1:], **kwargs)
        elif name in _OPERATIONS:
            found = _with_step(logits, func, args[1:], kwargs)
        elif name in _ROWS_STAY or (name == "contiguous" and not kwargs):
            found = _reshaped(logits, func, args[1:], kwargs)
        elif name == "__getitem__":
            found = _part_of(logits, args[1])
        if found is not None:
            return found
    if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
        for value in args:
            if isinstance(value, LazyLogits) and len(value.aliases) > 1:
                raise ModelError(f"the model changes logits in place ({name}) of which it has another view")
    args, kwargs = pytree.tree_map(whole_logits, (args, kwargs))
    return func(*args, **kwargs)


def _with_step(logits: LazyLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    if kwargs or not all(type(value) in (int, float, torch.dtype) for value in args):
        return None
    dtype = func(torch.empty((), dtype=logits.dtype, device="meta"), *args).dtype
    if getattr(func, "__name__", "") in ("float", "to") and dtype == logits.dtype:
        return logits
    return LazyLogits.of(logits.hidden, logits.bias, logits.head, (*logits.operations, (func, tuple(args))), dtype)


def _reshaped(logits: LazyLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    if any(type(value) is torch.dtype for value in args):
        return None
    shape = func(torch.empty(logits.shape, device="meta"), *args, **kwargs).shape
    if shape == logits.shape:
        return logits
    if shape[-1] != logits.shape[-1]:
        return None
    return _of_rows(logits, logits.hidden.reshape(*shape[:-1], logits.hidden.shape[-1]))


def _part_of(logits: LazyLogits, index: Any) -> torch.Tensor | None:
    """Some of the tokens."""
    vocabulary, width = logits.shape[-1], logits.hidden.shape[-1]
    given = index if isinstance(index, tuple) else (index,)
    if vocabulary == width or not all(type(value) in (int, slice, type(None), type(Ellipsis)) for value in given):
        return None
    shape = torch.empty(logits.shape, device="meta")[index].shape
    rows = torch.empty(logits.hidden.shape, device="meta")[index].shape
    if (*shape[:-1], shape[-1:], rows[-1:]) != (*rows[:-1], (vocabulary,), (width,)):
        return None
    return _of_rows(logits, logits.hidden[index])


def _of_rows(logits: LazyLogits, hidden: torch.Tensor) -> LazyLogits:
    return LazyLogits.of(hidden, logits.bias, logits.head, logits.operations, logits.dtype, logits.aliases)


def _loss(
    logits: LazyLogits,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """F.cross_entropy, where it can be computed in chunks."""
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    if not plain or reduction not in ("mean", "sum") or logits.dim() != 2 or target.shape != logits.shape[:1]:
        return None
    hidden, bias, operations, pieces = logits.hidden, logits.bias, logits.operations, logits.head.pieces
    if len(pieces) == 1:
        whole = pieces[0]
        found: torch.Tensor = whole.tile(
            loss_in_chunks, whole.weight, hidden, bias, target, operations, ignore_index, reduction, logits.dtype
        )
        return found
    sums = []
    for piece in pieces:
        rows = None if bias is None else bias[piece.first : piece.last]
        sums.append(piece.tile(sums_in_chunks, piece.weight, hidden, rows, target, operations, piece.first))
    return joined(sums, [(piece.first, piece.last) for piece in pieces], target, ignore_index, reduction, logits.dtype)
