"""`zinf launch`: recipe → figures → plan → screen → ranks → summary."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from zinf_cli.console import RunView, plan_screen, summary_screen
from zinf_cli.errors import Interrupted, RankError, UsageError, ZinfError
from zinf_cli.hosts import Host
from zinf_cli.launch.failure import Failure
from zinf_cli.launch.run_folder import run_folder
from zinf_cli.launch.runner import Outcome, run_ranks
from zinf_cli.launch.summary import Watch, merge_traces, summarise
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.plan import Plan, make_plan
from zinf_cli.recipe import Recipe
from zinf_cli.recipe_file import dump_recipe, filled_in, load_recipe


class _ReportedError(ZinfError):
    """An error found in a subprocess, already described there."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    recipe: Path
    overrides: Sequence[str] = ()
    hosts: Sequence[Host] = ()
    """None: this machine."""
    slots: int | None = None
    dry_run: bool = False
    as_json: bool = False


def launch(request: Request, console: Console) -> None:
    """Plan and run; returns when the run is done, raises a ZinfError for everything else."""
    recipe = load_recipe(request.recipe, request.overrides)
    _refuse_what_is_missing(recipe)
    with console.status("reading the model, its checkpoint and the text ..."):
        figures = _describe(recipe, request)
    plan = make_plan(recipe, figures, request.hosts)
    console.print(plan_screen(plan, request.recipe.stem, filled_in(request.recipe, request.overrides)))
    if request.dry_run:
        if request.as_json:
            print(json.dumps(plan.to_json(), indent=2))
        return
    if request.hosts:
        raise UsageError("--hosts: this version plans many hosts but does not launch on them", hint="add --dry-run")
    with run_folder(recipe, plan) as run_dir:
        summary, outcome = _run(recipe, plan, run_dir, console)
    console.print(summary_screen(summary))
    console.print(f"the run is in {run_dir}", highlight=False, soft_wrap=True)
    if request.as_json:
        print(json.dumps(summary, indent=2))
    if outcome.interrupted:
        raise Interrupted(f"interrupted after {summary['steps']} steps")
    if outcome.failure is not None:
        raise _error_of(outcome.failure)


def _refuse_what_is_missing(recipe: Recipe) -> None:
    """Keys of the recipe that this version would ignore."""
    if recipe.checkpoint.interval is not None or recipe.checkpoint.resume not in ("auto", "never"):
        raise UsageError("checkpoint: this version writes and reads no checkpoints of a run", hint="remove interval")


def _describe(recipe: Recipe, request: Request) -> Figures:
    """Ask a subprocess for the figures; it imports torch and builds the model on the meta device."""
    with tempfile.TemporaryDirectory(prefix="zinf-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "zinf_cli.train.describe", str(path)]
        command += ["--slots", str(request.slots)] if request.slots else []
        if request.hosts:
            slots = [len(host.slots) for host in request.hosts]
            command += ["--slots", str(max(slots)), "--world-size", str(sum(slots))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        document = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RankError(f"the model could not be described: {last[0]}", hint=done.stderr.strip()) from error
    if "error" in document:
        raise _ReportedError(document["error"], document["exit_code"])
    return Figures.from_json(document)


def _run(recipe: Recipe, plan: Plan, run_dir: Path, console: Console) -> tuple[dict[str, Any], Outcome]:
    view = RunView(console, plan, recipe.logging.interval)
    watch = Watch(run_dir, view.show)
    view.start()
    try:
        outcome = run_ranks(
            "zinf_cli.train",
            [str(run_dir)],
            ranks=plan.world_size,
            run_dir=run_dir,
            threads_per_rank=plan.threads_per_rank,
            on_poll=watch.poll,
            notify=view.say,
        )
    finally:
        view.stop()
    watch.poll()
    for note in _notes(run_dir):
        view.say(note)
    if recipe.profiler.enabled:
        merge_traces(run_dir)
    status = "interrupted" if outcome.interrupted else "failed" if outcome.failure else "done"
    summary = summarise(plan, watch, status, outcome.failure)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return summary, outcome


def _notes(run_dir: Path) -> list[str]:
    """Lines rank 0 wants the user to see."""
    log = run_dir / "logs" / "rank-00000.log"
    if not log.exists():
        return []
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("note: ")]


def _error_of(failure: Failure) -> ZinfError:
    who = f"{failure.host}:rank {failure.rank}" if failure.rank is not None else failure.host
    return _ReportedError(f"{who}: {failure.message} (log: {failure.log})", failure.exit_code)
