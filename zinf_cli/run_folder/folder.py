"""Locks the folder of a run (output_dir) for a launch, and sets aside what an earlier run has left in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zinf_cli.checkpoint.folder import FOLDER as CHECKPOINTS
from zinf_cli.checkpoint.folder import (
    checkpoints_of,
    kept_back,
    made_by_runs,
    point_links,
    remove_remains,
    step_of,
    steps_done,
)
from zinf_cli.durable import write_durably
from zinf_cli.errors import PreflightError, ZinfError
from zinf_cli.machine.drive_files import open_nameless
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.run_folder.leftovers import marks_in
from zinf_cli.run_folder.made_folders import MadeFolders
from zinf_cli.run_folder.names import PLAN, RECIPE, RUN_FILES, set_aside


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this launch alone. A launch decides nothing by the folder's content before it holds it.

    PreflightError if another launch holds it, or it can't be made or written. A new folder that stays empty is removed
    at the end.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    lock = None
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = os.open(run_dir, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreflightError(
                "another run is using this folder", where=str(run_dir), hint="set another output_dir"
            ) from error
        except OSError as error:
            raise _cant_write(run_dir, error) from error
        os.close(open_nameless(run_dir, "output_dir").descriptor)
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # only where it is empty
        if lock is not None:
            os.close(lock)


@contextmanager
def run_folder(recipe: Recipe, plan: Plan, *, here: bool, say: Callable[[str], None]) -> Iterator[Path]:
    """The run's folder, which is locked, with recipe.yaml and plan.json in it. Files of an earlier run are set aside.

    If the ranks run `here`, the drives are tried as well.
    """
    run_dir = recipe.output_dir
    try:
        if here:
            _check_nvme(plan, run_dir)
        _remove_marks(run_dir)
        if left := remove_remains(run_dir):
            say(kept_back(left))
        _set_aside(run_dir, plan.resume)
        write_durably(run_dir / RECIPE, dump_recipe(recipe))
        write_durably(run_dir / PLAN, json.dumps(plan.to_json(), indent=2))
    except OSError as error:
        raise _cant_write(run_dir, error) from error
    yield run_dir


def plan_in(run_dir: Path) -> Plan | None:
    """The plan in a run's folder, if there is one that this zinf can read."""
    with contextlib.suppress(ZinfError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return Plan.load(run_dir / PLAN)
    return None


def _remove_marks(run_dir: Path) -> None:
    """Remove the marks of killed launches (runner.py). The folder is locked, so no other launch is at work."""
    for mark in marks_in(run_dir):
        mark.unlink(missing_ok=True)


def _cant_write(run_dir: Path, error: OSError) -> PreflightError:
    return PreflightError(
        f"can't write the run's folder: {error.strerror}", where=str(run_dir), hint="set another output_dir"
    )


def _check_nvme(plan: Plan, run_dir: Path) -> None:
    """Check that files can be made on the drives. Folders made for that are removed: the supervisor makes its own."""
    made = MadeFolders(run_dir)
    try:
        for folder in map(Path, plan.nvme_folders):
            try:
                made.make(folder)
            except OSError as error:
                raise PreflightError(
                    f"can't create a file: {error.strerror}",
                    where=str(folder),
                    hint="choose another offload.nvme_path",
                ) from error
            os.close(open_nameless(folder).descriptor)
    finally:
        made.remove()


def _set_aside(run_dir: Path, resume: str | None) -> None:
    """Move what an earlier run has left into earlier/N, so that nothing is lost or mixed.

    A run that goes on from a checkpoint of its own keeps its files, without checkpoints of later steps. All else in
    checkpoints/ is the user's, and stays.
    """
    if resume is not None and (run_dir / CHECKPOINTS).resolve() in Path(resume).resolve().parents:
        step = steps_done(Path(resume))
        there = [path for path in checkpoints_of(run_dir) if step_of(path) > step]
    else:
        there = [run_dir / name for name in RUN_FILES if (run_dir / name).exists()] + made_by_runs(run_dir)
    if not there:
        return
    set_aside(run_dir, there)
    point_links(run_dir)
    with contextlib.suppress(OSError):
        (run_dir / CHECKPOINTS).rmdir()  # only where it is empty
