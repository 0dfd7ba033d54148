"""Sequences longer than a model's table of positions are found before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig

from tiny_classes import OTHERS, SIZE, real
from tiny_models import CONFIGS
from zinf_cli.errors import ModelError
from zinf_cli.models.positions import check_seq_len
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.figures import find_figures

GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTJForCausalLM": ("gptj", {**GPT, "rotary_dim": 8}),
    "CTRLLMHeadModel": ("ctrl", {**GPT, "dff": 48}),
    "MptForCausalLM": ("mpt", {"vocab_size": 96, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}),
    "RoFormerForMaskedLM": ("roformer", SIZE),
    "RobertaPreLayerNormForMaskedLM": ("roberta-prelayernorm", SIZE),
    "XLNetLMHeadModel": ("xlnet", {"vocab_size": 96, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}),
    "NystromformerForMaskedLM": ("nystromformer", {**SIZE, "num_landmarks": 4, "segment_means_seq_len": 64}),
}


def limit_of(model: Any) -> int | None:
    try:
        check_seq_len(model, 10**9)
    except ModelError as error:
        found = re.search(r"knows (\d+) positions", error.message)
        assert found is not None
        return int(found.group(1))
    return None


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS, *MORE])
def test_the_limit_is_where_the_model_ends(name: str) -> None:
    if name in MORE:
        model = getattr(transformers, name)._from_config(AutoConfig.for_model(MORE[name][0], **MORE[name][1])).eval()
    else:
        model = real(name)
    limit = limit_of(model)

    def runs(seq_len: int) -> bool:
        ids = torch.arange(seq_len)[None] % 90 + 3
        try:
            with torch.no_grad():
                model(input_ids=ids, labels=ids, use_cache=False)
        except (IndexError, RuntimeError):
            return False
        return True

    if limit is None:
        assert runs(130)
    else:
        check_seq_len(model, limit)
        assert [runs(limit), runs(limit + 1)] == [True, False]


@pytest.mark.parametrize(("name", "limit"), [("gpt2", 64), ("opt", 64), ("bert", 512)])
def test_a_recipe_beyond_it_is_refused(name: str, limit: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(2000) % 90)
    model = {"model_type": name, **CONFIGS[name]}
    dataset, train = {"path": str(tmp_path / "a.npy")}, {"seq_len": limit + 1}
    recipe = Recipe.model_validate({"model": {"config": model}, "dataset": dataset, "train": train})
    with pytest.raises(ModelError) as caught:
        find_figures(recipe, 1)
    assert re.search(rf"train\.seq_len: \w+ knows {limit} positions \(\S+\)", caught.value.line())
    assert caught.value.exit_code == 2
