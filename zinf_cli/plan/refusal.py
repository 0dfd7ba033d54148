"""The error for a plan that does not fit: what is too much, and what would be the least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError
from zinf_cli.machine.hardware import Room
from zinf_cli.plan.buffers import block_bytes
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import MIB, NAMES, host_bytes
from zinf_cli.plan.parts import least_part
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import CHECKPOINTS, frugal_plan
from zinf_cli.recipe.hosts import Host
from zinf_cli.recipe.recipe import Recipe


def refusal(
    plan: Plan,
    recipe: Recipe,
    figures_of: Callable[[int], Figures],
    hosts: Sequence[Host] = (),
    room: Room | None = None,
) -> CapacityError:
    """The error for a plan of `plan_in_parts` that does not fit; arguments are those of that call.

    If memory for compute is missing, the model is cut into the smallest parts. It says how much these need, which is
    the least that is accepted, and which parameter makes them so large.
    """
    tier = plan.choice.compute_tier
    if plan.over(tier) <= 0:
        return does_not_fit(plan)
    least = frugal_plan(recipe, figures_of(least_part(plan.figures)), hosts, room)
    if least.over(tier) <= 0:
        return does_not_fit(plan)
    sweeps = -(-least.micro_batches // least.per_sweep)
    sizes = [
        (block_bytes(number, least.figures, least.choice, sweeps) * (2 if unit.resident else 1), unit.least)
        for number, unit in enumerate(least.figures.model.units)
        if unit.calls or unit.resident
    ]
    num_bytes, part = max(sizes, key=lambda size: size[0])
    size = f"takes {format_bytes(num_bytes)} of the buffers"
    largest = f"{part.param} can't be cut, and {size}" if part.whole else f"the largest, of {part.param}, {size}"
    limit = next(limit for limit in least.limits if limit.tier == tier)
    return does_not_fit(
        least, f"that is with the smallest parts: {-(-limit.needed // MIB)} MiB are enough for them; {largest}"
    )


def does_not_fit(plan: Plan, why: str = "") -> CapacityError:
    """The error for a plan that does not fit: what is too much, on which tier, and what to do; `why` comes after it."""
    problems = [
        f"{limit.tier} {'need' if limit.tier == CHECKPOINTS else 'needs'} {format_bytes(limit.needed)}, "
        f"{limit.origin} allows {format_bytes(limit.allowed)}{_parts(plan, limit.tier)}"
        for limit in plan.short
    ]
    problems += [why] if why else []
    return CapacityError(f"does not fit: {'; '.join(problems)}", hint=_next_steps(plan))


def _parts(plan: Plan, tier: str) -> str:
    """What the bytes on a tier are for."""
    ranks, machine = plan.figures.ranks_per_host, plan.figures.machine
    parts = [
        f"{NAMES[line.what]} {format_bytes(line.num_bytes)}"
        for line in plan.lines
        if line.tier == tier and line.num_bytes
    ]
    if not parts:
        return ""
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    launcher = host_bytes(ranks, machine.shared_bytes) if tier == "cpu" else 0
    beside = f"; the launcher {format_bytes(launcher)}" if launcher > 0 else ""
    return f": {', '.join(parts)}{each}{beside}"


def _next_steps(plan: Plan) -> str:
    """What a user can do about limits that are too low."""
    tiers = {limit.tier for limit in plan.short}
    steps = [f"raise {limit.origin}" for limit in plan.short if limit.origin.startswith("offload.")]
    if any(limit.tier == "nvme" and not limit.origin.startswith("offload.") for limit in plan.short):
        steps += ["free space on the drive", "add a folder to offload.nvme_path"]
    if CHECKPOINTS in tiers:
        steps += ["free space on the drive of output_dir", "set checkpoint.keep_latest_k", "raise checkpoint.interval"]
    if tiers - {"nvme", CHECKPOINTS}:
        steps += ["move states to nvme (offload.*)"] * ("nvme" not in {*tiers, *plan.placement.values()})
        steps += ["shorten train.seq_len", "lower train.micro_batch_size"]
    return " or ".join([*([", ".join(steps[:-1])] if steps[1:] else []), steps[-1]])
