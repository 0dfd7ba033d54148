"""How long a step of a plan will take: the plan as a schedule, played on a profile of this machine or another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zinf_cli.machine.profile_file import Measured, rates_between
from zinf_cli.machine.profiles import ASSUMED_DRIVE_BANDWIDTH, Drives, Profile
from zinf_cli.model_state import CHUNK_NUMEL, ITEM_BYTES
from zinf_cli.plan.layout import Figures, ModelFigures, UnitFigures
from zinf_cli.plan.memory import Choice, activations_moved, sweeps_share
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.schedule import Step, UnitLoad
from zinf_cli.plan.simulate import Cluster, Simulation, at_least, simulate
from zinf_cli.plan.traffic import grad_bytes

MOST_AHEAD = 8
"""The most visits that a schedule has under way; the engine has more where buffers let it."""
LEAST_CLIPS, MOST_CLIPS = 0.1, 0.8
"""Bounds of the share of clipped steps up to which updates in backward pay. The least is what a single clip counts for:
training that hardly ever clips has them on every machine. Beyond the most, few steps are left that they hold in."""
IN_PLACE_CHUNK = 8 * CHUNK_NUMEL
"""How many parameters of an update are under way at once where all of it lies in memory."""


def profile_here(figures: Figures, folders: Sequence[Path], measured: Measured | None) -> Profile:
    """The profile of this machine: measured where `zinf bench` was run, assumed where not.

    The drives are measured only if the file systems of `folders` are those that were.
    """
    machine, links = figures.machine, measured.links if measured is not None else None
    assumed = ASSUMED_DRIVE_BANDWIDTH * max(1, len(folders))
    drives = Drives(0, assumed, assumed, assumed)
    if measured is not None and measured.covers(folders):
        drives = measured.drives() or drives
    if measured is not None:
        drives = replace(drives, endurance_bytes=measured.endurance_bytes)
    flops = machine.flops * (1 if machine.accelerators else figures.ranks_per_host)  # one rank's threads are timed
    return Profile(
        name=measured.name if measured is not None and links is not None else "this machine",
        accelerators=machine.accelerators, device_memory=machine.device_bytes, cpu_memory=0, drives=drives,
        matmul=links.best_matmul if links is not None else {figures.precision: flops},
        passes=links.block if links is not None else {figures.precision: {1: flops}},
        measured=links is not None, host_mtbf_s=measured.host_mtbf_s if measured is not None else None,
        **rates_between(links, machine.accelerators),
    )  # fmt: skip


def predict(plan: Plan, tokens: int, profile: Profile, *, unclipped: bool = False, in_vain: bool = False) -> Simulation:
    """Play a step of `plan` with `tokens` tokens in a micro-batch.

    The step is expected to be clipped, so that speculative updates are made in the next forward; or `unclipped`, so
    that they hold; or they were made `in_vain`, since it is clipped after all.
    """
    speed = profile.flops(plan.precision, tokens) / profile.peak(plan.precision)
    step = step_of_plan(plan, tokens, min(1.0, speed))
    if step.update == "speculative" and not unclipped:
        step = replace(step, update="in vain" if in_vain else "deferred")
    return simulate(step, profile, cluster_of(plan, tokens))


def clips_worth(expected_s: float, unclipped_s: float, in_vain_s: float) -> float:
    """The share of steps that clip below which updates in backward pay, by what three kinds of step take (`predict`).

    With a share p of them, steps with such updates take p in_vain_s + (1 - p) unclipped_s on average, and steps without
    take expected_s.
    """
    lost = in_vain_s - unclipped_s
    return min(MOST_CLIPS, max(LEAST_CLIPS, (expected_s - unclipped_s) / lost if lost > 0 else MOST_CLIPS))


def least_seconds(plan: Plan, tokens: int, profile: Profile) -> tuple[float, float]:
    """Of a clipped and of an unclipped step, if nothing waits for data: bounds of what `predict` says."""
    step, cluster = step_of_plan(plan, tokens), cluster_of(plan, tokens)
    unclipped = clipped = at_least(step, profile, cluster)
    if step.update == "speculative":
        clipped = at_least(replace(step, update="deferred"), profile, cluster)
    return clipped, unclipped


def cluster_of(plan: Plan, tokens: int) -> Cluster:
    """The hosts and ranks of a plan, each with micro-batches of `tokens` tokens."""
    return Cluster(len(plan.hosts), plan.figures.ranks_per_host, plan.precision, tokens)


def step_of_plan(plan: Plan, tokens: int, speed: float = 1.0) -> Step:
    """The plan as a schedule, with `tokens` tokens in a micro-batch.

    `speed`: FLOP/s of a block's pass as a share of those of its products alone.
    """
    figures, working = plan.figures, plan.working
    accelerator = bool(figures.machine.accelerators)
    choice = plan.choice
    typical, fields = working.typical_block_bytes, working.streamed_fields
    placement = dict(plan.placement)
    if not accelerator:
        placement = {state: "cpu" if tier == "device" else tier for state, tier in placement.items()}
    return Step(
        _loads(figures, choice, tokens, speed),
        plan.micro_batches,
        plan.per_sweep,
        plan.world_size,
        placement,
        accelerator,
        choice.cache_tier,
        dtype=figures.dtype,
        grad_bytes=_grad_bytes(figures, choice, plan.micro_batches),
        optimizer=figures.optimizer,
        update=plan.update,
        depth=max(2, min(MOST_AHEAD, working.slot_bytes // typical)) if typical else MOST_AHEAD,
        chunk_params=working.num_chunks * working.chunk_numel / fields if fields else IN_PLACE_CHUNK,
    )


def _grad_bytes(figures: Figures, choice: Choice, micro_batches: int) -> float:
    """Bytes of one parameter's gradient as it goes to its tier, the mean over all units."""
    units = figures.model.units
    total = sum(grad_bytes(figures, choice, number, micro_batches) for number in range(len(units)))
    return total / max(1, sum(unit.trainable_numel for unit in units))


def _loads(figures: Figures, choice: Choice, tokens: int, speed: float) -> list[UnitLoad]:
    """The visits of a forward pass. A unit that is called twice brings its parameters twice, and its gradient once."""
    model = figures.model
    moved = list(activations_moved(figures, choice))
    weights = [_weight(model, place) for place in range(len(model.order))]
    passes = sum(weight * model.units[number].passes for weight, number in zip(weights, model.order, strict=True))
    forward = model.flops_per_token * tokens / max(1.0, passes)
    loads = []
    for place, number in enumerate(model.order):
        unit = model.units[number]
        first = number not in model.order[:place]
        loads.append(
            UnitLoad(
                unit.name,
                unit.numel,
                unit.trainable_numel if first else 0,
                forward * weights[place],
                moved[number][0] / max(1, unit.calls),
                recomputed=_recomputed(unit, speed) if number not in choice.kept else 0.0,
                again=unit.chunkable_numel / max(1, unit.numel) if model.tokens_in_chunks else 0.0,
                glue_bytes=unit.sent_bytes / max(1, unit.calls),
                share=sweeps_share(unit, figures, choice),
                cached=choice.cached_states if number in choice.cached else frozenset(),
                back_bytes=moved[number][1] / max(1, unit.calls),
                passes=unit.passes,
                learns=model.order[place:].count(number) <= unit.learned,
                frozen_bytes=unit.frozen_bytes if unit.packed_bytes else None,
                unpacked=unit.unpacked_bytes / ITEM_BYTES[figures.dtype],
                moment_bytes=figures.moments_bytes(unit) if unit.whole_numel else None,
                update_flops=unit.whole_flops,
            )
        )
    return loads


def _recomputed(unit: UnitFigures, speed: float) -> float:
    """The share of a unit's forward that backward computes again, where its activations are not kept."""
    return 0.0 if unit.product else 1 - unit.spared_numel / max(1, unit.numel) * speed


def _weight(model: ModelFigures, place: int) -> int:
    """The weight of a visit's compute: its parameters; 0 for an embedding, which is only looked up."""
    unit = model.units[model.order[place]]
    lookup = place == 0 and unit.largest_param_numel > 0.9 * unit.numel
    return 0 if lookup else unit.numel
