"""A frozen model in fewer bits under an adapter: the losses of peft on the rounded model, wherever the bytes lie."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forked_ranks import ForkedRanks
from in_process import run as run_here
from plain_peft import STEPS, adapted_workshop, plain
from tiny_models import batch
from workshop import NVME, Ended, Workshop
from zinf_cli.engine.packed import rounded
from zinf_cli.errors import RecipeError, ZinfError
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.screens.plan import plan_screen
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures

MIXED = ["offload.params=nvme", "offload.grads=cpu", "offload.optimizer=cpu", "offload.activations=cpu"]
CPU = [f"offload.{state}=cpu" for state in NVME]


def workshops(tmp_path: Path, base_dtype: str, name: str = "llama", **adapter: Any) -> tuple[Workshop, Workshop]:
    """A recipe whose model lies in `base_dtype`, and the same of a model whose weights are rounded to that."""
    for folder in ("packed", "rounded"):
        (tmp_path / folder).mkdir()
    packed, other = (adapted_workshop(tmp_path / folder, name, adapter) for folder in ("packed", "rounded"))
    packed.content["model"]["base_dtype"] = base_dtype
    packed.write()
    path = tmp_path / "rounded" / "base" / "model.safetensors"
    weights = load_file(path)
    for key, value in weights.items():
        stays = "norm" in key or "embed" in key or "lm_head" in key or "wte" in key or "wpe" in key or value.dim() < 2
        if base_dtype == "bf16" or not (stays or ".gate.weight" in key):
            weights[key] = rounded(value, base_dtype).to(value.dtype).contiguous()
    save_file(weights, path, {"format": "pt"})
    return packed, other


@pytest.mark.sampled
@pytest.mark.parametrize(("base_dtype", "precision"), [("bf16", "fp32"), ("int8", "fp32"), ("nf4", "bf16")])
def test_losses_are_those_of_the_rounded_model(
    base_dtype: str, precision: str, forked: ForkedRanks, tmp_path: Path
) -> None:
    packed, other = workshops(tmp_path, base_dtype, target_modules="all-linear")
    run = packed.fork(forked, "run", *MIXED, f"train.precision={precision}")
    assert run.losses == other.fork(forked, "run", f"train.precision={precision}").losses


def test_losses_are_those_of_peft_on_every_tier(forked: ForkedRanks, tmp_path: Path) -> None:
    packed, other = workshops(tmp_path, "nf4")
    run = packed.fork(forked, "run", f"checkpoint.interval={STEPS}")
    expected, trained = plain(other.recipe)
    assert run.losses == pytest.approx(expected, rel=1e-5)
    for number, placement in enumerate((CPU, MIXED)):
        assert packed.fork(forked, f"placed-{number}", *placement).losses == run.losses
    assert_merged_into_what_was_trained_on(run, trained, tmp_path / "merged")


def assert_merged_into_what_was_trained_on(run: Ended, trained: Any, folder: Path) -> None:
    export(run.run_dir, folder, merge=True)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(merged.eval()(**batch()).logits, trained.eval()(**batch()).logits, atol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("llama-tied", {"target_modules": ["q_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"]}),
        ("mixtral", {"target_modules": ["k_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    ],
)
def test_other_models_lie_in_four_bits(name: str, adapter: dict[str, Any], forked: ForkedRanks, tmp_path: Path) -> None:
    packed, other = workshops(tmp_path, "nf4", name, **adapter)
    assert packed.fork(forked, "run").losses == other.fork(forked, "run").losses


def test_ranks_gather_what_is_packed_and_a_resume_goes_on(forked: ForkedRanks, tmp_path: Path) -> None:
    packed, other = workshops(tmp_path, "nf4")
    expected = other.fork(forked, "run", "train.max_steps=6").losses
    ranks = packed.fork(forked, "ranks", *MIXED, "checkpoint.interval=3", "train.max_steps=3", ranks=2)
    assert ranks.losses == pytest.approx(expected[:3], rel=1e-6)
    goes_on = packed.fork(forked, "ranks", *CPU, "checkpoint.interval=3", "train.max_steps=6", ranks=2)
    assert goes_on.losses == pytest.approx(expected, rel=1e-6)
    refused = load_recipe(packed.recipe, ["model.base_dtype=auto", f"output_dir={tmp_path / 'packed' / 'ranks'}"])
    with pytest.raises(ZinfError, match=r"model\.base_dtype was nf4, is auto"):
        find_figures(refused, 1)


@pytest.mark.parametrize(
    ("base_dtype", "precision", "most"),
    [("bf16", "fp32", 4.1), ("bf16", "bf16", 4.1), ("int8", "bf16", 2.2), ("nf4", "fp32", 1.2)],
)
def test_the_plan_has_every_byte(base_dtype: str, precision: str, most: float, tmp_path: Path) -> None:
    """And a matrix of a layer that is large enough for pages takes few of them for its two reads."""
    workshop = adapted_workshop(tmp_path)
    del workshop.content["dataset"]["eval_fraction"]
    workshop.write()
    at = [f"model.base_dtype={base_dtype}", f"train.precision={precision}", f"output_dir={tmp_path / 'run'}"]
    recipe = load_recipe(workshop.recipe, [*MIXED, *at, "train.max_steps=4"])
    figures = find_figures(recipe, 1)
    plan = best_plan(recipe, figures)
    lines = [line for line in run_here(recipe, plan) if "loss" in line]
    assert {line["nvme_write_bytes"] for line in lines} == {0}
    assert sum(line["nvme_read_bytes"] for line in lines) == 4 * plan.nvme_traffic
    assert plan.nvme_written == 0
    screen = io.StringIO()
    Console(width=200, file=screen).print(plan_screen(plan, "tiny"))
    assert ("frozen in" in screen.getvalue()) == any(unit.packed_bytes for unit in figures.model.units)
    layer = next(unit for unit in figures.model.units if unit.name == "model.layers.0")
    matrices = layer.unpacked_bytes // (4 if precision == "fp32" else 2)
    if precision == "fp32" or base_dtype != "bf16":
        assert 2 * layer.packed_bytes <= most * matrices + 2 * 4096
    else:
        assert layer.packed_bytes == 0


def test_parts_have_the_blocks_of_the_whole(tmp_path: Path) -> None:
    packed, other = workshops(tmp_path, "nf4", target_modules="all-linear")
    losses = []
    for workshop, most in ((packed, 700), (other, None)):
        at = [*MIXED, f"output_dir={workshop.folder / f'run-{most}'}", "train.max_steps=4"]
        recipe = load_recipe(workshop.recipe, at)
        lines = run_here(recipe, best_plan(recipe, find_figures(recipe, 1, most=most)))
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_only_a_frozen_model_lies_in_fewer_bits(tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.base_dtype=nf4 is for a model that stays as it is"):
        load_recipe(workshop.recipe, ["adapter.type=null", "adapter.r=8", "model.base_dtype=nf4"])
