"""What the plan says of checkpoints: the room they take, what they move, and how long such a step takes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from in_process import Closed, run
from tiny_recipes import CLASSES, recipe_of
from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.errors import CapacityError
from zinf_cli.machine.hardware import Room
from zinf_cli.plan.checkpoints import CheckpointDrive, checkpoint_bytes
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.predict import profile_here
from zinf_cli.plan.refusal import does_not_fit
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Checkpoint
from zinf_cli.screens.plan import plan_screen
from zinf_cli.train.figures import find_figures

pytestmark = pytest.mark.usefixtures("own_folders", "stated_speed")


@pytest.mark.parametrize(("kept", "count"), [(None, 50), (2, 3), (80, 50)])
def test_checkpoints_take_the_space_the_plan_says(kept: int | None, count: int, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", max_steps=99).model_copy(
        update={"checkpoint": Checkpoint(interval=2, keep_latest_k=kept)}
    )
    figures = find_figures(recipe, 2)
    (limit,) = (limit for limit in best_plan(recipe, figures).limits if limit.tier == "checkpoints")
    assert limit.needed == count * checkpoint_bytes(figures)
    many = recipe.model_copy(update={"checkpoint": Checkpoint(interval=1)})
    endless = replace(figures, data=replace(figures.data, max_steps=10**9))
    with pytest.raises(CapacityError, match=r"checkpoints need .*TiB, this machine allows .*keep_latest_k"):
        raise does_not_fit(best_plan(many, endless))


def test_where_only_checkpoints_lack_room_state_stays_in_memory(tmp_path: Path) -> None:
    """The most frugal plan was refused, which needs the full drive for state as well."""
    recipe = recipe_of(tmp_path, "llama", "auto").model_copy(update={"checkpoint": Checkpoint(interval=1)})
    figures = find_figures(recipe, 1)
    endless = replace(figures, data=replace(figures.data, max_steps=10**9))
    plan = best_plan(recipe, endless, room=Room(1 << 34, 0))
    assert [limit.tier for limit in plan.short] == ["checkpoints"]
    assert set(plan.placement.values()) == {"cpu"}


def test_a_drive_that_is_full_allows_nothing() -> None:
    """It allowed less than nothing."""
    drive = CheckpointDrive("runs/run/checkpoints", free_bytes=5, shared=1.0, to_come=1)
    assert (drive.left(2), drive.left(9)) == (3, 0)


def test_a_checkpoint_is_as_large_as_the_plan_says(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama").model_copy(update={"checkpoint": Checkpoint(interval=3)})
    figures = find_figures(recipe, 1)
    run(recipe, best_plan(recipe, figures))
    manifest = Manifest.load(recipe.output_dir / "checkpoints" / "latest")
    assert manifest.layout.num_bytes - len(manifest.layout.header) == checkpoint_bytes(figures)


@pytest.fixture
def other_drive() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"zinf-test-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("tiers", "precision", "share"),
    [
        ({}, "fp32", 0),  # updates write into the checkpoint
        ({"params": "cpu"}, "bf16", 1 / 6),  # parameters are a half of their masters
        ({"params": "cpu"}, "fp16", 0),  # masters are a part of the optimizer's states
        ({"params": "cpu"}, "fp32", 1 / 3),
        (dict.fromkeys(CLASSES, "cpu"), "fp32", 1),
    ],
)
def test_a_checkpoint_moves_what_the_plan_says(
    tiers: dict[str, str], precision: str, share: float, tmp_path: Path, closed: list[Closed]
) -> None:
    assert_checkpoint_moves(tmp_path, closed, tiers, precision, share)


def test_a_checkpoint_on_another_drive_is_a_second_copy(
    tmp_path: Path, other_drive: Path, closed: list[Closed]
) -> None:
    plan = assert_checkpoint_moves(tmp_path, closed, {"nvme_path": str(other_drive)}, "fp32", 1)
    assert plan.checkpoint is not None
    assert not plan.checkpoint.drive_shared


def assert_checkpoint_moves(
    folder: Path, closed: list[Closed], tiers: dict[str, str], precision: str, share: float
) -> Plan:
    """A step with a checkpoint writes `share` of it beside what a step writes."""
    recipe = recipe_of(folder, "llama", precision=precision, max_steps=4)
    offload = recipe.offload.model_validate({**recipe.offload.model_dump(exclude_none=True), **tiers})
    recipe = recipe.model_copy(update={"offload": offload})
    figures = find_figures(recipe, 1)
    plain = best_plan(recipe, figures)
    assert plain.checkpoint is None
    losses = [line["loss"] for line in run(recipe, plain)]
    written = sum(tier.written for tier in closed)
    closed.clear()
    recipe = recipe.model_copy(update={"checkpoint": Checkpoint(interval=2)})
    plan = best_plan(recipe, figures)
    assert plan.checkpoint is not None
    assert plan.checkpoint.num_bytes == checkpoint_bytes(figures)
    assert plan.checkpoint.traffic == round(share * plan.checkpoint.num_bytes)
    assert Plan.load(written_to(folder / "plan.json", plan)) == plan
    screen = StringIO()
    Console(width=500, file=screen).print(plan_screen(plan, "tiny", []))
    assert f"every 2 steps {format_bytes(plan.checkpoint.num_bytes)} to {recipe.output_dir}" in screen.getvalue()
    assert [line["loss"] for line in run(recipe, plan)] == losses
    assert sum(tier.written for tier in closed) - written == 2 * plan.checkpoint.traffic
    return plan


def written_to(path: Path, plan: Plan) -> Path:
    path.write_text(json.dumps(plan.to_json()))
    return path


def test_a_slow_drive_of_checkpoints_holds_up_their_steps(tmp_path: Path) -> None:
    """Beside the tier's traffic where it is the same drive, and beside nothing else where it is another."""
    recipe = recipe_of(tmp_path, "llama", tier="cpu").model_copy(update={"checkpoint": Checkpoint(interval=2)})
    figures = find_figures(recipe, 1)
    profile = profile_here(figures, [tmp_path], None)
    slow = replace(profile, drives=replace(profile.drives, read=1e6, write=1e6, both=1e6))
    for name, tier in (("cpu", recipe), ("nvme", recipe_of(tmp_path, "llama"))):
        plan = best_plan(tier.model_copy(update={"checkpoint": recipe.checkpoint}), figures, slow)
        assert plan.checkpoint is not None
        if name == "cpu":
            assert plan.checkpoint.step_s == pytest.approx(plan.checkpoint.num_bytes / 1e6)
            assert plan.checkpoint.step_s > plan.step_s
        else:
            assert plan.checkpoint.step_s == plan.step_s
