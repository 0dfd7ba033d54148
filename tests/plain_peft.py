"""Adapters by plain PyTorch and peft, as their users train them; and recipes of tiny models that have adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_models import CONFIGS
from workshop import Workshop
from zinf_cli.batches.collator import kind_of_stream
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.setup import open_text

STEPS = 10


NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def adapted_workshop(folder: Path, name: str = "llama", adapter: dict[str, Any] | None = None) -> Workshop:
    """A recipe that trains an adapter on a tiny model of the architecture `name`, which lies in a folder."""
    config = {"model_type": name, **CONFIGS[name], **NO_DROPOUT.get(name, {})}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(folder / "base")
    workshop = Workshop(folder)
    workshop.content["model"] = {"name_or_path": str(folder / "base")}
    workshop.content["adapter"] = {"type": "lora", "r": 8, "alpha": 16, **(adapter or {})}
    workshop.content["train"] |= {"max_steps": STEPS}
    workshop.write()
    return workshop


def plain(recipe_path: Path, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[list[float], nn.Module]:
    """The loss of each step of a recipe, by peft's own model in a loop of PyTorch; and that model. No dropout."""
    recipe = load_recipe(recipe_path)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=dtype)
    text = open_text(recipe, base, 1)
    settings = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 asks transformers by an old name; of GPT-2's Conv1D it warns
        torch.manual_seed(recipe.seed)
        model = get_peft_model(base, settings).train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
    losses = []
    for step in range(STEPS):
        windows = text.order.windows(step)
        losses.append(0.0)
        for window in windows:
            ids = kind_of_stream(text.train).window(window, recipe.train.seq_len)[0][None]
            loss = model(input_ids=ids, labels=ids).loss / len(windows)
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    return losses, model
