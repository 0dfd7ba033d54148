"""Cuts a weight that is larger than the room for it into tiles. A tile has some of its rows, or some of its experts.

The model's code does not change. `cut` takes the weight from its module and leaves a TiledWeight in its place: a tensor
of the same shape and dtype that has no bytes. torch hands every function that gets one to `__torch_function__`, which
computes with the tiles instead. `F.linear` computes with one tile after another and joins the results. `F.embedding`
adds up the rows that each tile has. It does not matter who calls these functions: a torch.nn.Linear, or a class of the
model's own that scales an embedding or ties it to its head. Any other use of the weight is a ModelError that names it.

The experts of a layer lie in a few parameters, the matrix of one behind that of another. Code that takes one expert
gets a TiledWeight for the expert's matrix. The tile that has the expert computes what the code computes with it.

A tile is a module with a contiguous range of the weight. So it is a unit of its own (units.py): it is fetched,
computed, reduced, updated and freed by itself. A tile of experts has all weights of these experts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from zinf_cli.errors import UncuttableError
from zinf_cli.model_state import SCALE_BLOCK

TILES = "tiles_of_"
"""The name of a list of tiles is this and the parameter's name."""
PACKED = "packed_as"
"""The attribute of a module that says how its parameters lie on tiers while they are frozen (origins.py)."""


@dataclass(frozen=True)
class Part:
    """Where a tile lies in the parameter that it was cut from."""

    name: str
    """The parameter's name in the model."""
    shape: torch.Size
    """The parameter's shape."""
    first: int
    """The element of the parameter with which the tile begins."""


class Tile(nn.Module):
    """A range of one weight, or all weights of some experts. Each has the name that its weight has in the module."""

    def __init__(self, parts: dict[str, Part], params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.parts = parts
        for name, param in params.items():
            self.register_parameter(name, param)

    def forward(self, compute: Callable[..., torch.Tensor], name: str, *inputs: Any) -> torch.Tensor:
        """Call `compute` with the tile's range of the weight `name`, and `inputs`."""
        return compute(getattr(self, name), *inputs)


@dataclass(frozen=True)
class Piece:
    """The rows [first, last) of a matrix, which lie in one tile."""

    tile: Tile
    weight: str
    """The weight's name in the tile."""
    first: int
    last: int
    expert: int | None = None
    """If the tile has a matrix for each of its experts: which of them, counted in the tile."""


Kind = TypeVar("Kind", bound="Bodiless")
Weight = TypeVar("Weight", bound="TiledWeight")


class Bodiless(torch.Tensor):
    """Stands for a tensor that is nowhere as a whole: it has shape, dtype and device, and no bytes."""

    @classmethod
    def standing_for(cls: type[Kind], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Kind:
        nothing = torch.full((1,), math.nan, dtype=dtype, device=device).expand(shape)
        made: Kind = torch.Tensor._make_subclass(cls, nothing, False)
        return made

    @classmethod
    @abstractmethod
    def instead_of(cls, func: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
        """The function to call instead of `func`. None if `func` uses no values, only shape, dtype and device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (instead := computed_instead(func, types, args)) is not None:
            return instead(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class TiledWeight(Bodiless):
    """Stands for a weight that was cut, and knows what may be computed with it."""

    tiles: Sequence[Tile]
    weight: str
    """The weight's name in the tiles."""
    origin: str
    """The weight's name in the model."""
    pieces: Sequence[Piece]
    """Of a matrix, its rows from first to last. Of experts, the matrix of each."""

    @classmethod
    def of(
        cls: type[Weight], like: torch.Tensor, device: torch.device, origin: str, weight: str, tiles: Sequence[Tile]
    ) -> Weight:
        """One with the shape and dtype of `like`."""
        made = cls.standing_for(like.shape, like.dtype, device)
        made.tiles, made.weight, made.origin = tiles, weight, origin
        made.pieces = [piece for tile in tiles for piece in _pieces(tile, weight)]
        return made

    def of_expert(self, expert: int) -> TiledWeight:
        """One for the matrix of an expert."""
        with torch._C.DisableTorchFunctionSubclass():
            made: TiledWeight = torch.Tensor._make_subclass(TiledWeight, self.as_subclass(torch.Tensor)[expert], False)
        made.tiles, made.weight, made.origin = self.tiles, self.weight, self.origin
        made.pieces = [self.pieces[expert]]
        return made

    @classmethod
    def instead_of(cls, func: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
        of_rows: dict[Any, Callable[..., Any]] = {F.linear: linear, F.embedding: _embedding}
        found = of_rows.get(func) or (_PRODUCTS.get(func) if func in _PRODUCTS and _can_serve(func, *args) else None)
        if found is None and (getattr(func, "__name__", "") not in _HARMLESS or func in _TURNED):
            return partial(_refuse, func)
        return found


OF_THE_SHAPE = {"size", "dim", "numel", "ndimension", "__len__", "is_floating_point", "element_size", "is_complex",
                "get_device", "__hash__"}  # fmt: skip
"""Functions of a tensor that use none of its values."""
_HARMLESS = OF_THE_SHAPE | {"__get__", "stride", "__repr__"}
"""Functions that use no values of a TiledWeight."""

_TURNED = [getattr(getattr(torch.Tensor, name), "__get__") for name in ("T", "mT", "H", "mH")]  # noqa: B009 (mypy)


def computed_instead(func: Any, types: Collection[type], args: Sequence[Any]) -> Callable[..., Any] | None:
    """The function to call instead of `func`, if one of its arguments' classes is Bodiless. None as in `instead_of`."""
    kind = next((kind for kind in types if issubclass(kind, Bodiless)), None)
    return None if kind is None else kind.instead_of(func, args)


def _refuse(func: Any, *args: Any, **kwargs: Any) -> Any:
    name = next(arg.origin for arg in (*args, *kwargs.values()) if isinstance(arg, TiledWeight))
    raise UncuttableError(name, f"the model passes it to {_name_of(func)}")


def _can_serve(func: Any, first: Any, second: Any = None, *_: Any) -> bool:
    """Whether `func` takes one expert of several, or whether tiles can give its product."""
    if func is torch.Tensor.__getitem__:
        return first.dim() > 2 and (isinstance(second, int) or (isinstance(second, torch.Tensor) and not second.dim()))
    if isinstance(first, TiledWeight):
        return first.dim() == 2 and not isinstance(second, TiledWeight)
    experts = [piece for piece in second.pieces if piece.expert is not None]
    return len(experts) == 1 if second.dim() == 2 else func in _BATCHED and bool(experts)


def cut(model: nn.Module, most: int, whole: Collection[str] = ()) -> None:
    """Cut the weights of Linears, Embeddings and experts that have more than `most` elements, in place.

    The weights of a layer's experts count and are cut together. Weights whose names are in `whole` stay. A tile has at
    least one row, or one expert. The model has to be on the meta device.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    made: dict[int, dict[str, TiledWeight]] = {}
    for module in list(model.modules()):
        weights = cut_together(module)
        if sum(weight.numel() for weight in weights.values()) <= most:
            continue
        if any(names[id(weight)] in whole for weight in weights.values()):
            continue
        key = id(next(iter(weights.values())))
        if key not in made:
            made[key] = _tiled(weights, names, most, SCALE_BLOCK if PACKED in module.__dict__ else 1)
        put_in_place(module, made[key])


def can_be_cut(model: nn.Module, weight: torch.Tensor) -> bool:
    """Whether every module that has the parameter `weight` is a Linear or an Embedding that lets it be cut."""
    owners = [module for module, _ in _owners(model, weight)]
    return bool(owners) and all(any(each is weight for each in cut_together(module).values()) for module in owners)


def in_one_tile(model: nn.Module, weight: torch.Tensor) -> TiledWeight:
    """Make one tile of the parameter `weight`, with all of its rows, in place. Returns the TiledWeight."""
    origin, param = next((name, param) for name, param in model.named_parameters() if param is weight)
    made = _tiled({"weight": param}, {id(param): origin}, param.numel())
    for module, _ in list(_owners(model, weight)):
        put_in_place(module, made)
    return made["weight"]


def put_back(model: nn.Module, tiled: TiledWeight) -> None:
    """Undo `in_one_tile`."""
    (tile,) = tiled.tiles
    for module, name in list(_owners(model, tiled)):
        del module.__dict__[name]
        delattr(module, TILES + name)
        module.register_parameter(name, tile.get_parameter(tiled.weight))


def replace_tiled(model: nn.Module, old: TiledWeight, new: TiledWeight) -> None:
    """Put `new` in the place of `old`, in every module that has it."""
    for module, name in list(_owners(model, old)):
        module.__dict__[name] = new


def _owners(model: nn.Module, weight: torch.Tensor) -> Iterator[tuple[nn.Module, str]]:
    """Modules that have a parameter, or what stands for it, and its name there."""
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module.__dict__.items()):
            if value is weight:
                yield module, name


def put_in_place(module: nn.Module, tiled: Mapping[str, TiledWeight]) -> None:
    """Put TiledWeights of the same tiles into their module in place of its weights, and the tiles as its children."""
    for name in tiled:
        module._parameters[name] = None  # its place among the others stays
        module.__dict__[name] = tiled[name]
    name = next(iter(tiled)) if len(tiled) == 1 else "experts"
    tiles = max((weight.tiles for weight in tiled.values()), key=len)  # some weights are of fewer experts
    module.add_module(TILES + name, nn.ModuleList(tiles))


def move_tiled(model: nn.Module, device: torch.device) -> None:
    """Make every TiledWeight of the model anew on `device`. The tiles stay where they are."""
    for module in model.modules():
        for name, tiled in list(module.__dict__.items()):
            if isinstance(tiled, TiledWeight):
                module.__dict__[name] = type(tiled).of(tiled, device, tiled.origin, tiled.weight, tiled.tiles)


def cut_together(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module that can be cut, by name. If they are several, they are those of the same experts."""
    weights = {name: weight for name, weight in module._parameters.items() if weight is not None}
    if isinstance(module, nn.Linear) or (
        # a norm changes rows as they are looked up; the others change the gradient
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    ):
        return {"weight": weights["weight"]} if "weight" in weights else {}
    packed = {name: weight for name, weight in weights.items() if weight.dim() == 3}
    if "Experts" in type(module).__name__:
        return packed
    return {name: weight for name, weight in packed.items() if len(weight) == getattr(module, "num_experts", None)}


def _tiled(
    weights: dict[str, nn.Parameter], names: dict[int, str], most: int, block: int = 1
) -> dict[str, TiledWeight]:
    """A tile begins at a multiple of `block` elements of each weight, so that blocks with one scale stay whole."""
    rows = max(map(len, weights.values()))
    numel = sum(weight.numel() for weight in weights.values())
    count = min(rows, -(-numel // most))
    each = max(1, min(-(-rows // count), most // (numel // rows)))
    step = math.lcm(*(block // math.gcd(block, weight[0].numel()) for weight in weights.values()))
    each = max(step, each // step * step)
    tiles = []
    for first in range(0, rows, each):
        parts, params = {}, {}
        for name, weight in weights.items():
            if first >= len(weight):
                continue
            values = weight.detach()[first : first + each]
            params[name] = nn.Parameter(torch.empty_like(values), requires_grad=weight.requires_grad)
            parts[name] = Part(names[id(weight)], weight.shape, first * weight[0].numel())
        tiles.append(Tile(parts, params))
    return {
        name: TiledWeight.of(
            weight, weight.device, names[id(weight)], name, [tile for tile in tiles if name in tile.parts]
        )
        for name, weight in weights.items()
    }


def _pieces(tile: Tile, name: str) -> list[Piece]:
    shape = getattr(tile, name).shape
    if len(shape) > 2:
        return [Piece(tile, name, 0, shape[1], expert) for expert in range(shape[0])]
    first = tile.parts[name].first // shape[1]
    return [Piece(tile, name, first, first + shape[0])]


def linear(input: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear of an input (..., columns): each tile gives the results of its rows."""
    results = []
    for piece in weight.pieces:
        rows = None if bias is None else bias[piece.first : piece.last]
        results.append(piece.tile(linear_rows, piece.weight, input, rows, piece.expert))
    return torch.cat(results, dim=-1) if len(results) > 1 else results[0]


def linear_rows(
    weight: torch.Tensor, input: torch.Tensor, bias: torch.Tensor | None, expert: int | None
) -> torch.Tensor:
    return F.linear(input, weight if expert is None else weight[expert], bias)


def _matmul(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A cut matrix times an input, or an input times the matrix of an expert."""
    if isinstance(first, TiledWeight):
        results = [piece.tile(rows_times, piece.weight, second, piece.expert) for piece in first.pieces]
        return torch.cat(results, dim=-min(2, second.dim()))
    assert isinstance(second, TiledWeight)
    (piece,) = second.pieces
    return _product(first, piece)


def _bmm(inputs: torch.Tensor, weight: TiledWeight) -> torch.Tensor:
    return torch.stack([_product(input, piece) for input, piece in zip(inputs, weight.pieces, strict=True)])


def _product(input: torch.Tensor, piece: Piece) -> torch.Tensor:
    """With an expert's matrix, which lies in its tile as the model multiplies it."""
    result: torch.Tensor = piece.tile(matmul_rows, piece.weight, input, piece.expert)
    return result


def rows_times(weight: torch.Tensor, input: torch.Tensor, expert: int | None) -> torch.Tensor:
    return (weight if expert is None else weight[expert]) @ input


def matmul_rows(weight: torch.Tensor, input: torch.Tensor, expert: int) -> torch.Tensor:
    return input @ weight[expert]


def _getitem(weight: TiledWeight, expert: Any) -> TiledWeight:
    return weight.of_expert(int(expert))


def _embedding(
    input: torch.Tensor,
    weight: TiledWeight,
    padding_idx: int | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    if len(weight.pieces) == 1:
        (whole,) = weight.pieces
        found: torch.Tensor = whole.tile(_rows_of, whole.weight, input, padding_idx)
        return found
    total: torch.Tensor | None = None
    for piece in weight.pieces:
        known = piece.tile(_known_rows, piece.weight, input, piece.first, padding_idx)
        total = known if total is None else total + known
    assert total is not None
    return total


def _rows_of(weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    return F.embedding(ids, weight, padding_idx)


def _known_rows(weight: torch.Tensor, ids: torch.Tensor, first: int, padding_idx: int | None) -> torch.Tensor:
    """The embeddings of `ids`: rows of this tile, and zeros for other ids. The row `padding_idx` gets no gradient."""
    inside = (ids >= first) & (ids < first + weight.shape[0])
    learns = inside if padding_idx is None else inside & (ids != padding_idx)
    found = F.embedding(torch.where(inside, ids - first, 0), weight)
    found = torch.where(learns.unsqueeze(-1), found, found.detach())
    return torch.where(inside.unsqueeze(-1), found, torch.zeros((), dtype=found.dtype, device=found.device))


def _name_of(func: Any) -> str:
    return str(getattr(func, "__qualname__", None) or getattr(func, "__name__", func))


_PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.bmm: _bmm,
    torch.Tensor.bmm: _bmm,
    torch.Tensor.__getitem__: _getitem,
}
_BATCHED = (torch.bmm, torch.Tensor.bmm)
