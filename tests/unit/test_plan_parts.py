"""The plan of a model in parts: when it cuts, how far, and that the bytes and the least buffers hold there as well."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from in_process import run
from tiny_models import CONFIGS, random_source
from tiny_recipes import recipe_of
from zinf_cli.machine.profiles import Drives
from zinf_cli.plan import parts
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.parts import largest_that_fits, plan_in_parts
from zinf_cli.plan.predict import profile_here
from zinf_cli.plan.refusal import refusal
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train import figures as finding
from zinf_cli.train.figures import find_figures

MIB = 2**20
DBRX = {
    "model_type": "dbrx", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(autouse=True)
def stated_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "_flops", lambda *_: 1e13)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_the_least_buffers_are_enough(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, name)
    whole = run(recipe, best_plan(recipe, find_figures(recipe, 1)))
    for most in (4000, 1000):
        plan = best_plan(recipe, find_figures(recipe, 1, most=most))
        tight = run(recipe, replace(plan, working=plan.working.shrunk(1 << 60)))
        for one, other in zip(whole, tight, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert max(line["nvme_bytes"] for line in tight) <= plan.nvme_bytes


def test_the_plan_knows_that_parts_spare_a_recompute(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    whole, cut = find_figures(recipe, 1), find_figures(recipe, 1, most=1000)
    assert not any(unit.product for unit in whole.model.units if "layers" in unit.name)
    assert all(unit.product for unit in cut.model.units if "proj" in unit.name)
    passes = [best_plan(recipe, replace(figures, machine=whole.machine)).compute_s for figures in (whole, cut)]
    assert 3 / 4 <= passes[1] / passes[0] < 0.9


def test_a_model_is_cut_only_where_it_must_and_no_further(tmp_path: Path) -> None:
    recipe = _with_wide_blocks(tmp_path)
    figures = find_figures(recipe, 1)
    asked: list[int] = []

    def figures_of(most: int) -> Figures:
        asked.append(most)
        return replace(find_figures(recipe, 1, most=most), machine=figures.machine)

    needed = best_plan(recipe, figures).limits[0].needed
    frugal = min(best_plan(_with_memory(recipe, 1), figures).limits[0].needed, needed)
    for more, cuts in ((MIB, 0), (-40 * MIB, 1), (-110 * MIB, 1)):
        tight = _with_memory(recipe, frugal + more)
        asked.clear()
        plan = plan_in_parts(tight, figures, figures_of)
        assert plan.fits
        assert len(asked) == cuts
        assert plan.figures.model.most == (asked[-1] if asked else None)
    hopeless = _with_memory(recipe, figures.machine.process_bytes)
    assert largest_that_fits(hopeless, figures) is None
    asked.clear()
    refused = plan_in_parts(hopeless, figures, figures_of)
    assert not asked
    assert "; the largest, of model.layers.0." in refusal(refused, hopeless, figures_of).message


@pytest.mark.parametrize("name", ["llama", "t5", "qwen3_moe"])
def test_the_least_that_a_refusal_names_is_enough_and_less_is_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 4 KiB and more: parts of the least size are as many as they are in a large model."""
    monkeypatch.setattr(parts, "MOST_PARTS", 64)
    recipe = recipe_of(tmp_path, name)
    wide = {"t5": {"d_model": 512, "d_ff": 2048}}
    widths = wide.get(name, {"hidden_size": 512, "intermediate_size": 2048})
    config = {**(recipe.model.config or {}), **widths}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = find_figures(recipe, 1)

    @cache
    def figures_of(most: int) -> Figures:
        return replace(find_figures(recipe, 1, most=most), machine=figures.machine)

    hopeless = _with_memory(recipe, figures.machine.process_bytes)
    refused = refusal(plan_in_parts(hopeless, figures, figures_of), hopeless, figures_of).message
    least = int(re.findall(r"(\d+) MiB are enough", refused)[0])
    enough, less = (plan_in_parts(_with_memory(recipe, mib * MIB), figures, figures_of) for mib in (least, least - 1))
    assert enough.fits
    assert enough.figures.model.most is not None
    assert not less.fits


def test_blocks_that_fit_whole_are_cut_if_the_step_gets_much_shorter_and_stay_so(tmp_path: Path) -> None:
    recipe = _with_wide_blocks(tmp_path)
    train = recipe.train.model_copy(update={"global_batch_size": 1, "micro_batch_size": 1, "seq_len": 64})
    model = recipe.model.model_copy(update={"config": {**(recipe.model.config or {}), "num_hidden_layers": 6}})
    offload = recipe.offload.model_copy(update=dict.fromkeys(("params", "grads", "optimizer"), "auto"))
    recipe = recipe.model_copy(update={"train": train, "model": model, "offload": offload})
    found = find_figures(recipe, 1)
    figures = replace(found, machine=replace(found.machine, flops=1e11))
    assumed = replace(profile_here(figures, [tmp_path], None), drives=Drives(1 << 40, 1e9, 1e9, 1e9))
    profile = replace(assumed, measured=True, drives=replace(assumed.drives, measured=True))

    def figures_of(most: int) -> Figures:
        return replace(find_figures(recipe, 1, most=most), machine=figures.machine)

    least = best_plan(_with_memory(recipe, 1), figures).limits[0].needed
    tight, more = (_with_memory(recipe, least + spare * MIB) for spare in (0, 100))
    assert plan_in_parts(tight, figures, figures_of, profile).figures.model.most is None  # it would gain a fiftieth
    whole, cut = best_plan(more, figures, profile), plan_in_parts(more, figures, figures_of, profile)
    assert cut.figures.model.most is not None
    assert cut.step_s + cut.calm_step_s < 0.9 * (whole.step_s + whole.calm_step_s)
    assert plan_in_parts(more, figures, figures_of, assumed).figures.model.most is None
    assert plan_in_parts(more, figures, figures_of, profile, before=whole).figures.model.most is None
    again = plan_in_parts(tight, figures, figures_of, profile, before=cut)
    assert again.figures.model.most == cut.figures.model.most


def transposed(self: LlamaMLP, x: torch.Tensor) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * (x @ self.up_proj.weight.T))


def test_a_weight_that_cant_be_cut_stays_whole_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _with_wide_blocks(tmp_path)
    monkeypatch.setattr(LlamaMLP, "forward", transposed)
    figures = find_figures(recipe, 1)
    assert figures.model.whole == ()
    cut = replace(find_figures(recipe, 1, most=200_000), machine=figures.machine)
    assert cut.model.whole == ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    assert "model.layers.0.mlp.up_proj.weight, and 1 like it, can't be cut: the model passes it to" in " ".join(
        cut.model.notes
    )
    needed = best_plan(_with_memory(recipe, 1), cut).limits[0].needed
    tight = _with_memory(recipe, needed - 16 * MIB)
    refused = refusal(plan_in_parts(tight, figures, lambda _: cut), tight, lambda _: cut).message
    assert re.search(r"them; model\.layers\.\d\.mlp\.up_proj\.weight can't be cut, and takes 64\.1 MiB", refused)
    tiny = recipe_of(tmp_path, "llama")
    whole = run(tiny, best_plan(tiny, find_figures(tiny, 1)))
    parts = run(tiny, best_plan(tiny, find_figures(tiny, 1, most=2000)))
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "held"),
    [
        (
            {**(random_source("gpt_oss").config or {}), "num_local_experts": 12},
            ("layers.0.mlp.experts.gate_up_proj_bias", 1),
        ),
        (DBRX, ("blocks.0.ffn.experts.mlp.w1", 3)),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_matrices_that_are_held_whole_are_named(config: dict[str, Any], held: tuple[str, int], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    said = " ".join(find_figures(recipe, 1, most=1500).model.notes)
    name, others = held
    assert f"{name}, and {others} like it, can't be cut, and stay in memory for the whole step" in said
    assert not any("for the whole step" in note for note in find_figures(recipe, 1).model.notes)


def _with_wide_blocks(folder: Path) -> Recipe:
    """Blocks of 7.3M parameters: 28 MiB, and their gradient."""
    recipe = recipe_of(folder, "llama")
    config = {**(recipe.model.config or {}), "hidden_size": 512, "intermediate_size": 4096}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})


def _with_memory(recipe: Recipe, num_bytes: int) -> Recipe:
    return recipe.model_copy(update={"offload": recipe.offload.model_copy(update={"cpu_memory": num_bytes})})
