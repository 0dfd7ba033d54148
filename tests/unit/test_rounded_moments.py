"""Moments in bf16: each update rounds them, and nothing else is different from fp32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from checkpoints import resumed, save
from in_process import run
from plain import LR, engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses
from tiny_models import random_source
from tiny_recipes import recipe_of
from zinf_cli.model_state import ADAMW
from zinf_cli.plan.search import best_plan
from zinf_cli.screens.plan import plan_screen
from zinf_cli.train.figures import find_figures

STEPS, CUT = 6, 3
ROUNDED = ADAMW.stored_as("BF16")


class RoundedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in its own operations, with moments that are bf16 between two steps."""

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        super().__init__(params, {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for param in group["params"]:
                assert param.grad is not None
                state = self.state[param]
                count = state["step"] = state.get("step", 0) + 1
                first, second = (state.get(name, torch.zeros_like(param)).float() for name in ("exp_avg", "exp_avg_sq"))
                param.mul_(1 - lr * group["weight_decay"])
                first.lerp_(param.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                denominator = (second.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
                param.addcdiv_(first, denominator, value=-lr / (1 - beta1**count))
                state["exp_avg"], state["exp_avg_sq"] = first.bfloat16(), second.bfloat16()


@cache
def reference(dtype: torch.dtype, clip: float | None) -> list[list[float]]:
    return plain_losses(random_source("llama"), STEPS, clip=clip, dtype=dtype, optimizer_of=RoundedAdamW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["device", "cpu", "nvme", "eager", "speculative", "cached"])
def test_losses_are_those_of_the_reference(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = everything_on(how if how in ("device", "cpu") else "nvme", tmp_path)
    options = replace(options, speculate=how == "speculative")
    if how == "cached":
        options = every_other_unit_cached(options)
    clip = {"eager": None, "speculative": 1.12}.get(how, 1.0)
    engine = open_engine(random_source("llama"), options, dtype=dtype, optimizer=ROUNDED)
    assert engine_losses(engine, STEPS, clip=clip, eager=how == "eager") == reference(dtype, clip)
    assert reference(dtype, clip) != plain_losses(random_source("llama"), STEPS, clip=clip, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_them(dtype: torch.dtype, tmp_path: Path) -> None:
    opened: dict[str, Any] = {"dtype": dtype, "optimizer": ROUNDED}
    first = open_engine(random_source("llama"), everything_on("nvme", tmp_path / "nvme"), **opened)
    engine_losses(first, CUT, close=False)
    folder = save(first, tmp_path / "run", CUT)
    first.close()
    second = resumed(folder, "llama", everything_on("cpu", tmp_path), **opened)
    assert engine_losses(second, STEPS, first=CUT) == reference(dtype, 1.0)[CUT:]


@pytest.mark.parametrize(("precision", "item_bytes"), [("fp32", 4), ("bf16", 6)])
@pytest.mark.usefixtures("own_folders", "stated_speed")
def test_the_plan_counts_and_names_them(precision: str, item_bytes: int, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", precision=precision, max_steps=12, max_grad_norm=None)
    optimizer = recipe.optimizer.model_copy(update={"state_dtype": "bf16"})
    figures = find_figures(recipe.model_copy(update={"optimizer": optimizer}), 1)
    plan = best_plan(recipe.model_copy(update={"optimizer": optimizer}), figures)
    trained = sum(unit.trainable_numel for unit in figures.model.units)
    assert {line.what: line.num_bytes for line in plan.lines}["optimizer"] == item_bytes * trained
    lines = run(recipe.model_copy(update={"optimizer": optimizer}), plan)
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)
    screens = []
    for planned in (plan, best_plan(recipe, find_figures(recipe, 1))):
        screens.append(StringIO())
        Console(width=200, file=screens[-1]).print(plan_screen(planned, "tiny", []))
    assert ["results differ from those of fp32" in screen.getvalue() for screen in screens] == [True, False]
