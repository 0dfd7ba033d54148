"""Which parameters of a frozen model lie packed on their tier (engine/packed.py).

In int8 and nf4 they are the matrices of linear layers (GPT-2's Conv1D too), as QLoRA has it, and of packed experts.
What is looked up, makes logits, normalises or is added stays as it is, and so does what the model's class keeps in
fp32. In bf16 they are all parameters but these last ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from zinf_cli.engine.units.origins import pack
from zinf_cli.models.matrices import matrices_of
from zinf_cli.models.model import kept_in_fp32


def pack_base(model: PreTrainedModel, base_dtype: str) -> None:
    """Have the parameters of `model` (before it is adapted or cut) lie as `model.base_dtype` says while frozen."""
    if base_dtype == "auto":
        return
    kept = set(kept_in_fp32(model, torch.float16))  # which wants the most
    for path, module, name, param in _every(model) if base_dtype == "bf16" else matrices_of(model):
        if param.is_floating_point() and (f"{path}.{name}" if path else name) not in kept:
            pack(module, name, base_dtype)


def _every(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is not None:
                yield path, module, name, param
