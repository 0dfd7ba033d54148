"""Loss in chunks: logits of a few tokens at a time, so that tokens × vocabulary never lie in memory.

`put_off_logits` leaves a HeadWeight in the place of the head's weight. F.linear with it gives LazyLogits, which have
shape, dtype and device, and no bytes; they remember the head's input and what the model does to each logit (a cast, a
scale, a cap). F.cross_entropy of them is one call of the head's tile: forward adds up the loss, a chunk of tokens after
another; backward computes each chunk's logits again and takes their gradients. So the model's code stays as it is.
Whatever else a model does with its logits has them made as a whole, and then works on these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from zinf_cli.engine.units.tiles import (
    OF_THE_SHAPE,
    TILES,
    Bodiless,
    Part,
    Tile,
    TiledWeight,
    linear,
    linear_rows,
    put_in_place,
)
from zinf_cli.errors import ModelError

CHUNK = 1 << 24
"""Logits that are computed at a time; a micro-batch that has no more keeps its logits as they are."""

Step = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]
"""A function of each logit, and its further arguments."""

_STEPS = {"float", "to", "mul", "div", "true_divide", "tanh", "add", "sub"}
"""Functions of each logit by itself, with numbers or dtypes as further arguments."""
_ROWS_STAY = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
"""Functions that change no order; where the last dimension stays, so do rows."""
_HARMLESS = OF_THE_SHAPE | {"nelement"}
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout"}


def has_many_logits(model: nn.Module, num_tokens: int) -> bool:
    """Whether logits of `num_tokens` are more than a chunk, and `model` lets them be computed in several.

    A head that is no Linear, shares its weight or was cut (tiles.py) does not.
    """
    head = _head(model)
    if head is None or num_tokens * head.weight.shape[0] <= CHUNK:
        return False
    return sum(param is head.weight for module in model.modules() for param in module._parameters.values()) == 1


def put_off_logits(model: nn.Module) -> None:
    """Have the loss of `model`, which has many logits, computed in chunks."""
    head = _head(model)
    assert head is not None
    weight = head.weight
    name = next(name for name, param in model.named_parameters() if param is weight)
    param = nn.Parameter(torch.empty_like(weight), weight.requires_grad)
    tile = Tile({"weight": Part(name, weight.shape, 0)}, {"weight": param})
    put_in_place(head, {"weight": HeadWeight.of(weight, weight.device, name, "weight", [tile])})


def keep_logits(model: nn.Module) -> None:
    """Undo `put_off_logits`."""
    for module in model.modules():
        weight = module.__dict__.get("weight")
        if isinstance(weight, HeadWeight):
            del module.__dict__["weight"]
            delattr(module, f"{TILES}weight")
            module.weight = weight.tiles[0].get_parameter("weight")


def _head(model: nn.Module) -> nn.Linear | None:
    """The Linear that makes logits, with a weight of its own."""
    find: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    return head if isinstance(head, nn.Linear) and "weight" in head._parameters else None


class HeadWeight(TiledWeight):
    """Stands for the weight of a head: what it is multiplied with waits for the loss."""

    @classmethod
    def instead_of(cls, func: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
        return _lazy_linear if func is F.linear else super().instead_of(func, args)


def _lazy_linear(input: torch.Tensor, weight: HeadWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    if input.dim() < 2 or (not input.is_meta and torch.is_autocast_enabled(input.device.type)):
        return linear(input, weight, bias)
    return LazyLogits.of(input, bias, weight.tiles[0], (), input.dtype)


class LazyLogits(Bodiless):
    """Logits to come, [..., vocabulary]: `operations` on `hidden` [..., width] by the weight of `tile`, plus `bias`."""

    hidden: torch.Tensor
    bias: torch.Tensor | None
    tile: Tile
    operations: tuple[Step, ...]
    aliases: list[None]
    """One for each of those that would share memory."""
    whole: torch.Tensor | None
    """Once something needed them."""

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        bias: torch.Tensor | None,
        tile: Tile,
        operations: tuple[Step, ...],
        dtype: torch.dtype,
        aliases: list[None] | None = None,
    ) -> LazyLogits:
        made = cls.standing_for(torch.Size((*hidden.shape[:-1], tile.parts["weight"].shape[0])), dtype, hidden.device)
        made.hidden, made.bias, made.tile, made.operations, made.whole = hidden, bias, tile, operations, None
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
        value.whole = _taken(value.tile(linear_rows, "weight", value.hidden, value.bias, None), value.operations)
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
        elif name in _STEPS:
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
    return LazyLogits.of(logits.hidden, logits.bias, logits.tile, (*logits.operations, (func, tuple(args))), dtype)


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
    return LazyLogits.of(hidden, logits.bias, logits.tile, logits.operations, logits.dtype, logits.aliases)


def _taken(logits: torch.Tensor, operations: Sequence[Step]) -> torch.Tensor:
    for func, args in operations:
        logits = func(logits, *args)
    return logits


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
    found: torch.Tensor = logits.tile(
        in_chunks,
        "weight",
        logits.hidden,
        logits.bias,
        target,
        logits.operations,
        ignore_index,
        reduction,
        logits.dtype,
    )
    return found


def in_chunks(weight: torch.Tensor, *inputs: Any) -> torch.Tensor:
    """What the tile of a head computes of the loss; `inputs` are those of _ChunkedLoss after the weight."""
    loss: torch.Tensor = _ChunkedLoss.apply(weight, *inputs)  # type: ignore[no-untyped-call]
    return loss


def bytes_of_a_chunk(shape: Sequence[int], dtype: torch.dtype, tokens: int, operations: Sequence[Step]) -> int:
    """What the loss takes at its peak beside its arguments, with a head's weight of `shape` and `dtype`, in bytes.

    Logits, their gradient, what `operations` and the cross-entropy make of them, and, of a 16-bit weight, the gradient
    that a chunk adds to the sum.
    """
    logits = min(tokens, _rows_of_a_chunk(shape[0])) * shape[0]
    more = 0 if dtype == torch.float32 else math.prod(shape) * dtype.itemsize
    return logits * (2 * dtype.itemsize + 4 * (3 + len(operations))) + more


def _rows_of_a_chunk(vocabulary: int) -> int:
    return max(1, CHUNK // vocabulary)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of `operations` of hidden · weightᵀ + bias: a scalar of `dtype`, added up in fp32.

    weight [vocabulary, width], hidden [tokens, width], bias [vocabulary] or None, target int64 [tokens].
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        hidden: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        operations: tuple[Step, ...],
        ignore_index: int,
        reduction: str,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, hidden, bias, target)
        ctx.operations, ctx.ignore_index, ctx.mean = operations, ignore_index, reduction == "mean"
        total = torch.zeros((), device=hidden.device)
        for rows, labels in _chunks(weight, hidden, target):
            logits = _taken(F.linear(rows, weight, bias), operations)
            total += F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
        return (total / _divisor(ctx, target)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, hidden, bias, target = ctx.saved_tensors
        of_weight, of_hidden, of_bias = ctx.needs_input_grad[:3]
        sums = torch.zeros(weight.shape, device=weight.device) if of_weight else None
        bias_sum = torch.zeros(bias.shape, device=weight.device) if of_bias else None
        into: list[torch.Tensor] = []
        scale = grad.float() / _divisor(ctx, target)
        for rows, labels in _chunks(weight, hidden, target):
            logits = F.linear(rows, weight, bias).requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(
                    _taken(logits, ctx.operations).float(), labels, ignore_index=ctx.ignore_index, reduction="sum"
                )
            (of_logits,) = torch.autograd.grad(loss, logits, scale)
            del logits, loss
            if sums is not None:
                if sums.dtype == of_logits.dtype:
                    sums.addmm_(of_logits.T, rows)
                else:
                    sums += of_logits.T @ rows
            if bias_sum is not None:
                bias_sum += of_logits.sum(0, dtype=torch.float32)
            if of_hidden:
                into.append(of_logits @ weight)
        return sums, torch.cat(into) if into else None, bias_sum, None, None, None, None, None


def _divisor(ctx: Any, target: torch.Tensor) -> torch.Tensor | int:
    return (target != ctx.ignore_index).sum() if ctx.mean else 1


def _chunks(weight: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    rows = _rows_of_a_chunk(weight.shape[0])
    return zip(hidden.split(rows), target.split(rows), strict=True)
