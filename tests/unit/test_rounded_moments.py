"""Moments in bf16 and int8: each update rounds them, and nothing else is different from fp32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import pad

from checkpoints import resumed, save
from in_process import Closed, run
from plain import LR, engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses
from tiny_models import CONFIGS, random_source
from tiny_recipes import recipe_of
from zinf_cli.model_state import ADAMW, CHUNK_NUMEL, STATE_DTYPES, bytes_of
from zinf_cli.plan.search import best_plan
from zinf_cli.screens.plan import plan_screen
from zinf_cli.train.figures import find_figures

STEPS, CUT = 6, 3


def in_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def in_int8(values: torch.Tensor) -> torch.Tensor:
    """Blocks of 256: the largest magnitude, and of each value the fourth root of its share of that, in 127ths."""
    blocks = pad(values.reshape(-1), (0, -values.numel() % 256)).view(-1, 256)
    scales = blocks.abs().amax(1, keepdim=True).clamp(torch.finfo(torch.float32).tiny)
    codes = ((blocks.abs() / scales).sqrt().sqrt() * 127 + 0.5).floor()
    codes = torch.where(blocks != 0, codes.clamp(min=1), codes)
    magnitudes = codes.square().square() * (scales / 127**4)
    return magnitudes.copysign(blocks).view(-1)[: values.numel()].view(values.shape)


ROUNDED = {"bf16": in_bf16, "int8": in_int8}


class RoundedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in its own operations, with moments that are rounded between two steps."""

    def __init__(self, params: Iterable[torch.Tensor], state_dtype: str) -> None:
        super().__init__(params, {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})
        self.rounded = ROUNDED[state_dtype]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for param in group["params"]:
                assert param.grad is not None
                state = self.state[param]
                count = state["step"] = state.get("step", 0) + 1
                first, second = (state.get(name, torch.zeros_like(param)).clone() for name in ("exp_avg", "exp_avg_sq"))
                param.mul_(1 - lr * group["weight_decay"])
                first.lerp_(param.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                denominator = (second.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
                param.addcdiv_(first, denominator, value=-lr / (1 - beta1**count))
                state["exp_avg"], state["exp_avg_sq"] = self.rounded(first), self.rounded(second)


@cache
def reference(state_dtype: str, dtype: torch.dtype, clip: float | None) -> list[list[float]]:
    made = partial(RoundedAdamW, state_dtype=state_dtype)
    return plain_losses(random_source("llama"), STEPS, clip=clip, dtype=dtype, optimizer_of=made)


@cache
def unrounded(dtype: torch.dtype, clip: float | None) -> list[list[float]]:
    return plain_losses(random_source("llama"), STEPS, clip=clip, dtype=dtype)


def opened_with(state_dtype: str, dtype: torch.dtype) -> dict[str, Any]:
    optimizer = ADAMW.stored_as(STATE_DTYPES[state_dtype])
    return {"dtype": dtype, "optimizer": optimizer, "chunk_numel": CHUNK_NUMEL if state_dtype == "int8" else 8192}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("how", "dtype", "state_dtype"),
    [
        *product(
            ["device", "cpu", "nvme", "eager", "speculative", "cached"],
            [torch.float32, torch.bfloat16, torch.float16],
            ROUNDED,
        )
    ],
)
def test_losses_are_those_of_the_reference(how: str, dtype: torch.dtype, state_dtype: str, tmp_path: Path) -> None:
    options = everything_on(how if how in ("device", "cpu") else "nvme", tmp_path)
    options = replace(options, speculate=how == "speculative")
    if how == "cached":
        options = every_other_unit_cached(options)
    clip = {"eager": None, "speculative": 1.12}.get(how, 1.0)
    expected = reference(state_dtype, dtype, clip)
    engine = open_engine(random_source("llama"), options, **opened_with(state_dtype, dtype))
    assert engine_losses(engine, STEPS, clip=clip, eager=how == "eager") == expected
    assert expected != unrounded(dtype, clip)


@pytest.mark.parametrize("state_dtype", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_them(dtype: torch.dtype, state_dtype: str, tmp_path: Path) -> None:
    opened = opened_with(state_dtype, dtype)
    first = open_engine(random_source("llama"), everything_on("nvme", tmp_path / "nvme"), **opened)
    engine_losses(first, CUT, close=False)
    folder = save(first, tmp_path / "run", CUT)
    first.close()
    second = resumed(folder, "llama", everything_on("cpu", tmp_path), **opened)
    assert engine_losses(second, STEPS, first=CUT) == reference(state_dtype, dtype, 1.0)[CUT:]


@pytest.mark.parametrize(("precision", "state_dtype"), [("fp32", "bf16"), ("bf16", "bf16"), ("bf16", "int8")])
@pytest.mark.usefixtures("own_folders", "stated_speed")
def test_the_plan_counts_and_names_them(precision: str, state_dtype: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", precision=precision, max_steps=12, max_grad_norm=None)
    rounding = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"state_dtype": state_dtype})})
    figures = find_figures(rounding, 1)
    plan = best_plan(rounding, figures)
    trained = [unit.trainable_numel for unit in figures.model.units]
    moments = sum(2 * bytes_of(STATE_DTYPES[state_dtype], numel) for numel in trained)
    remainders = 2 * sum(trained) if precision == "bf16" else 0
    assert {line.what: line.num_bytes for line in plan.lines}["optimizer"] == moments + remainders
    lines = run(rounding, plan)
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)
    screens = []
    for planned in (plan, best_plan(recipe, find_figures(recipe, 1))):
        screens.append(StringIO())
        Console(width=200, file=screens[-1]).print(plan_screen(planned, "tiny", []))
    named = f"each update rounds moments to {state_dtype}: results differ from those of fp32"
    assert [named in screen.getvalue() for screen in screens] == [True, False]


@pytest.mark.usefixtures("own_folders", "stated_speed")
def test_bytes_of_a_parameter_are_as_planned(tmp_path: Path, closed: list[Closed]) -> None:
    """All state on the drive, bf16, no clipping. Of int8, scales take a sixteenth of a byte more; the head is read once
    less than the rest. What three steps more move is three times a step's traffic: ends are alike."""
    recipe = recipe_of(tmp_path, "llama", precision="bf16", max_grad_norm=None)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 512, "num_hidden_layers": 2}
    model = recipe.model.model_copy(update={"config": {"model_type": "llama", **CONFIGS["llama"], **sizes}})
    optimizer = recipe.optimizer.model_copy(update={"state_dtype": "int8"})
    offload = recipe.offload.model_copy(update={"activations": "cpu"})
    recipe = recipe.model_copy(update={"model": model, "optimizer": optimizer, "offload": offload})
    figures = find_figures(recipe, 1)
    for state_dtype, expected in (("fp32", 26), ("bf16", 18), ("int8", 14)):
        stored = replace(figures, optimizer=ADAMW.stored_as(STATE_DTYPES[state_dtype]))
        plan = best_plan(recipe, stored)
        assert plan.nvme_traffic == pytest.approx(expected * figures.model.num_params, rel=0.02)
    for steps in (2, 5):
        data = replace(figures.data, max_steps=steps)
        run(
            recipe.model_copy(update={"output_dir": tmp_path / str(steps)}),
            best_plan(recipe, replace(stored, data=data)),
        )
    few, more = (tier.read + tier.written for tier in closed)
    assert (more - few) / 3 == pytest.approx(plan.nvme_traffic, rel=0.001)
