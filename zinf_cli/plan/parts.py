"""Plans a model whose blocks are larger than the memory that computes them: how large its parts are.

A unit that is computed takes room for its parameters and their gradient, so the largest unit decides what a rank needs
at least. If no placement fits, the model is cut: blocks into their own modules, and matrices into tiles of rows
(engine/units/tiles.py). Each part costs a visit, so parts are as large as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from zinf_cli.machine.hardware import Room
from zinf_cli.machine.profiles import Profile
from zinf_cli.plan.layout import Figures, UnitFigures
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import best_plan, fits
from zinf_cli.recipe.hosts import Host
from zinf_cli.recipe.recipe import Recipe

LEAST = 1 << 16
"""Elements of the smallest part."""
ATTEMPTS = 4
"""How many cuts are tried, each with half the elements of the one before. Only a cut shows what can't be cut."""


def plan_in_parts(
    recipe: Recipe,
    figures: Figures,
    figures_of: Callable[[int], Figures],
    profile: Profile | None = None,
    hosts: Sequence[Host] = (),
    room: Room | None = None,
) -> Plan:
    """The best plan of the model as it is, or of the model in parts if that does not fit.

    If no parts fit, the plan that is returned does not fit. `figures_of(most)` gives the figures of the model in parts
    of at most `most` elements. The other arguments and the errors are those of `best_plan`.
    """
    plan = best_plan(recipe, figures, profile, hosts, room)
    most = None if plan.fits else largest_that_fits(recipe, figures, hosts, room)
    for _ in range(ATTEMPTS):
        if most is None or plan.fits:
            break
        plan = best_plan(recipe, figures_of(most), profile, hosts, room)
        most = most // 2 if most > LEAST else None
    return plan


def largest_that_fits(
    recipe: Recipe, figures: Figures, hosts: Sequence[Host] = (), room: Room | None = None
) -> int | None:
    """Elements of the largest parts with which some placement fits, as far as can be told before the model is cut.

    None if no parts of LEAST elements or more fit.
    """
    most = max((unit.numel for unit in figures.model.units if not unit.resident), default=0) // 2
    while most >= LEAST:
        if fits(recipe, _in_parts(figures, most), hosts, room):
            return most
        most = most * 3 // 4
    return None


def _in_parts(figures: Figures, most: int) -> Figures:
    """The figures that the model may have when it is cut: each unit in equal parts of at most `most` elements."""
    units: list[UnitFigures] = []
    for unit in figures.model.units:
        count = 1 if unit.resident else -(-unit.numel // most)
        units += [_part(unit, count)] * count
    return replace(figures, model=replace(figures.model, units=tuple(units), order=()))


def _part(unit: UnitFigures, count: int) -> UnitFigures:
    """One of `count` equal parts of a unit. Each saves an equal share of what the unit saves."""
    shared = {
        name: getattr(unit, name) // count
        for name in (
            "trainable_numel",
            "frozen_numel",
            "trainable_bytes",
            "frozen_bytes",
            "master_numel",
            "input_bytes",
            "saved_bytes",
            "output_bytes",
        )
    }
    return replace(unit, **shared, largest_param_numel=min(unit.largest_param_numel, max(1, unit.numel // count)))
