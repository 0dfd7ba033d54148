"""Where a run's bytes lie: on each tier by what they are for, and every class of every unit by its tier."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, groupby

from zinf_cli.amounts import format_bytes, format_count
from zinf_cli.model_state import STATES
from zinf_cli.plan.memory import CLASSES, NAMES
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.plan import Plan
from zinf_cli.report.ink import Mark, Picture, bytes_beside, colour, drawn, wide_canvas

_TIER_ROLES = {"device": "violet", "cpu": "blue", "nvme": "teal"}
_TIER_NAMES = {"device": "accelerator", "cpu": "CPU memory", "nvme": "NVMe"}
_KINDS = {
    "params": "blue", "grads": "orange", "optimizer": "green", "activations": "violet", "second": "pink",
    "cached": "sky", "staying": "lilac", "buffers": "teal", "compute": "gold", "framework": "brown",
}  # fmt: skip
_MOST_EDGES = 200
"""Units between which a line is drawn."""
_LEAST_LABEL = 0.05
"""The share of all parameters that a unit has whose name fits into its column."""


def places(plan: Plan) -> Iterator[Picture]:
    """Both pictures."""
    yield _tiers(plan)
    yield _units(plan)


def _tiers(plan: Plan) -> Picture:
    """A bar for each tier, to one scale: what one rank has there."""
    tiers = [tier for tier in TIERS if any(line.tier == tier for line in plan.lines)]
    axes = wide_canvas(40 * len(tiers))
    axes.figure.set_gid("figure-tiers")
    used = [what for what in NAMES if any(line.what == what for line in plan.lines)]
    most = max(sum(line.num_bytes for line in plan.lines if line.tier == tier) for tier in tiers)
    for row, tier in enumerate(tiers):
        start = 0
        for line in plan.lines:
            if line.tier == tier:
                axes.barh(row, line.num_bytes, 0.62, start, color=colour(_KINDS.get(line.what, "faint")), linewidth=0)
                start += line.num_bytes
    axes.set_ylim(len(tiers) - 0.5, -0.5)
    axes.set_yticks(range(len(tiers)), [_TIER_NAMES[tier] for tier in tiers])
    bytes_beside(axes, most * 1.03, along="x")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    sizes = {what: sum(line.num_bytes for line in plan.lines if line.what == what) for what in used}
    legend = tuple(
        Mark(_KINDS.get(what, "faint"), "area", f"{NAMES[what]} {format_bytes(sizes[what])}") for what in used
    )
    limits = (f"{limit.tier} {format_bytes(limit.needed)} of {format_bytes(limit.allowed)}" for limit in plan.limits)
    note = f"All of a host needs, of what it may use: {', '.join(limits)}."
    return Picture("tiers", "What one rank has on each tier, as planned", drawn(axes), legend, note)


def _units(plan: Plan) -> Picture:
    """A row for each class, a column for each unit, as wide as its parameters; a cell has the colour of its tier."""
    units = plan.figures.model.units
    edges = [0, *accumulate(unit.numel for unit in units)]
    axes = wide_canvas(132)
    axes.figure.set_gid("figure-units")
    used = []
    for row, state in enumerate(CLASSES):
        tiers = [_tier(plan, state, number) for number in range(len(units))]
        for tier, numbers in groupby(range(len(units)), key=lambda number: tiers[number]):
            columns = list(numbers)
            start, end = edges[columns[0]], edges[columns[-1] + 1]
            axes.barh(row, end - start, 0.86, start, color=colour(_TIER_ROLES[tier]), linewidth=0, alpha=0.85)
            used.append(tier)
    if len(units) <= _MOST_EDGES:
        axes.vlines(edges[1:-1], -0.5, len(CLASSES) - 0.5, color=colour("card"), linewidth=1)
    for number, unit in enumerate(units):
        if unit.numel >= _LEAST_LABEL * edges[-1]:
            at = (edges[number] + edges[number + 1]) / 2
            axes.text(at, 0, unit.name.rpartition(".")[2], color=colour("card"), size=8, ha="center", va="center")
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(len(CLASSES) - 0.5, -0.5)
    axes.set_yticks(range(len(CLASSES)), [NAMES[state] for state in CLASSES])
    axes.grid(visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.set_xlabel(f"parameters of {len(units)} units, in the order of the model")
    legend = tuple(Mark(_TIER_ROLES[tier], "area", _TIER_NAMES[tier]) for tier in TIERS if tier in used)
    return Picture("units", "Where each unit's state lies", drawn(axes), legend)


def _tier(plan: Plan, state: str, unit: int) -> str:
    if state in STATES:
        return plan.choice.tier(state, unit)
    return plan.choice.compute_tier if unit in plan.staying_units else plan.placement[state]
