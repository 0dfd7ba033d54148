"""Tiles: a matrix that is larger than its room, cut along its rows; the model's code does not notice.

`cut` takes the weight from its module and leaves a TiledWeight in its place: a tensor without bytes, of the same shape
and dtype. What the model does with it goes to the tiles by torch's own dispatch on tensor classes: `F.linear` computes
with one tile after another and joins what they give, `F.embedding` adds up what each tile knows. So a class of the
model's own that scales an embedding, ties it to its head, or calls `F.linear` itself, works as it is. Any other use of
the weight is a ModelError that names it.

A tile is a module with a contiguous range of the weight, and so a unit (units.py): it is fetched, computed, reduced,
updated and freed by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zinf_cli.errors import ModelError

TILES = "tiles_of_"
"""What the name of a list of tiles begins with; the name of the parameter follows."""


@dataclass(frozen=True)
class Part:
    """Where a tile lies in the parameter that it was cut from."""

    name: str
    """The parameter's."""
    shape: torch.Size
    first: int
    """Element of it with which the tile begins."""


class Tile(nn.Module):
    """Rows of a weight."""

    def __init__(self, weight: nn.Parameter, part: Part) -> None:
        super().__init__()
        self.weight = weight
        self.part = part

    def forward(self, compute: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """What `compute` makes of its rows."""
        return compute(self.weight, *inputs)


class TiledWeight(torch.Tensor):
    """Stands for a weight that was cut: its shape, dtype and device, and what may be computed with it."""

    tiles: Sequence[Tile]
    origin: str
    """Its name in the model."""

    @classmethod
    def of(cls, weight: torch.Tensor, device: torch.device, name: str, tiles: Sequence[Tile]) -> TiledWeight:
        nothing = torch.full((1,), math.nan, dtype=weight.dtype, device=device).expand(weight.shape)
        made: TiledWeight = torch.Tensor._make_subclass(cls, nothing, False)
        made.tiles, made.origin = tiles, name
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (by_tiles := computed_by_tiles(func, types)) is not None:
            return by_tiles(*args, **kwargs)
        if getattr(func, "__name__", "") in _OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = next(arg.origin for arg in (*args, *kwargs.values()) if isinstance(arg, TiledWeight))
        raise ModelError(
            f"{name} is larger than the memory for it, and can't be cut: the model passes it to {_name_of(func)}",
            hint="what is looked up or multiplied as by torch.nn.Embedding or torch.nn.Linear can be cut",
        )


_OF_THE_SHAPE = {"__get__", "size", "dim", "numel", "ndimension", "__len__", "is_floating_point", "element_size",
                 "is_complex", "__repr__", "get_device", "stride", "__hash__"}  # fmt: skip
"""Functions of a tensor that use none of its values."""


def computed_by_tiles(func: Any, types: Collection[type]) -> Callable[..., torch.Tensor] | None:
    """What does the work of `func` on tensors of these classes, if a weight that was cut is among them."""
    by_tiles: dict[Any, Callable[..., torch.Tensor]] = {F.linear: _linear, F.embedding: _embedding}
    return by_tiles.get(func) if TiledWeight in types else None


def cut(model: nn.Module, most: int) -> None:
    """Cut each weight of more than `most` elements, of a Linear or an Embedding, into tiles of rows, in place.

    The model is on the meta device. A row is the least that a tile has.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    made: dict[int, TiledWeight] = {}
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.numel() <= most or not _can_be_cut(module):
            continue
        if id(weight) not in made:
            made[id(weight)] = _tiled(weight, names[id(weight)], most)
        tiled = made[id(weight)]
        del module._parameters["weight"]
        module.add_module(f"{TILES}weight", nn.ModuleList(tiled.tiles))
        module.__dict__["weight"] = tiled


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters of a model as it was before it was cut."""
    parts = {id(tile.weight): tile.part for tile in model.modules() if isinstance(tile, Tile)}
    named = ((parts.get(id(param)), name, param) for name, param in model.named_parameters())
    return {part.name if part else name: tuple(part.shape if part else param.shape) for part, name, param in named}


def move_tiled(model: nn.Module, device: torch.device) -> None:
    """Let what stands for weights that were cut be on `device`."""
    for module in model.modules():
        for name, tiled in list(module.__dict__.items()):
            if isinstance(tiled, TiledWeight):
                module.__dict__[name] = TiledWeight.of(tiled, device, tiled.origin, tiled.tiles)


def _can_be_cut(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):  # a norm changes rows as they are looked up; the others change the gradient
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return isinstance(module, nn.Linear)


def _tiled(weight: nn.Parameter, name: str, most: int) -> TiledWeight:
    rows, width = weight.shape
    count = min(rows, -(-weight.numel() // most))
    each = max(1, min(-(-rows // count), most // width))
    tiles = []
    for first in range(0, rows, each):
        values = weight.detach()[first : first + each]
        param = nn.Parameter(torch.empty_like(values), requires_grad=weight.requires_grad)
        tiles.append(Tile(param, Part(name, weight.shape, first * width)))
    return TiledWeight.of(weight, weight.device, name, tiles)


def _rows(tile: Tile) -> tuple[int, int]:
    first = tile.part.first // tile.weight.shape[1]
    return first, first + tile.weight.shape[0]


def _linear(input: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    results = []
    for tile in weight.tiles:
        first, last = _rows(tile)
        results.append(tile(_linear_rows, input, None if bias is None else bias[first:last]))
    return torch.cat(results, dim=-1)


def _linear_rows(weight: torch.Tensor, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(input, weight, bias)


def _embedding(
    input: torch.Tensor,
    weight: TiledWeight,
    padding_idx: int | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    total: torch.Tensor | None = None
    for tile in weight.tiles:
        known = tile(_known_rows, input, _rows(tile)[0], padding_idx)
        total = known if total is None else total + known
    assert total is not None
    return total


def _known_rows(weight: torch.Tensor, ids: torch.Tensor, first: int, padding_idx: int | None) -> torch.Tensor:
    """The rows that a tile has; zeros for the ids of others. The row of `padding_idx` gets no gradient."""
    inside = (ids >= first) & (ids < first + weight.shape[0])
    learns = inside if padding_idx is None else inside & (ids != padding_idx)
    found = F.embedding(torch.where(inside, ids - first, 0), weight)
    found = torch.where(learns.unsqueeze(-1), found, found.detach())
    return torch.where(inside.unsqueeze(-1), found, torch.zeros((), dtype=found.dtype, device=found.device))


def _name_of(func: Any) -> str:
    return str(getattr(func, "__qualname__", None) or getattr(func, "__name__", func))
