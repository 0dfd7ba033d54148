"""`zinf launch`: recipe → figures → plan → screen → ranks → summary."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from zinf_cli.console import RunView, plan_screen, summary_screen
from zinf_cli.errors import Interrupted, PreflightError, RankError, UsageError, ZinfError
from zinf_cli.launch.failure import Failure
from zinf_cli.launch.runner import Outcome, run_ranks
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.plan import Plan, make_plan, nvme_folders
from zinf_cli.plan.predict import profile_here
from zinf_cli.profile_file import find_measured
from zinf_cli.recipe import Recipe
from zinf_cli.recipe_file import dump_recipe, filled_in, load_recipe

RUN_FILES = ("recipe.yaml", "plan.json", "metrics.jsonl", "summary.json", "trace.json", "logs", "tensorboard")


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
    slots: int | None = None
    dry_run: bool = False
    as_json: bool = False


def launch(request: Request, console: Console) -> None:
    """Plan and run; returns when the run is done, raises a ZinfError for everything else."""
    recipe = load_recipe(request.recipe, request.overrides)
    _refuse_what_is_missing(recipe)
    with console.status("reading the model, its checkpoint and the text ..."):
        figures = _describe(recipe, request.slots)
    measured = find_measured(None, request.recipe)
    plan = make_plan(recipe, figures, profile_here(figures, nvme_folders(recipe), measured))
    console.print(plan_screen(plan, request.recipe.stem, filled_in(request.recipe, request.overrides)))
    if request.dry_run:
        if request.as_json:
            print(json.dumps(plan.to_json(), indent=2))
        return
    with _run_folder(recipe, plan) as run_dir:
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


def _describe(recipe: Recipe, slots: int | None) -> Figures:
    """Ask a subprocess for the figures; it imports torch and builds the model on the meta device."""
    with tempfile.TemporaryDirectory(prefix="zinf-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "zinf_cli.train.describe", str(path)]
        command += ["--slots", str(slots)] if slots else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        document = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RankError(f"the model could not be described: {last[0]}", hint=done.stderr.strip()) from error
    if "error" in document:
        raise _ReportedError(document["error"], document["exit_code"])
    return Figures.from_json(document)


@contextmanager
def _run_folder(recipe: Recipe, plan: Plan) -> Iterator[Path]:
    """The run's folder, locked, with recipe.yaml and plan.json in it; files of an earlier run set aside."""
    run_dir = recipe.output_dir
    lock = None
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = os.open(run_dir, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_nvme(plan)
            _set_aside(run_dir)
            (run_dir / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
            (run_dir / "plan.json").write_text(json.dumps(plan.to_json(), indent=2), encoding="utf-8")
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
        for folder in plan.nvme_folders:
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


def _set_aside(run_dir: Path) -> None:
    """Move what an earlier run left into earlier/N, so that nothing is lost and nothing is mixed."""
    there = [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]
    if not there:
        return
    number = 1
    while (run_dir / "earlier" / str(number)).exists():
        number += 1
    target = run_dir / "earlier" / str(number)
    target.mkdir(parents=True)
    for path in there:
        path.rename(target / path.name)


def _run(recipe: Recipe, plan: Plan, run_dir: Path, console: Console) -> tuple[dict[str, Any], Outcome]:
    view = RunView(console, plan, recipe.logging.interval)
    watch = _Watch(run_dir, view.show)
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
        _merge_traces(run_dir)
    status = "interrupted" if outcome.interrupted else "failed" if outcome.failure else "done"
    summary = summarise(plan, watch, status, outcome.failure)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return summary, outcome


@dataclass
class _Watch:
    """Follows metrics.jsonl and the memory of the run's processes."""

    run_dir: Path
    show: Callable[[dict[str, Any]], None]
    lines: list[dict[str, Any]] = field(default_factory=list)
    host_peak: int = 0
    _offset: int = 0
    _sampled: float = 0.0

    def poll(self) -> None:
        path = self.run_dir / "metrics.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self.lines.append(json.loads(line))
                    self.show(self.lines[-1])
        if time.monotonic() - self._sampled > 1.0:
            self._sampled = time.monotonic()
            self.host_peak = max(self.host_peak, _tree_memory())


def _tree_memory() -> int:
    """Proportional set size of this process and all its descendants, in bytes."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):
            total += process.memory_full_info().pss
    return total


def summarise(plan: Plan, watch: _Watch, status: str, failure: Failure | None) -> dict[str, Any]:
    """summary.json: how it ended, totals, medians, and the plan beside what was measured."""
    steps = [line for line in watch.lines if "loss" in line]
    evals = [line["eval_loss"] for line in watch.lines if "eval_loss" in line]

    def median(key: str) -> float | None:
        return statistics.median(line[key] for line in steps) if steps else None

    waits = [line["wait_s"] / line["step_s"] for line in steps]
    traffic = [line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in steps]
    wait_share = statistics.median(waits) if waits else None
    return {
        "status": status,
        "error": failure.message if failure is not None else None,
        "steps": len(steps),
        "max_steps": plan.max_steps,
        "tokens": sum(line["tokens"] for line in steps),
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "first_eval_loss": evals[0] if evals else None,
        "last_eval_loss": evals[-1] if evals else None,
        "bottleneck": None if wait_share is None else "nvme" if wait_share > 0.5 else "compute",
        "measured": {
            "step_s": median("step_s"),
            "tokens_per_s": median("tokens_per_s"),
            "tflops_per_rank": median("tflops_per_rank"),
            "wait_share": wait_share,
            "host_cpu_bytes": watch.host_peak,
            "cpu_bytes": max((line["cpu_bytes"] for line in steps), default=None),
            "device_bytes": max((line["device_bytes"] for line in steps), default=None),
            "nvme_bytes": max((line["nvme_bytes"] for line in steps), default=None),
            "nvme_traffic": statistics.median(traffic) if traffic else None,
        },
        "predicted": {
            "step_s": plan.step_s,
            "wait_share": 1 - plan.busy["compute"],
            "bottleneck": plan.bottleneck,
            "device_bytes": next((limit.needed for limit in plan.limits if limit.tier == "device"), None),
            "host_cpu_bytes": next(limit.needed for limit in plan.limits if limit.tier == "cpu"),
            "cpu_bytes": plan.cpu_bytes_per_rank,
            "nvme_bytes": plan.nvme_bytes,
            "nvme_traffic": plan.nvme_traffic,
        },
    }


def _notes(run_dir: Path) -> list[str]:
    """Lines rank 0 wants the user to see."""
    log = run_dir / "logs" / "rank-00000.log"
    if not log.exists():
        return []
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("note: ")]


def _merge_traces(run_dir: Path) -> None:
    """trace.json: the spans of every rank in one document."""
    events = []
    for path in sorted((run_dir / "logs").glob("trace-*.json")):
        events += json.loads(path.read_text())["traceEvents"]
        path.unlink()
    (run_dir / "trace.json").write_text(json.dumps({"traceEvents": events}))


def _error_of(failure: Failure) -> ZinfError:
    who = f"{failure.host}:rank {failure.rank}" if failure.rank is not None else failure.host
    return _ReportedError(f"{who}: {failure.message} (log: {failure.log})", failure.exit_code)
