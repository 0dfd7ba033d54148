"""Cuts a model, and reads the weights of one that was cut (engine/units/tiles.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from zinf_cli.engine.units.tiles import Part, Tile, cut
from zinf_cli.train.weights import RangedWeights


def cut_model(model: nn.Module, most: int) -> None:
    """Cut weights of more than `most` elements into tiles. From now on experts are computed one after another."""
    cut(model, most)
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")


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
