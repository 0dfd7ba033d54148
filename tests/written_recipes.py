"""Recipes that `zinf init` writes for tiny models, and texts for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from tiny_models import CONFIGS
from zinf_cli.commands.init import InitRequest, init
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.screen import Screen

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


def saved(name: str, folder: Path) -> Path:
    config = AutoConfig.for_model(name, **CONFIGS[name])
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto = AutoModelForMaskedLM if name == "bert" else auto
    auto.from_config(config).save_pretrained(folder)
    return folder


def written(
    model: Path, *texts: Path, deepspeed: Path | None = None, num_ranks: int | None = None, adapter: bool = False
) -> Recipe:
    out = texts[0].parent / "new.yaml"
    init(InitRequest(model, texts, out, deepspeed, num_ranks, adapter), Screen(stderr=True))
    return load_recipe(out)


def records(path: Path, *values: Any) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(values)), path)
    else:
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def holding(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
