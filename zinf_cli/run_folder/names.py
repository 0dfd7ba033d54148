"""The names of files in a run's folder. Standard library only, as supervisor.py, which brings this file along."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

RECIPE, PLAN, METRICS, SUMMARY, TRACE = "recipe.yaml", "plan.json", "metrics.jsonl", "summary.json", "trace.json"
REPORT = "report.html"
LOGS, TENSORBOARD, WANDB = "logs", "tensorboard", "wandb"
RUN_FILES = (RECIPE, PLAN, METRICS, SUMMARY, TRACE, REPORT, LOGS, TENSORBOARD, WANDB)
"""All that a run leaves, without its checkpoints."""
START, LOADING = f"{LOGS}/start.json", f"{LOGS}/loading"
EARLIER = "earlier"
"""A folder with a numbered folder for each earlier run."""


def rank_log(rank: int) -> str:
    """The log of a rank: both of its output streams."""
    return f"{LOGS}/rank-{rank:05d}.log"


def error_file(rank: int) -> str:
    """The record of why a rank failed (error_records.py)."""
    return f"{LOGS}/error-{rank:05d}.json"


def rank_trace(rank: int) -> str:
    """The spans of a rank, until the launcher merges them into TRACE."""
    return f"{LOGS}/trace-{rank:05d}.json"


def tracker_id(name: str) -> str:
    """The id under which the tracker `name` knows the run (trackers.py)."""
    return f"{LOGS}/{name}.id"


def files_of_ranks(run_dir: Path, kind: str) -> list[Path]:
    """The files of a kind ("error" or "trace") that exist, in the order of ranks."""
    return sorted((run_dir / LOGS).glob(f"{kind}-{'[0-9]' * 5}.json"))


def set_aside(run_dir: Path, there: Sequence[Path]) -> None:
    """Move the paths `there` from the run's folder into earlier/N, so that nothing is lost or mixed."""
    if not there:
        return
    number = 1
    while any((folder / EARLIER / str(number)).exists() for folder in {run_dir, *(path.parent for path in there)}):
        number += 1
    for path in there:
        target = run_dir / EARLIER / str(number) / path.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _lead_to_its_drive(target.parent, path.parent)
            path.rename(target)


def _lead_to_its_drive(folder: Path, source: Path) -> None:
    """Make `folder`, in earlier/N, a link to source/earlier/N: checkpoints/ may lie on another drive."""
    home = source.resolve() / EARLIER / folder.parent.name
    home.mkdir(parents=True)
    folder.rmdir()
    folder.symlink_to(home)
