"""What a run writes to drives, beside what these may be written in their life."""

from __future__ import annotations

from zinf_cli.amounts import format_decimal, format_number
from zinf_cli.plan.plan import Plan

_DAY = 24 * 3600


def step_bytes(plan: Plan) -> float:
    """Bytes that the ranks of a host write to its drives in a step, checkpoints on them included; the mean of all."""
    written = float(plan.nvme_written)
    if plan.checkpoint is not None and plan.checkpoint.drive_shared:
        written += plan.checkpoint.traffic / plan.world_size / plan.checkpoint.interval
    return written * plan.figures.ranks_per_host


def wear_line(plan: Plan) -> str | None:
    """What the whole run writes, what it writes a day, and the share of the drives' endurance; None if nothing."""
    if not (written := step_bytes(plan)):
        return None
    run = written * plan.max_steps
    day = written * _DAY / plan.calm_step_s
    text = (
        f"{format_decimal(run)} are written to a host's drives in {plan.max_steps} steps, {format_decimal(day)} a day"
    )
    if plan.endurance_bytes is None:
        return text
    share, days = (format_number(part) for part in (100 * run / plan.endurance_bytes, plan.endurance_bytes / day))
    return f"{text}: {share} % of the {format_decimal(plan.endurance_bytes)} they are rated for, or {days} days"
