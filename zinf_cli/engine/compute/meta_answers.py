"""Answers what a model asks of its data in a forward on the meta device, where there is no data.

Such questions are about values: is any token masked, how many are special. The answers are those of an ordinary
training batch: nothing is masked, nothing is padded, no token is special. Positions begin anew inside of a sequence if
they are `packed_positions`. Where a size follows from data, the answer is the largest size: every position is one that
the model looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class Counts(list[int]):
    """How many rows each expert gets. The numbers themselves are unknown."""


def answer_of(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The answer to the torch function `name`; NotImplemented where the meta tensor answers itself."""
    if name == "rand":
        return torch.ones_like(func(*args, **kwargs))  # LayerDrop drops no layer
    subject = args[0] if args else None
    if not isinstance(subject, torch.Tensor) or not subject.is_meta:
        return NotImplemented
    answer = _ANSWERS.get(name)
    if getattr(subject, "is_packed", False) and name != "__bool__":
        return _as_packed(func(*args, **kwargs) if answer is None else answer(func, *args, **kwargs))
    return NotImplemented if answer is None else answer(func, *args, **kwargs)


def packed_positions(ids: torch.Tensor) -> torch.Tensor:
    """Positions for `ids` (meta, int64 [sequences, seq_len]) of several documents each."""
    positions = torch.zeros_like(ids)
    _as_packed(positions)
    return positions


def _as_packed(found: Any) -> Any:
    """Remember that this was made of packed positions: whether they are those of one document is answered with no."""
    if isinstance(found, torch.Tensor):
        found.is_packed = True  # type: ignore[attr-defined]
    return found


def _truth(func: Callable[..., Any], tensor: torch.Tensor) -> Any:
    """True where a model asks if nothing is masked or packed. Counts and lengths are 1."""
    if tensor.dtype == torch.bool:
        return not (getattr(tensor, "is_any", False) or getattr(tensor, "is_packed", False))
    return func(tensor) if tensor.is_floating_point() else 1


def _format(func: Callable[..., Any], tensor: torch.Tensor, spec: str) -> str:
    """An unknown number in the name of a module is 0."""
    return "0" if tensor.dtype == torch.long and not tensor.dim() else str(func(tensor, spec))


def _any(func: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Remember that this was `any`: no token is special, no value infinite, so its truth is False."""
    found: torch.Tensor = func(*args, **kwargs)
    found.is_any = True  # type: ignore[attr-defined]
    return found


def _nonzero(func: Callable[..., Any], tensor: torch.Tensor, as_tuple: bool = False) -> Any:
    shape = (getattr(tensor, "num_routed", tensor.numel()), tensor.dim())
    found = torch.empty(shape, dtype=torch.long, device="meta")
    found.is_every = tensor.dim() == 1  # type: ignore[attr-defined]
    return found.unbind(1) if as_tuple else found


def _unbind(func: Callable[..., Any], tensor: torch.Tensor, dim: int = 0) -> Any:
    """Which experts are there tokens for, one after another: all of them."""
    if getattr(tensor, "is_every", False) and dim == 0:
        return torch.arange(len(tensor)).unsqueeze(1).unbind()
    return func(tensor, dim)


def _where(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _nonzero(func, args[0], as_tuple=True) if len(args) == 1 and not kwargs else func(*args, **kwargs)


def _getitem(func: Callable[..., Any], tensor: torch.Tensor, index: Any) -> Any:
    """A mask picks every position. An unknown index is 0.

    Of the tokens' ways to experts [experts, ways, tokens], the first expert has all tokens, and the others share them.
    """
    if isinstance(index, torch.Tensor) and not index.dim() and not index.is_meta:
        ways = func(tensor, index.clamp(max=len(tensor) - 1))  # one mask more than experts: of tokens that have none
        if tensor.dim() == 3:
            ways.num_routed = -(-ways.numel() // len(tensor)) if index else ways.shape[-1]
        return ways
    if isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype == torch.long:
        return func(tensor, 0)
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.is_meta and index.dim():
        return tensor.flatten(0, index.dim() - 1)
    return func(tensor, index)


def _setitem(func: Callable[..., Any], tensor: torch.Tensor, index: Any, value: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts):
        return None
    return func(tensor, index, value)


def _tolist(func: Callable[..., Any], tensor: torch.Tensor) -> Any:
    return Counts([1] * tensor.numel()) if tensor.dim() == 1 else func(tensor)


def _split(func: Callable[..., Any], tensor: torch.Tensor, sizes: Any = 1, dim: int = 0, **kwargs: Any) -> Any:
    if isinstance(sizes, Counts):
        return tensor.tensor_split(len(sizes), dim)
    return func(tensor, sizes, dim, **kwargs)


def _grouped_mm(func: Callable[..., Any], rows: torch.Tensor, experts: torch.Tensor, *_: Any, **__: Any) -> Any:
    """One expert for all rows, which has the right shape: torch refuses grouped_mm of fp32 on meta."""
    return rows @ experts[0]


def _fused_attention(
    func: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Fused attention wherever a real device would take it. On meta, torch takes the formula that saves all scores."""
    learned = attn_mask is not None and attn_mask.requires_grad  # no fused kernel has the gradient of a bias
    if dropout_p or learned or query.shape[-1] != value.shape[-1]:
        return func(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: torch.Tensor = attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0]
    return output


_ANSWERS: dict[str, Callable[..., Any]] = {
    "__bool__": _truth,
    "item": _truth,
    "__int__": _truth,
    "__index__": lambda *_: 0,
    "__format__": _format,
    "any": _any,
    "__contains__": lambda *_: False,  # is there padding
    "nonzero": _nonzero,
    "unbind": _unbind,
    "where": _where,
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "tolist": _tolist,
    "split": _split,
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
    "scaled_dot_product_attention": _fused_attention,
}
