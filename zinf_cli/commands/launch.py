"""`zinf launch`: recipe → figures → plan → screen → ranks → summary."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint.folder import checkpoints_of, checkpoints_to_resume, find_checkpoint, step_of, steps_done
from zinf_cli.commands.report import leave_report
from zinf_cli.durable import write_durably
from zinf_cli.errors import Interrupted
from zinf_cli.launch.connection import Lifelines, transport_to
from zinf_cli.launch.logs import RankLogs
from zinf_cli.launch.preflight import Preflight, check_hosts, drives_of
from zinf_cli.launch.program import Agent, Program
from zinf_cli.launch.question import FiguresOf, figures_from, question
from zinf_cli.launch.runner import Outcome, World, run_ranks
from zinf_cli.launch.summary import merge_traces, summarise
from zinf_cli.machine.hardware import Room, room_here, room_of, share_in_memory
from zinf_cli.machine.profile_file import find_measured
from zinf_cli.model_state import MAPPED
from zinf_cli.plan.parts import plan_in_parts
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.predict import profile_here
from zinf_cli.plan.refusal import refusal
from zinf_cli.plan.search import nvme_folders
from zinf_cli.recipe.hosts import Host, this_machine
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import filled_in, load_recipe
from zinf_cli.run_folder import start
from zinf_cli.run_folder.folder import locked, plan_in, run_folder
from zinf_cli.run_folder.metrics import Watch
from zinf_cli.run_folder.names import PLAN, RECIPE, SUMMARY
from zinf_cli.screens.launch import failure_screen, log_line, preflight_screen
from zinf_cli.screens.plan import plan_screen
from zinf_cli.screens.progress import progress
from zinf_cli.screens.run import RunView, summary_screen
from zinf_cli.tracking.chosen import check_trackers, tracking_of


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    recipe: Path
    overrides: Sequence[str] = ()
    hosts: Sequence[Host] = ()
    """None: this machine."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the ranks."""
    sync: Sequence[Path] = ()
    """Files and folders to bring to the hosts first."""
    slots: int | None = None
    dry_run: bool = False
    explain: bool = False
    """Show the plan with its tables and defaults before a run as well."""
    as_json: bool = False


@dataclass(frozen=True)
class Ended:
    """A run that was started and is over."""

    run_dir: Path
    summary: dict[str, Any]
    outcome: Outcome


def launch(request: Request, console: Console) -> None:
    """Plan and run; returns when the run is done, raises a ZinfError for everything else."""
    recipe = load_recipe(request.recipe, request.overrides)
    check_trackers(recipe.logging)
    with nullcontext() if request.dry_run else locked(recipe.output_dir):
        ended = _plan_and_run(recipe, request, console)
        for restart in range(1, recipe.launch.max_restarts + 1):
            if ended is None or not _may_restart(ended.outcome):
                break
            assert ended.outcome.failure is not None
            why = ended.outcome.failure.reported(log=True).line()
            console.print(f"{why}\nrestart {restart} of {recipe.launch.max_restarts}", highlight=False, soft_wrap=True)
            recipe = _goes_on(recipe, ended)
            ended = _plan_and_run(recipe, request, console, recipe.launch.min_hosts)
        if ended is not None:
            _show_end(ended, request, console, draws=recipe.logging.report)


def _goes_on(recipe: Recipe, ended: Ended) -> Recipe:
    """The recipe of a restart: from the run's own newest checkpoint, also where it was told not to begin from one."""
    began, resume = ended.summary["resumed_from_step"] or 0, recipe.checkpoint.resume
    if isinstance(resume, Path):
        began = max(began, steps_done(find_checkpoint(resume)))
    if not any(step_of(folder) > began for folder in checkpoints_of(ended.run_dir)):
        return recipe
    checkpoint = recipe.checkpoint.model_copy(update={"resume": "auto"})
    return recipe.model_copy(update={"checkpoint": checkpoint})


def _may_restart(outcome: Outcome) -> bool:
    """Whether a rank or host was lost; what a recipe, a full machine or a NaN causes would come again."""
    return outcome.failure is not None and not outcome.interrupted and outcome.failure.error.may_restart


def _plan_and_run(recipe: Recipe, request: Request, console: Console, min_hosts: int | None = None) -> Ended | None:
    """One life of a run; None where nothing is to be done (a dry run). With `min_hosts`, some hosts may be missing."""
    resumed = checkpoints_to_resume(recipe.output_dir, recipe.checkpoint.resume)
    far = bool(request.hosts) and not request.dry_run
    with Lifelines(transport_to(request.hosts if far else ())) as lifelines:
        if far:
            ready = _hosts_ready(recipe, request, lifelines, console, min_hosts)
        else:
            ready = _this_machine_ready(recipe, request, lifelines)
        with progress(console, "reading the model and the text") as tell:
            figures = ready.figures_of(None, lambda share: tell(share, "tokenising the text"))
        profile = profile_here(figures, nvme_folders(recipe), find_measured(request.recipe))
        before = plan_in(recipe.output_dir) if resumed else None
        plan = plan_in_parts(recipe, figures, ready.figures_of, profile, ready.hosts, ready.room, before)
        if not plan.fits:
            raise refusal(plan, recipe, ready.figures_of, ready.hosts, ready.room)
        if resumed:
            plan = replace(plan, resume=str(resumed[0]))
        rest = f"bytes by tier, and every default: --explain, or {PLAN} and {RECIPE} in {recipe.output_dir}"
        whole = request.dry_run or request.explain
        defaults = filled_in(request.recipe, request.overrides) if whole else ()
        console.print(plan_screen(plan, request.recipe.stem, defaults, rest=None if whole else rest))
        if request.dry_run:
            if request.as_json:
                print(json.dumps(plan.to_json(), indent=2))
            return None
        if resumed and steps_done(resumed[0]) >= plan.max_steps:
            hint = "raise train.max_steps to go on, or set checkpoint.resume=never to begin anew"
            console.print(f"nothing to do: the run has done its {plan.max_steps} steps ({hint})", soft_wrap=True)
            return None
        for connection, host in zip(ready.world.connections, plan.hosts, strict=True):
            connection.host = host
        with run_folder(recipe, plan, here=not request.hosts, say=partial(console.print, soft_wrap=True)) as run_dir:
            summary, outcome = _run(recipe, plan, run_dir, ready.world, request, console)
        return Ended(run_dir, summary, outcome)


@dataclass(frozen=True)
class _Ready:
    """Where a run can start: agents stand by there already, but for a dry run."""

    world: World
    hosts: Sequence[Host]
    """Those of a hostfile; none: this machine."""
    room: Room
    figures_of: FiguresOf


def _this_machine_ready(recipe: Recipe, request: Request, lifelines: Lifelines) -> _Ready:
    connection = lifelines.connect(this_machine(request.slots or 1))
    room = room_here(nvme_folders(recipe))
    standing_by = not request.dry_run
    if standing_by:
        asked = question(recipe, request.slots, request.hosts)
        connection.request("stand_by", **_agent(request).start(asked))
    figures_of = figures_from(
        connection, recipe, request.slots, request.hosts, asked=standing_by, in_part=request.dry_run
    )
    return _Ready(World(lifelines, [connection]), request.hosts, room, figures_of)


def _hosts_ready(
    recipe: Recipe, request: Request, lifelines: Lifelines, console: Console, min_hosts: int | None
) -> _Ready:
    """Bring files, look at all hosts and show what was found; PreflightError unless those that are needed are ready."""
    _bring_files(request, console)
    agent = _agent(request)
    asked = question(recipe, None, request.hosts)
    with progress(console, f"looking at {len(request.hosts)} hosts"):
        preflight = check_hosts(
            request.hosts,
            lifelines,
            paths=_paths(recipe),
            nvme=[str(folder) for folder in nvme_folders(recipe)],
            min_hosts=min_hosts or len(request.hosts),
            ahead=[agent.start(asked), *[agent.start()] * (len(request.hosts) - 1)],
        )
    console.print(preflight_screen(preflight))
    preflight.require_ready()
    connections = preflight.connections
    hosts = [connection.host for connection in connections]
    world = World(lifelines, connections, preflight.rendezvous)
    figures_of = figures_from(connections[0], recipe, None, hosts, asked=hosts == list(request.hosts))
    return _Ready(world, hosts, _least_room(preflight), figures_of)


def _show_end(ended: Ended, request: Request, console: Console, *, draws: bool) -> None:
    """Show how the run ended, leave its report, and raise what the exit code says."""
    outcome = ended.outcome
    console.print(summary_screen(ended.summary))
    if outcome.failure is not None:
        console.print(failure_screen(outcome.failure, outcome.others))
    page = leave_report(ended.run_dir, partial(console.print, soft_wrap=True)) if draws else None
    seen = f"; to look at it, open {page}" if page is not None else ""
    console.print(f"the run is in {ended.run_dir}{seen}", highlight=False, soft_wrap=True)
    if request.as_json:
        _print_summary(ended, console)
    if outcome.ended_as_asked:
        raise Interrupted(f"interrupted after {ended.summary['steps']} steps")
    if outcome.failure is not None:
        raise outcome.failure.reported(log=True)


def _print_summary(ended: Ended, console: Console) -> None:
    """On stdout; where that is full or closed, the run is done all the same."""
    try:
        print(json.dumps(ended.summary, indent=2), flush=True)
    except OSError as error:
        console.print(f"stdout: can't be written: {error.strerror}; the run's folder has summary.json", soft_wrap=True)
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123 (for what is still in the buffer)
            os.dup2(nothing.fileno(), 1)


def _bring_files(request: Request, console: Console) -> None:
    if request.sync:
        from zinf_cli.launch.sync import sync  # as in transport_to

        with progress(console, f"bringing files to {len(request.hosts)} hosts"):
            sent = sync([path.absolute() for path in request.sync], request.hosts)
        console.print(f"brought to the hosts: {format_bytes(sent)}", highlight=False)


def _paths(recipe: Recipe) -> list[str]:
    """Files and folders that every rank reads."""
    dataset = recipe.dataset
    paths = [recipe.model.name_or_path, *dataset.all_paths, dataset.tokenizer]
    return [str(path) for path in paths if path is not None]


def _least_room(preflight: Preflight) -> Room:
    """Of the host with the least: each has to hold as much as the others."""
    memory = min(preflight.rows, key=lambda row: int(row.facts["memory"]))
    drives = min(preflight.rows, key=lambda row: room_of(drives_of(row.facts)))
    in_memory = max(share_in_memory(drives_of(row.facts)) for row in preflight.rows)
    return Room(memory.facts["memory"], room_of(drives_of(drives.facts)), memory.host.name, drives.host.name, in_memory)


MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(MAPPED),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
}
"""glibc's heaps of a rank have fixed thresholds. Left to itself glibc maps large temporaries anew each time. Those of
16 MiB and more are mapped: between small ones in the heap, they leave holes that nothing fits into (the demo's logits:
a peak of 1.11 or 1.28 GiB, by chance). In huge pages that takes little time. The rank sees to the number of its heaps
(train/process_memory.py): one for each thread would keep what each micro-batch's thread freed.

No small block is kept aside when it is freed. Before glibc 2.38 an aligned block, such as a tensor's, is cut from a
place that is a little larger. The rest, if it is kept aside, does not join the block again when that is freed. What is
left is too small for the next block of that size. So a heap that held 0.2 GiB grew to 4 in one step."""

_CARRIED = re.compile(r"(NCCL|GLOO|CUDA)_(?!VISIBLE_DEVICES)")
"""Variables of the launcher that its ranks on other hosts get as well."""


def _agent(request: Request) -> Agent:
    carried = {name: value for name, value in os.environ.items() if _CARRIED.match(name)} if request.hosts else {}
    return Agent("zinf_cli.train.loop", {**carried, **request.environment}, MALLOC)


def _program(recipe: Recipe, plan: Plan, run_dir: Path, request: Request) -> Program:
    return Program(
        _agent(request),
        "train",
        [],
        run_dir,
        {name: (run_dir / name).read_text(encoding="utf-8") for name in (RECIPE, PLAN)},
        plan.nvme_folders,
        recipe.checkpoint.interval is not None or plan.resume is not None,
        {"OMP_NUM_THREADS": str(plan.threads_per_rank)},
    )


def _run(
    recipe: Recipe,
    plan: Plan,
    run_dir: Path,
    world: World,
    request: Request,
    console: Console,
) -> tuple[dict[str, Any], Outcome]:
    view = RunView(console, plan, recipe.logging.interval)
    start.forget(run_dir)
    tracking = tracking_of(recipe, run_dir, view.say)

    def show(line: dict[str, Any]) -> None:
        view.show(line)
        tracking.write(line)

    watch = Watch(run_dir, show)
    logs = RankLogs(run_dir, plan.hosts)

    def poll() -> None:
        if watch.first_step is not None:
            view.begun(watch.first_step)
        elif (share := start.loaded(run_dir)) is not None:
            view.loading(share)
        watch.poll()
        for line in logs.poll():
            view.say(log_line(line) if plan.world_size > 1 else line.text)

    view.start()
    try:
        outcome = run_ranks(
            _program(recipe, plan, run_dir, request),
            world,
            on_poll=poll,
            notify=view.say,
            on_vitals=view.host,
        )
    except BaseException:
        tracking.close("failed")
        raise
    finally:
        view.stop()
    if not request.hosts:  # the launcher is on the ranks' host
        own_bytes = int(psutil.Process().memory_full_info().pss)
        outcome = replace(outcome, host_cpu_bytes=outcome.host_cpu_bytes + own_bytes)
    summary = summarise(plan, watch, outcome)
    tracking.close(summary["status"])
    try:
        write_durably(run_dir / SUMMARY, json.dumps(summary, indent=2))
        if recipe.profiler.enabled:
            merge_traces(run_dir)
    except OSError as error:
        view.say(f"{run_dir}: not all of the summary and the trace can be written: {error.strerror}")
    return summary, outcome
