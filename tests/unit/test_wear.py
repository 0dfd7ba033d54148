"""What a run writes to drives, in the plan and as measured, beside what the drives are rated for."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from in_process import run
from tiny_recipes import recipe_of
from zinf_cli.amounts import format_decimal, format_number
from zinf_cli.machine.profile_file import Best, Measured, Nvme, load_measured, save_measured
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.predict import profile_here
from zinf_cli.plan.search import best_plan
from zinf_cli.plan.wear import step_bytes, wear_line
from zinf_cli.recipe.recipe import Checkpoint
from zinf_cli.screens.plan import plan_screen
from zinf_cli.screens.run import summary_screen
from zinf_cli.train.figures import find_figures

pytestmark = pytest.mark.usefixtures("own_folders", "stated_speed")


def plan_of(folder: Path, tier: str = "nvme", interval: int | None = None, **train: Any) -> Plan:
    recipe = recipe_of(folder, "llama", tier, **train)
    return best_plan(recipe.model_copy(update={"checkpoint": Checkpoint(interval=interval)}), find_figures(recipe, 1))


@pytest.mark.parametrize("interval", [None, 3])
def test_what_is_written_is_what_the_plan_says(interval: int | None, tmp_path: Path) -> None:
    """Parameters are pinned to memory: a checkpoint writes them in addition."""
    recipe = recipe_of(tmp_path, "llama", max_steps=12)
    offload, checkpoint = recipe.offload.model_copy(update={"params": "cpu"}), Checkpoint(interval=interval)
    recipe = recipe.model_copy(update={"offload": offload, "checkpoint": checkpoint})
    plan = best_plan(recipe, find_figures(recipe, 1))
    written = sum(line["nvme_write_bytes"] for line in run(recipe, plan))
    assert written == pytest.approx(12 * step_bytes(plan), rel=0.08)
    assert (step_bytes(plan) > plan.nvme_written) == (interval is not None)


def test_the_line_of_a_plan(tmp_path: Path) -> None:
    plan = replace(plan_of(tmp_path), nvme_written=10**9, calm_step_s=8.64, max_steps=5000)
    assert wear_line(plan) == "5 TB are written to a host's drives in 5000 steps, 10 TB a day"
    rated = replace(plan, endurance_bytes=6e14)
    line = wear_line(rated)
    assert line is not None
    assert line.endswith("10 TB a day: 0.833 % of the 600 TB they are rated for, or 60 days")
    for told, rest, shows in ((rated, None, True), (rated, "rest", True), (plan, None, True), (plan, "rest", False)):
        screen = StringIO()
        Console(width=500, file=screen).print(plan_screen(told, "tiny", rest=rest))
        assert "zinf · tiny" in screen.getvalue()
        assert (str(wear_line(told)) in screen.getvalue()) == shows
    assert wear_line(plan_of(tmp_path, "cpu")) is None
    assert list(map(format_decimal, (999, 12.9e6, 4.06e11, 5e15))) == ["0.999 kB", "12.9 MB", "406 GB", "5000 TB"]
    assert list(map(format_number, (1 / 81, 60.0, 1234.5, 18_449))) == ["0.0123", "60", "1230", "18400"]


@pytest.mark.parametrize(
    ("endurance", "shown"), [(600e12, "2.5 TB, 0.417 % of their life"), (None, "2.5 TB"), (1.0, "")]
)
def test_the_line_of_a_summary(endurance: float | None, shown: str) -> None:
    ends = {"status": "done", "moments": "fp32", "steps": 1, "max_steps": 1, "skipped_steps": 0}
    ends |= {"sources": {}, "held_out": {}, "best_eval": None}
    losses = dict.fromkeys(("first_loss", "last_loss", "first_eval_loss", "last_eval_loss"))
    written = {"drives_written": 2.5e12 if shown else 0}
    screen = StringIO()
    summary = {**ends, **losses, "endurance_bytes": endurance, "measured": written, "predicted": written}
    Console(width=200, file=screen).print(summary_screen(summary))
    assert ("written to a host's drives" in screen.getvalue()) == bool(shown)
    assert screen.getvalue().count(shown) >= (2 if shown else 0)


def test_the_user_gives_the_endurance(tmp_path: Path) -> None:
    """A bench that is run later leaves it; drives count as assumed without one."""
    path = tmp_path / "hardware.yaml"
    path.write_text("endurance_tbw: 1200\n")
    figures = find_figures(recipe_of(tmp_path, "llama"), 1)
    assert profile_here(figures, [tmp_path], load_measured(path)).drives.endurance_bytes == 1200e12
    best = Best(bytes_per_s=2.5e9, block_size=4 << 20, threads=4)
    found = Nvme(folders=(tmp_path,), space=1 << 40, read=best, write=best, both=2.7e9)
    save_measured(path, "nvme", found, "box")
    assert load_measured(path).endurance_tbw == 1200
    drives = profile_here(figures, [tmp_path], load_measured(path)).drives
    assert (drives.measured, drives.endurance_bytes) == (True, 1200e12)
    assert Measured(nvme=found).endurance_bytes is None
