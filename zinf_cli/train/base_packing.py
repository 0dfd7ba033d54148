"""Which parameters of a frozen model lie packed on their tier (engine/packed.py).

In int8 and nf4 they are the matrices of linear layers (GPT-2's Conv1D too), as QLoRA has it, and of packed experts.
What is looked up, makes logits, normalises or is added stays as it is, and so does what the model's class keeps in
fp32. In bf16 they are all parameters but these last ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zinf_cli.engine.units.origins import pack
from zinf_cli.engine.units.tiles import cut_together
from zinf_cli.train.model import kept_in_fp32


def pack_base(model: PreTrainedModel, base_dtype: str) -> None:
    """Have the parameters of `model` (before it is adapted or cut) lie as `model.base_dtype` says while frozen."""
    if base_dtype == "auto":
        return
    kept = set(kept_in_fp32(model, torch.float16))  # which wants the most
    for path, module in model.named_modules():
        for name, param in module._parameters.items() if base_dtype == "bf16" else _matrices(model, module):
            whole_name = f"{path}.{name}" if path else name
            if param is not None and param.is_floating_point() and whole_name not in kept:
                pack(module, name, base_dtype)


def _matrices(model: PreTrainedModel, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of those of `module` that multiply what a layer computes."""
    if isinstance(module, nn.Linear | Conv1D):
        head = model.get_output_embeddings()
        if head is None or head.weight is not module.weight:
            yield "weight", cast("nn.Parameter", module.weight)
    elif not isinstance(module, nn.Embedding):
        yield from cut_together(module).items()
