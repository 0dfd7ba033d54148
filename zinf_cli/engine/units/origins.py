"""What the parameters of a cut model (tiles.py) were before it was cut; and which of them lie packed on tiers."""

from __future__ import annotations

from typing import Any

from torch import nn

from zinf_cli.engine.units.tiles import PACKED, Part, Tile, TiledWeight, cut_together

_WHOLE = "updated_whole"


def shapes_of(model: nn.Module, *, trained: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by name, or of the trained alone, as before the model was cut.

    They come in the order of model.parameters().
    """
    names = {id(param): name for name, param in model.named_parameters()}
    shapes: dict[str, tuple[int, ...]] = {}
    for module in model.modules():
        for name, param in () if isinstance(module, Tile) else module._parameters.items():
            if isinstance(tiled := module.__dict__.get(name), TiledWeight):
                if tiled.tiles[0].get_parameter(tiled.weight).requires_grad or not trained:
                    shapes.setdefault(tiled.origin, tuple(tiled.shape))
            elif param is not None and (param.requires_grad or not trained):
                shapes.setdefault(names[id(param)], tuple(param.shape))
    return shapes


def pack(module: nn.Module, weight: str, packing: str) -> None:
    """Have a parameter of `module` lie packed on its tier while it is frozen. `packing` is a name of PACKINGS."""
    module.__dict__.setdefault(PACKED, {})[weight] = packing


def packings_of(model: nn.Module) -> dict[str, str]:
    """The packing of each parameter that has one, by the name that it had before the model was cut."""
    return _marked(model, PACKED)


def update_whole(module: nn.Module, weight: str) -> None:
    """Have a matrix of `module` updated whole, by an optimizer that does that (`OptimizerState.whole`)."""
    module.__dict__.setdefault(_WHOLE, {})[weight] = None


def updated_whole(model: nn.Module) -> set[str]:
    """The matrices that are updated whole, by the names that they had before the model was cut."""
    return set(_marked(model, _WHOLE))


def _marked(model: nn.Module, attribute: str) -> dict[str, Any]:
    """What modules say of their parameters under `attribute`, by the names that these had before the model was cut."""
    return {
        f"{path}.{name}" if path else name: said
        for path, module in model.named_modules()
        for name, said in module.__dict__.get(attribute, {}).items()
    }


def parts_of(model: nn.Module) -> dict[int, Part]:
    """Where each tile's parameters lie in those that were cut, by the id() of the tile's parameter."""
    tiles = (tile for tile in model.modules() if isinstance(tile, Tile))
    return {id(getattr(tile, name)): part for tile in tiles for name, part in tile.parts.items()}


def experts_of(model: nn.Module) -> set[int]:
    """The parameters, by id(), that pack experts which the model computes one after another.

    transformers computes experts so where a configuration asks for `eager`, and those of a cut model. Its default
    multiplies all of them at once, unless a class has a way of its own.
    """
    found = set()
    for module in model.modules():
        way = getattr(getattr(module, "config", None), "_experts_implementation", "eager")
        weights = module.parameters(recurse=False) if isinstance(module, Tile) else cut_together(module).values()
        found |= {id(weight) for weight in weights if weight.dim() > 2 and way == "eager"}
    return found
