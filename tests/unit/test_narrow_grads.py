"""A gradient goes to its tier in 16 bits where these hold it: with the same results, and half of the bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from in_process import run
from late_writes import late_writes
from plain import engine_losses, everything_on, open_engine, plain_losses
from tiny_models import random_source
from tiny_recipes import recipe_of
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.traffic.narrow_grads import narrowed
from zinf_cli.model_state import BLOCK_NUMEL
from zinf_cli.plan.search import best_plan
from zinf_cli.train.figures import find_figures

STEPS = 6
BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_what_16_bits_hold_is_narrowed_in_place(dtype: torch.dtype) -> None:
    numel = 3 * BLOCK_NUMEL + 2048
    whole = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = whole.float()
    narrow = narrowed(values, dtype)
    assert torch.equal(narrow, whole)
    assert narrow.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("value", [1 + 2**-20, torch.nan, 1e-45])
def test_one_value_that_16_bits_do_not_hold_keeps_all_as_they_are(value: float) -> None:
    values = torch.ones(2 * BLOCK_NUMEL)
    values[-1] = value
    before = values.clone()
    assert narrowed(values, BF16) is values
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))
    assert narrowed(values, torch.float32) is values


@pytest.mark.parametrize(
    ("how", "count", "item_bytes"), [("deferred", 1, 2), ("speculative", 1, 2), ("deferred", 3, 4)]
)
def test_the_bits_are_those_of_plain_pytorch(how: str, count: int, item_bytes: int, tmp_path: Path) -> None:
    clip = 1.12
    expected = plain_losses(random_source("llama"), STEPS, count=count, clip=clip, dtype=BF16)
    options = replace(everything_on("nvme", tmp_path), speculate=how == "speculative")
    with late_writes("grads"):
        engine = open_engine(random_source("llama"), options, dtype=BF16)
        assert engine_losses(engine, STEPS, count=count, clip=clip) == expected
    alone = open_engine(
        random_source("llama"), replace(EngineOptions(nvme_folders=(tmp_path,)), grads="nvme"), dtype=BF16
    )
    engine_losses(alone, 2, count=count, clip=clip, close=False)
    numel = sum(flat.numel for unit in alone.units for flat in unit.layout.trainable)
    assert alone.tiers.grads.write_bytes == alone.tiers.grads.read_bytes == 2 * item_bytes * numel
    alone.close()


@pytest.mark.usefixtures("own_folders", "stated_speed")
def test_the_plan_counts_it(tmp_path: Path) -> None:
    once: dict[str, Any] = {"global_batch_size": 2, "precision": "bf16", "max_steps": 12}
    recipe = recipe_of(tmp_path, "llama", **once)
    figures = find_figures(recipe, 1)
    plan = best_plan(recipe, figures)
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in run(recipe, plan)) / 12
    numel = sum(unit.trainable_numel for unit in figures.model.units)
    assert moved == pytest.approx(plan.nvme_traffic, abs=numel)  # with fp32 there would be 4 bytes more
