"""Adafactor beside torch.optim.Adafactor: the same bits wherever the state lies, and a plan with every byte of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from in_process import Closed, assert_goes_on_in_the_least_memory
from in_process import run as run_here
from plain import engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import random_source
from workshop import Workshop
from zinf_cli.checkpoint.folder import find_checkpoint
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.errors import RecipeError
from zinf_cli.model_state import factors_of, num_factors
from zinf_cli.models.model import build_model
from zinf_cli.plan.checkpoints import checkpoint_bytes
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Optimizer
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.figures import find_figures
from zinf_cli.train.optimizer import kernel_of, undecayed

STEPS, RATE = 10, 1e-2
ADAFACTOR = kernel_of(Optimizer(name="adafactor", lr=RATE, weight_decay=0.1), RATE)
TORCH = partial(torch.optim.Adafactor, lr=RATE, weight_decay=0.1)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("how", "dtype"),
    [*product(["in memory", "device", "cached", "deferred", "speculative", "eager"], [torch.float32, torch.bfloat16])],
)
def test_it_trains_with_the_bits_of_torch(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    clip = {"eager": None, "speculative": 1.12}.get(how, 1.0)
    expected: dict[str, torch.Tensor] = {}
    source = random_source("llama")
    losses = plain_losses(source, STEPS, clip=clip, dtype=dtype, parameters=expected, optimizer_of=TORCH)
    tier = {"in memory": "cpu", "device": "device"}.get(how, "nvme")
    options = replace(everything_on(tier, tmp_path), speculate=how == "speculative")
    if how == "cached":
        options = every_other_unit_cached(options)
    engine = open_engine(source, options, optimizer=ADAFACTOR.state, dtype=dtype, whole="adafactor", chunk_numel=4096)
    assert engine_losses(engine, STEPS, clip=clip, eager=how == "eager", kernel=ADAFACTOR, close=False) == losses
    found = {name: value for number in range(len(engine.units)) for name, value in engine.read_params(number).items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    engine.close()


def in_two_groups(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """Vectors have no decay."""
    params = list(params)
    groups = [[param for param in params if (param.dim() > 1) == decays] for decays in (True, False)]
    decays = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)]
    return torch.optim.Adafactor(decays, lr=RATE)


def test_some_parameters_may_have_no_decay(tmp_path: Path) -> None:
    source = random_source("llama")
    losses = plain_losses(source, STEPS, optimizer_of=in_two_groups)
    kernel = replace(ADAFACTOR, no_decay=undecayed(build_model(source), ["*norm*"]))
    engine = open_engine(source, everything_on("nvme", tmp_path), optimizer=kernel.state, whole="adafactor")
    assert engine_losses(engine, STEPS, kernel=kernel) == losses
    assert losses != plain_losses(source, STEPS, optimizer_of=TORCH)


def test_packed_experts_have_factors_of_each_matrix(tmp_path: Path) -> None:
    source = random_source("mixtral")
    losses = plain_losses(source, STEPS, optimizer_of=TORCH)
    options = everything_on("nvme", tmp_path)
    engine = open_engine(source, options, optimizer=ADAFACTOR.state, whole="adafactor", chunk_numel=4096)
    found = engine_losses(engine, STEPS, kernel=ADAFACTOR)
    assert relative_difference(found, losses) < 1e-6


def workshop_of(folder: Path) -> Workshop:
    workshop = Workshop(folder)
    workshop.content["optimizer"] = {"name": "adafactor", "lr": RATE}
    del workshop.content["dataset"]["eval_fraction"]
    workshop.write()
    return workshop


@pytest.mark.sampled
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_in_the_least_memory(precision: str, tmp_path: Path) -> None:
    recipe = assert_goes_on_in_the_least_memory(workshop_of(tmp_path).recipe, precision)
    layout = Manifest.load(find_checkpoint(tmp_path / "whole")).layout
    assert sum(region.num_bytes for region in layout.regions) == checkpoint_bytes(find_figures(recipe, 1))


def test_the_plan_has_every_byte(tmp_path: Path, closed: list[Closed]) -> None:
    changes = [f"output_dir={tmp_path / 'run'}", "train.max_grad_norm=null", "offload.activations=cpu"]
    recipe = load_recipe(workshop_of(tmp_path).recipe, changes)
    figures = find_figures(recipe, 1)
    plan = best_plan(recipe, figures)
    for steps in (2, 5):  # what three steps more move is three times a step's traffic: ends are alike
        planned = best_plan(recipe, replace(figures, data=replace(figures.data, max_steps=steps)))
        run_here(recipe.model_copy(update={"output_dir": tmp_path / str(steps)}), planned)
    few, more = (tier.read + tier.written for tier in closed)
    assert more - few == 3 * plan.nvme_traffic
    trained = sum(unit.trainable_bytes for unit in figures.model.units)
    assert (
        sum(unit.factor_bytes for unit in figures.model.units) < trained / 2
    )  # and most of that is padding, in a model as small
    assert closed[0][:2] == (plan.nvme_bytes, trained + 2 * plan.nvme_written)


def test_whole_parameters_are_for_one_rank(tmp_path: Path) -> None:
    recipe = load_recipe(workshop_of(tmp_path).recipe)
    with pytest.raises(RecipeError, match=r"optimizer\.name: adafactor updates whole parameters, and each of 2 ranks"):
        find_figures(recipe, 2)
    with pytest.raises(ValidationError, match="adafactor keeps too little to round"):
        Optimizer(name="adafactor", state_dtype="bf16")
    with pytest.raises(ValidationError, match="adafactor has no betas"):
        Optimizer(name="adafactor", betas=(0.9, 0.99))


def test_factors_are_rows_and_columns_of_each_matrix() -> None:
    assert [num_factors(shape) for shape in ((5, 3), (4, 5, 3), (7,), ())] == [8, 32, 7, 1]
    assert factors_of([(5, 3), (7,)]) == (((0, 8), (8, 15)), 2048)
