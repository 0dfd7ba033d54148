"""The matrices of a model's layers: weights that multiply what a layer computes, and make no logits."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zinf_cli.engine.units.tiles import cut_together


def matrices_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(path, module, name in it, parameter) of each: of linear layers (GPT-2's Conv1D too), and packed experts.

    `model` is not cut.
    """
    head = model.get_output_embeddings()
    others = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others |= {id(head.weight)} if head is not None else set()
    for path, module in model.named_modules():
        of_linear = isinstance(module, nn.Linear | Conv1D)
        weights = {"weight": module._parameters.get("weight")} if of_linear else cut_together(module)
        for name, weight in weights.items():
            if weight is not None and id(weight) not in others:
                yield path, module, name, weight
