"""The search for a plan: the fastest placement that fits.

`best_plan` judges every placement by its bytes, plays those that fit on a profile of the machine, and takes the
fastest. Classes that the recipe pins stay where it says. It plans the model as its figures have it: whole, or cut into
parts of one size. Into which, parts.py decides. A recipe that does not fit is refused, with the numbers, before
anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from zinf_cli.machine.drive_files import GROWTH
from zinf_cli.machine.hardware import Room, room_here
from zinf_cli.machine.profiles import ASSUMED_DRIVE_BANDWIDTH, MEMORY_SHARE, Profile
from zinf_cli.plan.buffers import Working, working_buffers
from zinf_cli.plan.checkpoints import CheckpointDrive, checkpoint_bytes, checkpoint_drive
from zinf_cli.plan.io import choose_io
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import (
    CLASSES,
    Choice,
    cached_bytes,
    framework_bytes,
    host_bytes,
    shadow_bytes,
    state_bytes,
    staying_bytes,
)
from zinf_cli.plan.mixes import mixes
from zinf_cli.plan.placement import placements, undominated
from zinf_cli.plan.plan import CheckpointStep, Limit, Line, Plan, SweepCost
from zinf_cli.plan.predict import clips_worth, cluster_of, least_seconds, predict, profile_here
from zinf_cli.plan.simulate import rates_of
from zinf_cli.plan.temporaries import compute_bytes
from zinf_cli.plan.traffic import checkpoint_traffic, nvme_traffic
from zinf_cli.recipe.hosts import Host, this_machine
from zinf_cli.recipe.recipe import Recipe

CHECKPOINTS = "checkpoints"
"""Stands as a limit's tier for the file system of the run's folder."""
AS_LONG = 1e-3
"""Steps that differ by this share take as long."""


def best_plan(
    recipe: Recipe,
    figures: Figures,
    profile: Profile | None = None,
    hosts: Sequence[Host] = (),
    room: Room | None = None,
) -> Plan:
    """The plan of the fastest placement that fits. If none does, one that lacks room for checkpoints alone, or else the
    most frugal one.

    `profile` is the machine that the run is for; without one, it is this machine as far as it is known. Without
    `hosts`, all ranks are on one. `room` is what each host has; without it, what this machine has now.

    UsageError if there are more ranks than sequences in a step; PreflightError if a folder can't hold state or
    checkpoints.
    """
    judge, micro_batches = _judge(recipe, figures, hosts, room)
    profile = profile or profile_here(figures, nvme_folders(recipe), None)
    unkept: Plan | None = None
    for choices in _choices(recipe, figures, micro_batches):
        frugal = judge(choices[-1])
        ways: list[Plan] = []
        plans = [] if _hopeless(frugal) else [judge(choice) for choice in choices]
        unkept = unkept or next((plan for plan in plans if {limit.tier for limit in plan.short} <= {CHECKPOINTS}), None)
        for plan in _worth_filling(plans):
            ways += mixes(recipe, plan, judge)
            if _lacks_nothing(ways[-1]):
                break
        if ways:
            return _with_cost_of_sweeps(_fastest(ways, recipe, profile), recipe, profile, judge)
    return _with_time(unkept or frugal, recipe, profile)


def _worth_filling(plans: Sequence[Plan]) -> Sequence[Plan]:
    """Of the plans of all placements, those that fit. On an accelerator, only those that none beats on every class, and
    those that leave most memory, with activations on the device and without: the simulation is too fast where the
    link's copies wait for each other, so it would prefer placements that are slower."""
    fitting = [(plan.placement, plan) for plan in plans if plan.fits]
    if not fitting or fitting[0][1].choice.compute_tier == "cpu":
        return [plan for _, plan in fitting]
    lean = [plan for placement, plan in fitting if placement["activations"] == "device"]
    chosen = (*undominated(fitting), *lean[-1:], fitting[-1][1])
    return list({str(plan.placement): plan for plan in chosen}.values())


def _lacks_nothing(plan: Plan) -> bool:
    """Whether nothing moves between tiers and nothing is computed again, so that no plan is faster."""
    kept = {*plan.kept_units, plan.figures.model.turn}
    return all(map(plan.choice.in_place, CLASSES)) and kept.issuperset(plan.figures.model.order)


def _hopeless(frugal: Plan) -> bool:
    """Whether no placement fits, since the most frugal one lacks more memory for compute than its buffers take.

    A placement with more in memory spares these at most.
    """
    tier = frugal.choice.compute_tier
    return frugal.over(tier) > frugal.working.total * frugal.figures.ranks_at(tier)


def fits(recipe: Recipe, figures: Figures, hosts: Sequence[Host] = (), room: Room | None = None) -> bool:
    """Whether any placement fits. It asks the most frugal ones first: of many parts a plan takes a while."""
    judge, micro_batches = _judge(recipe, figures, hosts, room)
    choices = list(_choices(recipe, figures, micro_batches))
    frugal = [judge(placed[-1]) for placed in choices]
    if any(plan.fits for plan in frugal):
        return True
    return any(
        judge(choice).fits
        for plan, placed in zip(frugal, choices, strict=True)
        if not _hopeless(plan)
        for choice in placed
    )


def frugal_plan(recipe: Recipe, figures: Figures, hosts: Sequence[Host] = (), room: Room | None = None) -> Plan:
    """Of the plans with the most frugal placement, the one that needs least memory for compute; without times."""
    judge, micro_batches = _judge(recipe, figures, hosts, room)
    plans = [judge(placed[-1]) for placed in _choices(recipe, figures, micro_batches)]
    return min(plans, key=lambda plan: plan.over(plan.choice.compute_tier))


def _judge(
    recipe: Recipe, figures: Figures, hosts: Sequence[Host], room: Room | None
) -> tuple[Callable[[Choice], Plan], int]:
    """A function that makes the plan of a choice, without times; and how many micro-batches a rank has in a step.

    Errors are those of `best_plan`.
    """
    sequences = recipe.train.sequences_per_step(figures.world_size)
    per_rank = -(-sequences // figures.world_size)
    micro_batches = -(-per_rank // recipe.train.micro_batch_size)
    hosts = tuple(hosts) or (this_machine(figures.world_size),)
    room = room or room_for(recipe, figures)
    drive = checkpoint_drive(recipe, nvme_folders(recipe), figures.data.max_steps)
    return partial(_plan, recipe, figures, hosts, room, micro_batches, sequences, drive), micro_batches


def _fastest(plans: Sequence[Plan], recipe: Recipe, profile: Profile) -> Plan:
    """The plan whose steps, clipped and unclipped, take least together; of those that take as long, the one whose
    bounds come first. Only those are played that could be it."""
    if len(plans) == 1:
        return _with_time(plans[0], recipe, profile)
    tokens = recipe.train.seq_len * recipe.train.sequences_at_once
    least = [least_seconds(plan, tokens, profile) for plan in plans]
    best, worth = plans[0], math.inf
    for plan, (clipped, unclipped) in sorted(zip(plans, least, strict=True), key=lambda item: sum(item[1])):
        if clipped + unclipped >= worth:
            break
        seconds = predict(plan, tokens, profile).step_s
        if seconds + unclipped >= worth:
            continue
        seconds += predict(plan, tokens, profile, unclipped=True).step_s if plan.update == "speculative" else seconds
        if seconds < worth:
            best, worth = plan, (1 - AS_LONG) * seconds
    return _with_time(best, recipe, profile)


def _with_time(plan: Plan, recipe: Recipe, profile: Profile) -> Plan:
    """The plan with its times, played on `profile`, and with the blocks and threads of its I/O."""
    tokens = recipe.train.seq_len * recipe.train.sequences_at_once
    played = predict(plan, tokens, profile)
    unclipped = predict(plan, tokens, profile, unclipped=True) if plan.update == "speculative" else played
    in_vain = predict(plan, tokens, profile, in_vain=True) if plan.update == "speculative" else played
    rates = rates_of(profile, cluster_of(plan, tokens))
    figures = plan.figures
    cores = 0 if figures.machine.accelerators else plan.threads_per_rank
    checkpoint = plan.checkpoint
    if checkpoint is not None:
        # a checkpoint is written behind the updates: such a step lasts as long as other steps, or as its drive is busy
        speed, before = ASSUMED_DRIVE_BANDWIDTH / plan.world_size, 0
        if checkpoint.drive_shared:
            speed, before = rates["both"], plan.nvme_traffic_clipped
        drive_s = (before + checkpoint.traffic / plan.world_size) / speed if checkpoint.traffic else 0.0
        checkpoint = replace(checkpoint, step_s=max(played.step_s, drive_s))
    return replace(
        plan,
        checkpoint=checkpoint,
        io=choose_io(profile.drives, len(plan.nvme_folders), figures.ranks_per_host, cores),
        compute_s=plan.compute_s * figures.machine.flops / rates["matmul"],
        nvme_s=plan.nvme_traffic_clipped / rates["both"],
        step_s=played.step_s,
        calm_step_s=unclipped.step_s,
        clips_worth=clips_worth(played.step_s, unclipped.step_s, in_vain.step_s),
        bottleneck=played.bottleneck,
        busy=dict(played.busy),
        drives_measured=profile.drives.measured,
        endurance_bytes=profile.drives.endurance_bytes,
        host_mtbf_s=profile.host_mtbf_s,
    )


def _with_cost_of_sweeps(plan: Plan, recipe: Recipe, profile: Profile, judge: Callable[[Choice], Plan]) -> Plan:
    if plan.per_sweep >= plan.micro_batches:
        return plan
    together = _with_time(judge(replace(plan.choice, per_sweep=plan.micro_batches)), recipe, profile)
    traffic = plan.nvme_traffic_clipped - together.nvme_traffic_clipped
    return replace(plan, sweep_cost=SweepCost(together.short, traffic, max(0.0, plan.step_s - together.step_s)))


def _choices(recipe: Recipe, figures: Figures, micro_batches: int) -> Iterator[list[Choice]]:
    """A list of all placements for each length of a sweep: all micro-batches first, then fewer.

    The most frugal placement is the last of its list.
    """
    fixed = recipe.train.micro_batches_per_sweep
    sweeps = [min(fixed, micro_batches)] if isinstance(fixed, int) else _sizes(micro_batches)
    compute_tier = "device" if figures.machine.accelerators else "cpu"
    asked = {state: getattr(recipe.offload, state) for state in CLASSES}
    kept = frozenset(figures.model.order if recipe.activation_checkpointing == "none" else ())
    train = recipe.train
    eager = train.max_grad_norm is None and train.non_finite == "stop" and figures.precision != "fp16"
    update = "eager" if eager else "deferred"
    for per_sweep in sweeps:
        yield [Choice(placed, per_sweep, compute_tier, kept, update) for placed in placements(asked, compute_tier)]


def _sizes(micro_batches: int) -> list[int]:
    """How many micro-batches a sweep may have, the most first: for each count of sweeps, as few as do."""
    return sorted({-(-micro_batches // sweeps) for sweeps in range(1, micro_batches + 1)}, reverse=True)


def _plan(
    recipe: Recipe,
    figures: Figures,
    hosts: tuple[Host, ...],
    room: Room,
    micro_batches: int,
    sequences: int,
    drive: CheckpointDrive | None,
    choice: Choice,
) -> Plan:
    sweeps = -(-micro_batches // choice.per_sweep)
    states, working = state_bytes(figures, choice), working_buffers(figures, choice, sweeps)
    budgets = _budgets(recipe, figures, room)
    tight = (choice.compute_tier, *(["cpu"] if figures.machine.one_pool else []))
    needed = _needed(figures, choice, states, working, room)
    if (over := max(-(-(needed[tier] - budgets[tier][0]) // figures.ranks_at(tier)) for tier in tight)) > 0:
        working = working.shrunk(over)
        needed = _needed(figures, choice, states, working, room)
    folders = nvme_folders(recipe)
    lines = tuple(_lines(figures, choice, states, working, room))
    traffic = nvme_traffic(figures, choice, sweeps, micro_batches)
    most_traffic = traffic.total
    if choice.update == "speculative":
        most_traffic = nvme_traffic(figures, replace(choice, update="deferred"), sweeps, micro_batches).total
    tokens = sequences * recipe.train.seq_len / figures.world_size
    return Plan(
        hosts=hosts,
        world_size=figures.world_size,
        threads_per_rank=max(1, figures.machine.cores // figures.ranks_per_host),
        precision=figures.precision,
        placement=dict(choice.placement),
        micro_batches=micro_batches,
        per_sweep=choice.per_sweep,
        update=choice.update,
        kept_units=tuple(sorted(choice.kept)),
        cached_units=tuple(sorted(choice.cached)),
        staying_units=tuple(sorted(choice.staying)),
        cached_states=tuple(sorted(choice.cached_states)) if choice.cached else (),
        sequences_per_step=sequences,
        max_steps=figures.data.max_steps,
        working=working,
        nvme_bytes=sum(line.num_bytes for line in lines if line.tier == "nvme"),
        nvme_folders=tuple(str(folder) for folder in folders) if "nvme" in choice.placement.values() else (),
        lines=lines,
        limits=tuple(_limits(figures, choice, needed, budgets, drive)),
        compute_s=figures.model.flops_per_token * _recompute(figures, choice) * tokens / figures.machine.flops,
        nvme_s=most_traffic * figures.ranks_per_host / (ASSUMED_DRIVE_BANDWIDTH * max(1, len(folders))),
        nvme_traffic=traffic.total,
        nvme_written=traffic.written,
        nvme_traffic_clipped=most_traffic,
        figures=figures,
        checkpoint=_checkpoint_step(recipe, figures, choice, drive),
    )


def _limits(
    figures: Figures,
    choice: Choice,
    needed: Mapping[str, int],
    budgets: Mapping[str, tuple[int, str]],
    drive: CheckpointDrive | None,
) -> Iterator[Limit]:
    for tier, (allowed, origin) in budgets.items():
        if needed[tier] or tier == choice.compute_tier:
            yield Limit(tier, needed[tier], allowed, origin)
    if drive is not None:
        needed_there = drive.to_come * checkpoint_bytes(figures)
        yield Limit(CHECKPOINTS, needed_there, drive.left(needed["nvme"]), "this machine")


def _checkpoint_step(
    recipe: Recipe, figures: Figures, choice: Choice, drive: CheckpointDrive | None
) -> CheckpointStep | None:
    interval = recipe.checkpoint.interval
    if drive is None or interval is None:
        return None
    traffic = checkpoint_traffic(figures, choice, drive)
    return CheckpointStep(interval, drive.folder, checkpoint_bytes(figures), traffic, drive.shared > 0)


def _recompute(figures: Figures, choice: Choice) -> float:
    """FLOPs with recomputation, divided by those without: where all is trained, a unit's forward again is a third more.

    MLPs in chunks of tokens are computed once more than that.
    """
    units = dict(enumerate(figures.model.units))
    called = {number: unit.numel for number, unit in units.items() if unit.calls or unit.resident}
    passes = sum(numel * units[number].passes for number, numel in called.items())
    spared = {n for n, unit in units.items() if unit.product} | choice.kept | {figures.model.turn}
    again = sum(numel - units[n].spared_numel for n, numel in called.items() if n not in spared)
    if figures.model.tokens_in_chunks:
        again += sum(units[n].chunkable_numel for n in called)
    return 1 + again / max(1.0, passes)


def _lines(figures: Figures, choice: Choice, states: dict[str, int], working: Working, room: Room) -> Iterator[Line]:
    cached = cached_bytes(figures, choice)
    shadows = shadow_bytes(figures, choice)
    on_drives = shadows.get("nvme", 0)
    for state in CLASSES:
        tier = choice.placement[state]
        tier = "cpu" if tier == "device" and choice.compute_tier == "cpu" else tier
        line = Line(tier, state, states[state] - cached.get(state, 0))
        on_drives += line.num_bytes if tier == "nvme" else 0
        yield line
    for tier, num_bytes in shadows.items():
        if num_bytes:
            yield Line(tier, "second", num_bytes)
    if on_drives and room.drives_in_memory:
        yield Line("cpu", "tmpfs", int(on_drives * room.drives_in_memory))
    if choice.cached:
        yield Line(choice.cache_tier, "cached", sum(cached.values()))
    if choice.staying:
        yield Line(choice.compute_tier, "staying", staying_bytes(figures, choice))
    yield Line(choice.compute_tier, "buffers", working.total)
    yield Line(choice.compute_tier, "compute", compute_bytes(figures, choice))
    yield Line("cpu", "framework", framework_bytes(figures, choice))


def _needed(figures: Figures, choice: Choice, states: dict[str, int], working: Working, room: Room) -> dict[str, int]:
    needed = {"device": 0, "cpu": host_bytes(figures.ranks_per_host, figures.machine.shared_bytes), "nvme": 0}
    for line in _lines(figures, choice, states, working, room):
        needed[line.tier] += line.num_bytes * figures.ranks_at(line.tier)
    if needed["nvme"]:
        needed["nvme"] += GROWTH * figures.ranks_per_host  # the sizes of some activations depend on data
    if figures.machine.one_pool:
        needed["cpu"] += needed["device"]
    return needed


def _budgets(recipe: Recipe, figures: Figures, room: Room) -> dict[str, tuple[int, str]]:
    """(bytes that may be used, who sets that limit) per tier: the lesser of the recipe's budget and the machine's."""
    offload = recipe.offload
    machine = {
        "cpu": (int(room.memory * (1.0 if offload.cpu_memory else MEMORY_SHARE)), offload.cpu_memory),
        "nvme": (room.drives, offload.nvme_space),
    }
    if figures.machine.accelerators:
        machine["device"] = (int(figures.machine.device_bytes * MEMORY_SHARE), offload.device_memory)
    origins = {"cpu": room.memory_of, "nvme": room.drives_of, "device": figures.machine.name}
    budgets = {}
    for tier, (there, asked) in machine.items():
        key = "offload.nvme_space" if tier == "nvme" else f"offload.{tier}_memory"
        asked_less = asked is not None and asked <= there
        budgets[tier] = (asked, key) if asked_less and asked is not None else (there, origins[tier])
    return budgets


def room_for(recipe: Recipe, figures: Figures) -> Room:
    """What a host of `figures` has: what this machine has now, if it is this one."""
    machine = figures.machine
    if machine.cpu_bytes:
        return Room(machine.cpu_bytes, machine.nvme_bytes, machine.name, machine.name)
    return room_here(nvme_folders(recipe))


def nvme_folders(recipe: Recipe) -> Sequence[Path]:
    """The folders of the NVMe tier: the recipe's, or one inside the run's."""
    return recipe.offload.nvme_path or (recipe.output_dir / "nvme",)
