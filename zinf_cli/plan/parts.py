"""Plans a model in parts: how large they are, and when there are any.

A unit that is computed takes room for its parameters and their gradient, so the largest unit decides what a rank needs
at least. If no placement fits, the model is cut: blocks into their own modules, and matrices into tiles of rows
(engine/units/tiles.py). Each part costs a visit, and each tile brings its input back for its own backward. So parts are
as large as fit. But a visit costs little beside the state of SMALL elements: where inputs are small as well, parts have
no more, and memory does not follow the layer.

Whole blocks may fit, and leave so little memory beside them that compute waits for the drive. Smaller units leave more,
for what is read ahead and for cached units. So the model is cut as well if that makes the simulated step shorter, by
more than parts may cost.

A cut changes the order of some sums, and with it the last bits of losses. So it does not follow from speeds that are
assumed, or measured in a moment: `zinf bench` has to have measured them. And a run that goes on is cut as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from zinf_cli.machine.hardware import Room
from zinf_cli.machine.profiles import Profile
from zinf_cli.plan.layout import Figures, UnitFigures
from zinf_cli.plan.memory import LEAST_PART
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import best_plan, fits, frugal_plan
from zinf_cli.recipe.hosts import Host
from zinf_cli.recipe.recipe import Recipe

ATTEMPTS = 4
"""How many cuts are tried, each with half the elements of the one before. Only a cut shows what can't be cut."""
SMALL = 1 << 23
"""Elements of a part whose state takes a hundred times as long to move in a step as a visit costs: 200 MiB and more."""
WIDENED, INPUTS = 4, 0.02
"""How many times a block's input the widest input of a part is; and the share of that state which its bytes may be."""
MOST_PARTS = 4096
"""About how many parts a model is cut into at most: planning takes longer the more there are."""
ESTIMATE = 0.1
"""The share by which the memory of parts may be estimated too high."""
GAIN = 0.1
"""A model that fits whole is cut if that spares this share of its step. Parts may cost half as much."""


def plan_in_parts(
    recipe: Recipe,
    figures: Figures,
    figures_of: Callable[[int], Figures],
    profile: Profile | None = None,
    hosts: Sequence[Host] = (),
    room: Room | None = None,
    before: Plan | None = None,
) -> Plan:
    """The best plan of the model as it is; or, if that does not fit, with MLPs in chunks of tokens; or in parts.

    If no parts fit, the plan that is returned does not fit. `figures_of(most)` gives the figures of the model in parts
    of at most `most` elements. `before` is the plan of the run that goes on. The other arguments and the errors are
    those of `best_plan`.
    """

    def planned(figures: Figures) -> Plan:
        return best_plan(recipe, figures, profile, hosts, room)

    if before is not None:
        most = before.figures.model.most
        plan = planned(figures if most is None else figures_of(most))
        if plan.fits:
            return plan
    plan = planned(figures)
    half = _largest(figures) // 2
    known = profile is not None and profile.measured and profile.drives.measured
    if plan.fits and known and 1 - plan.busy["compute"] > GAIN and half >= LEAST_PART:
        enough = (1 - GAIN) * _seconds(plan)
        if _seconds(planned(in_parts(figures, half))) < enough:
            cut = planned(figures_of(half))
            return cut if cut.fits and _seconds(cut) < enough else plan
    if not plan.fits and figures.model.chunkable:
        in_chunks = planned(_tokens_in_chunks(figures))
        if in_chunks.fits:
            return in_chunks
    enough = _enough(figures, plan.micro_batches)
    for _ in range(ATTEMPTS):
        smaller = None if plan.fits else largest_that_fits(recipe, plan.figures, hosts, room)
        if smaller is None:
            break
        plan = planned(figures_of(min(smaller, enough)))
    least = least_part(figures)
    if not plan.fits and _may_fit(frugal_plan(recipe, in_parts(plan.figures, least), hosts, room)):
        smallest = planned(figures_of(least))
        return smallest if smallest.fits else plan
    return plan


def _may_fit(estimated: Plan) -> bool:
    """Whether parts may fit of which this is estimated before the model is cut."""
    return all(limit.needed <= limit.allowed * (1 + ESTIMATE) for limit in estimated.limits)


def _seconds(plan: Plan) -> float:
    """Of a clipped and an unclipped step."""
    return plan.step_s + plan.calm_step_s


def _largest(figures: Figures) -> int:
    """Elements of the largest unit that is fetched."""
    return max((unit.numel for unit in figures.model.units if not unit.resident), default=0)


def least_part(figures: Figures) -> int:
    """Elements of the smallest parts that the model is cut into, as far as its parameters let it."""
    return max(LEAST_PART, -(-figures.model.num_params // MOST_PARTS))


def largest_that_fits(
    recipe: Recipe, figures: Figures, hosts: Sequence[Host] = (), room: Room | None = None
) -> int | None:
    """Elements of the largest parts with which some placement fits, as far as can be told before the model is cut.

    None if no parts of `least_part` elements or more fit.
    """
    most, least = _largest(figures) // 2, least_part(figures)
    while most >= least:
        if fits(recipe, in_parts(figures, most), hosts, room):
            return most
        most = most * 3 // 4
    return None


def _enough(figures: Figures, micro_batches: int) -> int:
    """Elements of a part of the model, than which larger ones would spare next to nothing; else of its largest unit."""
    inputs = WIDENED * micro_batches * max((unit.call_bytes for unit in figures.model.units), default=0)
    state = SMALL * figures.optimizer.moved_bytes_per_param
    return SMALL if inputs <= INPUTS * state else _largest(figures)


def _tokens_in_chunks(figures: Figures) -> Figures:
    """The figures of the model with each MLP in chunks of tokens."""
    units = tuple(
        replace(unit, saved_bytes=max(0, unit.saved_bytes - unit.chunkable_bytes)) for unit in figures.model.units
    )
    return replace(figures, model=replace(figures.model, units=units, tokens_in_chunks=True))


def in_parts(figures: Figures, most: int) -> Figures:
    """The figures that the model may have when it is cut: each unit in equal parts of `most` elements, or its least."""
    units: list[UnitFigures] = []
    places: list[range] = []
    for unit in figures.model.units:
        count = 1 if unit.resident else -(-unit.numel // max(most, unit.least.numel))
        places.append(range(len(units), len(units) + count))
        units += [_part(unit, count)] * count
    order, learned = (
        tuple(part for number in calls for part in places[number])
        for calls in (figures.model.order, figures.model.learned)
    )
    return replace(figures, model=replace(figures.model, units=tuple(units), order=order, learned=learned, most=most))


def _part(unit: UnitFigures, count: int) -> UnitFigures:
    """One of `count` equal parts of a unit. Each saves an equal share of what the unit saves."""
    shared = {
        name: getattr(unit, name) // count
        for name in (
            "trainable_numel",
            "frozen_numel",
            "trainable_bytes",
            "frozen_bytes",
            "packed_bytes",
            "unpacked_bytes",
            "whole_numel",
            "whole_master_numel",
            "whole_flops",
            "spared_numel",
            "master_numel",
            "input_bytes",
            "taken_bytes",
            "sent_bytes",
            "again_bytes",
            "saved_bytes",
            "mapped_bytes",
            "output_bytes",
        )
    }
    part = max(1, unit.numel // count)
    largest, trained = min(unit.largest_param_numel, part), min(unit.largest_trained_numel, part)
    return replace(unit, **shared, largest_param_numel=largest, largest_trained_numel=trained)
