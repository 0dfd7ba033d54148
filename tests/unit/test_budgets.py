"""With more memory, the step of a plan never takes longer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tiny_recipes import recipe_of
from zinf_cli.machine.hardware import Room
from zinf_cli.machine.profile_file import Beside, Best, Links, Measured, Nvme
from zinf_cli.machine.profiles import Profile
from zinf_cli.plan.filling import cacheable
from zinf_cli.plan.layout import DataFigures, Figures, LeastPart, MachineFigures, ModelFigures, UnitFigures
from zinf_cli.plan.memory import CLASSES, Choice
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.predict import least_seconds, profile_here
from zinf_cli.plan.search import best_plan
from zinf_cli.plan.traffic import nvme_traffic
from zinf_cli.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("own_folders")

MIB = 2**20
BLOCKS = 4
TOKENS = 32


def unit(name: str, numel: int, item_bytes: int, hidden: int, saved: int) -> UnitFigures:
    passed = TOKENS * hidden * item_bytes
    return UnitFigures(
        name, numel, 0, numel * item_bytes, 0, numel if item_bytes == 2 else 0, numel // 4, numel // 4, False, 1, 1,
        passed, passed, saved * item_bytes, passed, 0, LeastPart(name, hidden, False), 1.0, taken_bytes=passed,
    )  # fmt: skip


def figures_of(precision: str, ranks: int) -> Figures:
    """A llama of blocks of 4M parameters, with an embedding and a head of other sizes; fixed speeds."""
    item_bytes, hidden = 4 if precision == "fp32" else 2, 512
    blocks = [unit(f"layers.{n}", 4 * MIB, item_bytes, hidden, 40 * TOKENS * hidden * 8) for n in range(BLOCKS)]
    tables = [unit(name, 3 * MIB, item_bytes, hidden, TOKENS * hidden) for name in ("embed", "head")]
    units = (tables[0], *blocks, tables[1])
    order = tuple(range(len(units)))
    model = ModelFigures(
        "Llama", sum(u.numel for u in units), sum(u.numel for u in units), units, order, order, 0, TOKENS * 8192 * 4,
        TOKENS * hidden * 4, True, (), (), (), 6.0 * (4 * BLOCKS + 3) * MIB,
    )  # fmt: skip
    machine = MachineFigures(0, 0, 2, 4e10, 100 * MIB, 50 * MIB)
    return Figures(model, DataFigures(3), machine, ranks, ranks, precision)


def profile_of(figures: Figures, folder: Path) -> Profile:
    best = Best(bytes_per_s=3e9, block_size=4 * MIB, threads=4)
    beside = Beside(drives=0.9, compute=0.8)
    drive = Nvme(folders=(folder,), space=1 << 40, read=best, write=best, both=4e9, beside=beside)
    links = Links(
        accelerators=0, cpu_memory=1 << 34, matmul={"fp32": {16: 1e11}}, block={"fp32": {16: 4e10}}, adamw=6e8
    )
    return profile_here(figures, [folder], Measured(nvme=drive, links=links))


def planned(recipe: Recipe, figures: Figures, profile: Profile, budget: int) -> Plan:
    recipe = recipe.model_copy(update={"offload": recipe.offload.model_copy(update={"cpu_memory": budget})})
    return best_plan(recipe, figures, profile, (), Room(1 << 36, 1 << 40, "a machine", "a drive"))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_with_more_memory_a_step_takes_no_longer(
    ranks: int, precision: str, clip: float | None, tmp_path: Path
) -> None:
    """A hundredth is left to what the simulation itself gives or takes: which of two reads comes first."""
    figures = figures_of(precision, ranks)
    recipe = recipe_of(
        tmp_path, "llama", tier="auto", seq_len=TOKENS, micro_batch_size=1, global_batch_size=2, max_grad_norm=clip
    )
    profile = profile_of(figures, tmp_path)
    least = planned(recipe, figures, profile, MIB).limits[0].needed
    plans = [planned(recipe, figures, profile, least + 83 * MIB * number) for number in range(7)]
    fastest = plans[0]
    for plan in plans:
        assert plan.fits
        assert sum(least_seconds(plan, TOKENS, profile)) <= 1.01 * seconds(plan)
        assert seconds(plan) <= 1.01 * seconds(fastest)
        fastest = min(plan, fastest, key=seconds)
    assert seconds(plans[-1]) < 0.8 * seconds(plans[0])


def test_units_may_have_their_parameters_alone_in_memory(tmp_path: Path) -> None:
    """A byte with parameters spares a step three bytes of traffic, one with all state of a unit 2.25."""
    figures = figures_of("fp32", 1)
    recipe = recipe_of(tmp_path, "llama", tier="auto", seq_len=TOKENS, micro_batch_size=1, global_batch_size=2)
    profile = profile_of(figures, tmp_path)
    least = planned(recipe, figures, profile, MIB).limits[0].needed
    plan = planned(recipe, figures, profile, least + 200 * MIB)
    assert plan.cached_states == ("params",)
    held = [figures.model.units[number].trainable_bytes for number in plan.cached_units]
    assert sum(held) == next(line.num_bytes for line in plan.lines if line.what == "cached")
    turn = figures.model.units[-1].trainable_bytes * (len(figures.model.units) - 1 in plan.cached_units)
    streamed = nvme_traffic(figures, replace(plan.choice, cached=frozenset(), update="deferred"), 1, 2)
    assert plan.nvme_traffic_clipped == streamed.total - 3 * sum(held) + turn  # the turn brings its own once


def seconds(plan: Plan) -> float:
    return plan.step_s + plan.calm_step_s


def test_more_room_caches_more_units_and_leaves_none_out() -> None:
    figures = figures_of("fp32", 1)
    choice = Choice(dict.fromkeys(CLASSES, "nvme"), 1, "cpu", cacheable=frozenset(CLASSES[:3]))
    found = [set(cacheable(figures, choice, room * 8 * MIB)) for room in range(80)]
    assert all(few <= more for few, more in pairwise(found))
    assert found[0] == set()
    assert found[-1] == set(figures.model.order)
