"""The plan of a model in parts: when it cuts, how far, and that the bytes and the least buffers hold there as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from in_process import run
from tiny_models import CONFIGS
from tiny_recipes import recipe_of
from zinf_cli.errors import CapacityError
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.parts import LEAST, largest_that_fits, plan_in_parts
from zinf_cli.plan.search import best_plan, does_not_fit, make_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train import figures as finding
from zinf_cli.train.figures import find_figures

MIB = 2**20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(autouse=True)
def stated_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "_flops", lambda *_: 1e13)


@pytest.mark.parametrize("most", [4000, 1000])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_the_least_buffers_are_enough(name: str, most: int, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, name)
    whole = run(recipe, make_plan(recipe, find_figures(recipe, 1)))
    plan = make_plan(recipe, find_figures(recipe, 1, most=most))
    tight = run(recipe, replace(plan, working=plan.working.shrunk(1 << 60)))
    for one, other in zip(whole, tight, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert max(line["nvme_bytes"] for line in tight) <= plan.nvme_bytes


def test_a_model_is_cut_only_where_it_must_and_no_further(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 4096}  # blocks of 7.3M parameters: 28 MiB, and their gradient
    recipe = recipe_of(tmp_path, "llama")
    config = {**(recipe.model.config or {}), **wide}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = find_figures(recipe, 1)
    asked: list[int] = []

    def figures_of(most: int) -> Figures:
        asked.append(most)
        return replace(find_figures(recipe, 1, most=most), machine=figures.machine)

    needed = best_plan(recipe, figures).limits[0].needed
    frugal = min(best_plan(_with_memory(recipe, 1), figures).limits[0].needed, needed)
    for more, parts in ((MIB, 0), (-40 * MIB, 1), (-110 * MIB, 1)):
        tight = _with_memory(recipe, frugal + more)
        asked.clear()
        plan = plan_in_parts(tight, figures, figures_of)
        assert plan.fits
        assert len(asked) == parts
        assert plan.figures.model.most == (asked[-1] if asked else None)
    hopeless = _with_memory(recipe, figures.machine.process_bytes)
    assert largest_that_fits(hopeless, figures) is None
    with pytest.raises(CapacityError, match="does not fit"):
        raise does_not_fit(plan_in_parts(hopeless, figures, figures_of))
    assert asked[-1] >= LEAST


def _with_memory(recipe: Recipe, num_bytes: int) -> Recipe:
    return recipe.model_copy(update={"offload": recipe.offload.model_copy(update={"cpu_memory": num_bytes})})
