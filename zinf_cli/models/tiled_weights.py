"""Cuts a model, and reads the weights of one that was cut (engine/units/tiles.py)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from zinf_cli.engine.units.tiles import TILES, Part, Tile, TiledWeight, cut
from zinf_cli.models.weights import RangedWeights


def cut_model(model: nn.Module, most: int, whole: Collection[str] = ()) -> None:
    """Cut weights of more than `most` elements into tiles, but for those named in `whole`.

    From now on experts are computed one after another.
    """
    cut(model, most, whole)
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")


def uncut(model: nn.Module, weights: Collection[str]) -> None:
    """Undo the cut of `weights`, by their names in the model, and of those that were cut together with them."""
    made: dict[str, nn.Parameter] = {}
    for module in list(model.modules()):
        tiled = {name: value for name, value in module.__dict__.items() if isinstance(value, TiledWeight)}
        if not any(value.origin in weights for value in tiled.values()):
            continue
        delattr(module, next(name for name, _ in module.named_children() if name.startswith(TILES)))
        for name, value in tiled.items():
            like = value.tiles[0].get_parameter(value.weight)
            whole = nn.Parameter(like.new_empty(value.shape), requires_grad=like.requires_grad)
            del module.__dict__[name]
            module.register_parameter(name, made.setdefault(value.origin, whole))


class TiledWeights:
    """The WeightSource of a `model` that was cut. `source` is that of the whole model."""

    def __init__(self, source: RangedWeights, model: nn.Module) -> None:
        self._source = source
        self._model = model

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """See WeightSource."""
        parts = {name: part for name in names if (part := self._part(name)) is not None}
        values = self._source.read([name for name in names if name not in parts])
        for name, part in parts.items():
            shape = self._model.get_parameter(name).shape
            values[name] = self._source.read_part(part.name, part.first, part.first + shape.numel()).view(shape)
        return values

    def _part(self, name: str) -> Part | None:
        owner, _, attribute = name.rpartition(".")
        tile = self._model.get_submodule(owner)
        return tile.parts[attribute] if isinstance(tile, Tile) else None
