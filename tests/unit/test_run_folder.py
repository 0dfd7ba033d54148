"""The folder of a run: one launch has it, from before it decides anything; a user's own things in it stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tiny_models import CONFIGS
from zinf_cli.checkpoint.folder import find_checkpoint, step_folder
from zinf_cli.commands import launch as service
from zinf_cli.commands.launch import Ended, Request
from zinf_cli.errors import PreflightError
from zinf_cli.launch.runner import Outcome
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.run_folder.folder import _set_aside, locked


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").touch()
    content = {
        "model": {"config": {"model_type": "llama", **CONFIGS["llama"]}},
        "dataset": {"path": str(tmp_path / "text.txt")},
        "output_dir": str(tmp_path / "deep" / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def make_checkpoint(run_dir: Path, step: int) -> Path:
    """As far as names go."""
    folder = step_folder(run_dir, step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"xxh3": "damaged"}')
    return folder


def test_a_launch_has_the_folder_before_it_looks_at_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two launches in a row the second one would decide by what was there before the first one ended."""
    run_dir = load_recipe(recipe).output_dir
    looked: list[Path] = []

    def look(recipe: Recipe, *_: Any) -> None:
        looked.append(recipe.output_dir)
        with pytest.raises(PreflightError, match="another run is using this folder"), locked(run_dir):
            pass

    monkeypatch.setattr(service, "_plan_and_run", look)
    service.launch(Request(recipe), Console(quiet=True))
    assert looked == [run_dir]
    assert not run_dir.parent.exists()  # nothing was done
    with locked(run_dir), pytest.raises(PreflightError, match="another run is using this folder"):
        service.launch(Request(recipe), Console(quiet=True))
    assert looked == [run_dir]
    monkeypatch.setattr(service, "_plan_and_run", lambda recipe, *_: looked.append(recipe.output_dir))
    with locked(run_dir):
        service.launch(Request(recipe, dry_run=True), Console(quiet=True))


def test_a_folder_of_the_user_stays_when_nothing_was_done(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    with locked(tmp_path / "mine" / "a" / "b"):
        (tmp_path / "mine" / "a" / "NOTES.txt").touch()
    assert [path.name for path in (tmp_path / "mine" / "a").iterdir()] == ["NOTES.txt"]


@pytest.mark.parametrize("resume", ["never", "auto", "path"])
def test_a_restart_goes_on_from_what_the_run_has_written(resume: str, recipe: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "other", 100)
    asked = str(source) if resume == "path" else resume
    loaded = load_recipe(recipe, [f"checkpoint.resume={asked}", "launch.max_restarts=3"])
    began = 100 if resume == "path" else None
    ended = Ended(loaded.output_dir, {"resumed_from_step": began}, Outcome(1, None, interrupted=False))
    assert service._goes_on(loaded, ended).checkpoint.resume == loaded.checkpoint.resume  # none yet
    make_checkpoint(loaded.output_dir, 102)
    again = service._goes_on(loaded, ended)
    assert again.checkpoint.resume == "auto"
    assert again.checkpoint.model_copy(update={"resume": None}) == loaded.checkpoint.model_copy(update={"resume": None})
    assert again.launch == loaded.launch


def test_a_restart_before_the_first_checkpoint_begins_where_the_run_did(recipe: Path) -> None:
    run_dir = load_recipe(recipe).output_dir
    make_checkpoint(run_dir, 2)
    source = make_checkpoint(run_dir, 4)
    loaded = load_recipe(recipe, [f"checkpoint.resume={source}"])
    ended = Ended(run_dir, {"resumed_from_step": None}, Outcome(1, None, interrupted=False))
    assert service._goes_on(loaded, ended) == loaded


def test_what_is_set_aside_is_what_runs_have_written(tmp_path: Path) -> None:
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "latest").symlink_to("step-00000004")
    (folder / "damaged-step-00000003").mkdir()
    (folder / "best-model").mkdir()
    for name in ("NOTES.txt", "metrics.jsonl"):
        (tmp_path / name).touch()
    _set_aside(tmp_path, None)
    assert {path.name for path in folder.iterdir()} == {"best-model"}
    assert {path.name for path in tmp_path.iterdir()} == {"NOTES.txt", "checkpoints", "earlier"}
    moved = tmp_path / "earlier" / "1" / "checkpoints"
    assert {path.name for path in moved.iterdir()} == {
        "step-00000002", "step-00000004", "damaged-step-00000003", "latest",
    }  # fmt: skip
    assert (moved / "latest" / "manifest.json").exists()


def test_later_ones_make_room_for_a_run_from_an_earlier_one(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    (tmp_path / "metrics.jsonl").touch()
    _set_aside(tmp_path, str(step_folder(tmp_path, 4)))
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-00000002",
        "step-00000004",
    ]
    assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "earlier" / "1" / "checkpoints" / "step-00000006").is_dir()


@pytest.fixture
def other_drive() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"zinf-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_checkpoints_on_another_drive_are_set_aside_there(tmp_path: Path, other_drive: Path) -> None:
    """And a link in earlier/N leads to them."""
    (tmp_path / "checkpoints").symlink_to(other_drive)
    (tmp_path / "metrics.jsonl").touch()
    for number, steps in ((1, (2, 4)), (2, (6,))):
        for step in steps:
            make_checkpoint(tmp_path, step)
        (tmp_path / "checkpoints" / "latest").symlink_to(f"step-{steps[-1]:08d}")
        _set_aside(tmp_path, None)
        assert {path.name for path in other_drive.iterdir()} == {"earlier"}
        moved = tmp_path / "earlier" / str(number) / "checkpoints"
        assert moved.readlink() == other_drive / "earlier" / str(number)
        assert {path.name for path in moved.iterdir()} == {*(f"step-{step:08d}" for step in steps), "latest"}
        assert find_checkpoint(moved.parent).name == f"step-{steps[-1]:08d}"
    assert (tmp_path / "earlier" / "1" / "metrics.jsonl").exists()
    assert (tmp_path / "checkpoints").readlink() == other_drive
