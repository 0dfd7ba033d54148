"""What the memory that a placement leaves is filled with: shadows, kept activations, cached units, in several mixes.

Only the time of a step tells which mix is worth most. With more memory there is always one that has all that a mix has
with less, so that a step never takes longer: of a mix that begins with cached units there is also one with a unit less,
whose memory holds more of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from zinf_cli.model_state import STATES
from zinf_cli.plan.filling import cacheable, cacheable_on_device, keepable, stayable
from zinf_cli.plan.memory import Choice
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe import Recipe

UNSURE = 0.03
"""The share by which a plan's memory may be wrong: benchmarks/README.md, "Predictions"."""


def mixes(recipe: Recipe, plan: Plan, judge: Callable[[Choice], Plan]) -> Iterator[Plan]:
    """Plans with the placement of `plan`, which fits, that fill the room that it leaves."""
    trained = {plan.figures.optimizer.param_class, "optimizer"}
    streamed = not any(map(plan.choice.in_place, trained))
    if streamed and plan.update == "deferred" and plan.precision != "fp16":
        speculative = judge(replace(plan.choice, update="speculative"))
        if speculative.fits:
            yield from _filled(recipe, speculative, judge)
            # without shadows memory holds more units
            yield from (way for way in _filled(recipe, plan, judge) if way.cached_units)
            return
    yield from _filled(recipe, plan, judge)


def _filled(recipe: Recipe, plan: Plan, judge: Callable[[Choice], Plan]) -> Iterator[Plan]:
    """Plans that update as `plan` does."""
    auto = frozenset(state for state in STATES if getattr(recipe.offload, state) == "auto")
    figures, choice = plan.figures, replace(plan.choice, cacheable=auto)
    kept = _keeping(recipe, plan, judge)
    if choice.cache_tier == "device":
        yield kept
        room = plan.room("device", UNSURE) if choice.cached_states else 0
        for first in cacheable_on_device(figures, choice, room):
            if (way := judge(replace(choice, cached=first))).fits:
                yield _keeping(recipe, way, judge)
        return
    later = cacheable(figures, choice, kept.room("cpu", UNSURE))
    yield judge(replace(kept.choice, cacheable=auto, cached=frozenset(later))) if later else kept
    cached = cacheable(figures, choice, plan.room("cpu", UNSURE))
    for count in range(len(cached), max(len(cached) - 2, len(later)), -1):
        yield _keeping(recipe, judge(replace(choice, cached=frozenset(cached[:count]))), judge)


def _keeping(recipe: Recipe, plan: Plan, judge: Callable[[Choice], Plan]) -> Plan:
    """The plan with as many activations in memory as it leaves room for, beside those that lie there anyway."""
    choice = plan.choice
    if choice.in_place("activations"):
        if recipe.activation_checkpointing != "auto":
            return plan
        kept = keepable(plan.figures, choice, plan.room(choice.compute_tier))
        return judge(replace(choice, kept=kept)) if kept else plan
    if recipe.offload.activations != "auto":
        return plan
    staying = stayable(plan.figures, choice, plan.room(choice.compute_tier, UNSURE))
    return judge(replace(choice, staying=staying)) if staying else plan
