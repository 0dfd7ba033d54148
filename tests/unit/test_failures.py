"""What a plan says of hosts that fail: how often, what that costs, and how often a checkpoint loses least."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tiny_recipes import recipe_of
from zinf_cli.machine.profile_file import load_measured
from zinf_cli.machine.profiles import BUILT_IN
from zinf_cli.plan.estimate import estimate
from zinf_cli.plan.failures import best_interval, expected_failures, failures_line, lost_share
from zinf_cli.plan.needs import Scenario
from zinf_cli.plan.plan import CheckpointStep, Plan
from zinf_cli.plan.predict import profile_here
from zinf_cli.plan.search import best_plan
from zinf_cli.plan.sizes import shape_of
from zinf_cli.recipe.hosts import Host
from zinf_cli.screens.estimate import estimate_screen
from zinf_cli.screens.plan import plan_screen
from zinf_cli.train.figures import find_figures

pytestmark = pytest.mark.usefixtures("own_folders", "stated_speed")
HOURS = 3600.0


@given(
    cost_s=st.floats(0.0, 1000.0), between_s=st.floats(3600.0, 1e8), step_s=st.floats(0.1, 100.0), other=st.integers(1)
)
def test_no_interval_loses_less_than_the_best(cost_s: float, between_s: float, step_s: float, other: int) -> None:
    best = best_interval(cost_s, between_s, step_s)
    # steps are whole: beside the best number that is none, one of its two neighbours is
    least = min(lost_share(steps, cost_s, between_s, step_s) for steps in (max(1, best - 1), best, best + 1))
    assert least <= lost_share(other, cost_s, between_s, step_s) * (1 + 1e-9)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    recipe = recipe_of(tmp_path, "llama", "cpu")
    found = replace(best_plan(recipe, find_figures(recipe, 1)), calm_step_s=10.0, step_s=12.0)
    hosts = tuple(Host(f"node{number}", (0,)) for number in range(100))
    written = CheckpointStep(interval=100, folder="/runs", num_bytes=10**9, traffic=10**9, drive_shared=False)
    return replace(found, hosts=hosts, host_mtbf_s=5000 * HOURS, checkpoint=replace(written, step_s=62.0))


def test_the_interval_that_loses_least_is_told(plan: Plan) -> None:
    """sqrt(2 × 50 s × 180000 s) is 4243 s, of which 50 s and half of 4243 s in 180000 s make 2.4 %."""
    line = failures_line(plan)
    assert line == (
        "one host in 100 is expected to fail every 50 h 00 min; with a checkpoint every 100 steps that loses "
        "5.3 % of the time; every 424 steps loses least, 2.4 % of the time"
    )
    assert plan.checkpoint is not None
    chosen = failures_line(replace(plan, checkpoint=replace(plan.checkpoint, interval=424)))
    assert chosen is not None
    assert chosen.endswith("with a checkpoint every 424 steps that loses 2.4 % of the time")
    screen = StringIO()
    Console(width=500, file=screen).print(plan_screen(plan, "tiny", []))
    assert line in screen.getvalue()


def test_checkpoints_in_passing_are_best_at_every_step(plan: Plan) -> None:
    assert plan.checkpoint is not None
    line = failures_line(replace(plan, checkpoint=replace(plan.checkpoint, step_s=plan.step_s)))
    assert line is not None
    assert line.endswith("every 100 steps that loses 0.28 % of the time; every step loses least, 0.0028 % of the time")


def test_without_checkpoints_or_without_a_figure(plan: Plan) -> None:
    line = failures_line(replace(plan, checkpoint=None))
    assert line is not None
    assert line.endswith("every 50 h 00 min, and there are no checkpoints to go on from")
    assert failures_line(replace(plan, host_mtbf_s=None)) is None


@pytest.mark.parametrize(
    ("rate", "told"),
    [(100e9, "a checkpoint every step loses least, "), (0.2e9, "a checkpoint every 7139 steps loses ")],
)
def test_an_estimate_says_so_too(rate: float, told: str) -> None:
    """70B parameters, of which a host writes 210 GB: within a step of 14 s, or in 1050 s."""
    hardware = replace(BUILT_IN["dgx-h100"], host_mtbf_s=5000 * HOURS)
    hardware = replace(hardware, drives=replace(hardware.drives, both=rate))
    scenario = Scenario(shape_of(70e9, 0, 4096), hardware, hosts=4, ranks=8, pinned={"optimizer": "cpu"})
    answer = estimate(scenario)
    line = expected_failures(answer)
    assert line is not None
    assert line.startswith(f"one host in 4 is expected to fail every 1250 h 00 min; {told}")
    screen = StringIO()
    Console(width=500, file=screen).print(estimate_screen(answer))
    assert line in screen.getvalue()


def test_the_user_gives_the_mean_time(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    path.write_text("host_mtbf_hours: 5000\n")
    recipe = recipe_of(tmp_path, "llama", "cpu")
    figures = find_figures(recipe, 1)
    profile = profile_here(figures, [tmp_path], load_measured(path))
    assert profile.host_mtbf_s == 5000 * HOURS
    found = best_plan(recipe, figures, profile)
    assert found.host_mtbf_s == found.to_json()["host_mtbf_s"] == 5000 * HOURS
