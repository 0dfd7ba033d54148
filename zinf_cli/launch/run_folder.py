"""The folder of a run (output_dir): locked while the run lasts, what an earlier run left set aside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zinf_cli.checkpoint.folder import FOLDER as CHECKPOINTS
from zinf_cli.checkpoint.folder import checkpoints_of, point_latest, remove_remains, step_of
from zinf_cli.durable import write_durably
from zinf_cli.errors import PreflightError
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe import Recipe
from zinf_cli.recipe_file import dump_recipe

RUN_FILES = (
    "recipe.yaml", "plan.json", "metrics.jsonl", "summary.json", "trace.json", "logs", "tensorboard", CHECKPOINTS,
)  # fmt: skip


@contextmanager
def run_folder(recipe: Recipe, plan: Plan, *, here: bool) -> Iterator[Path]:
    """The run's folder, locked, with recipe.yaml and plan.json in it; files of an earlier run set aside.

    Where the ranks run `here`, the drives are tried as well.
    """
    run_dir = recipe.output_dir
    lock = None
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = os.open(run_dir, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if here:
                _check_nvme(plan)
            _set_aside(run_dir, plan.resume)
            write_durably(run_dir / "recipe.yaml", dump_recipe(recipe))
            write_durably(run_dir / "plan.json", json.dumps(plan.to_json(), indent=2))
        except BlockingIOError as error:
            raise PreflightError(
                "another run is using this folder", where=str(run_dir), hint="set another output_dir"
            ) from error
        except OSError as error:
            raise PreflightError(
                f"can't write the run's folder: {error.strerror}",
                where=str(run_dir),
                hint="set another output_dir",
            ) from error
        yield run_dir
    finally:
        if lock is not None:
            os.close(lock)
        for folder in plan.nvme_folders if here else ():
            with contextlib.suppress(OSError):
                Path(folder).rmdir()  # only where it is empty and so was made for this run


def _check_nvme(plan: Plan) -> None:
    for folder in map(Path, plan.nvme_folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise PreflightError(
                f"can't create a file: {error.strerror}",
                where=str(folder),
                hint="choose another offload.nvme_path",
            ) from error


def _set_aside(run_dir: Path, resume: str | None) -> None:
    """Move what an earlier run left into earlier/N, so that nothing is lost and nothing is mixed.

    A run that goes on from a checkpoint of its own keeps its files, but for checkpoints of later steps.
    """
    remove_remains(run_dir)
    there = [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]
    if resume is not None and Path(resume).resolve().parent == (run_dir / CHECKPOINTS).resolve():
        there = [path for path in checkpoints_of(run_dir) if step_of(path) > step_of(Path(resume))]
    if not there:
        return
    number = 1
    while (run_dir / "earlier" / str(number)).exists():
        number += 1
    target = run_dir / "earlier" / str(number)
    for path in there:
        (target / path.relative_to(run_dir)).parent.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.relative_to(run_dir))
    point_latest(run_dir)
