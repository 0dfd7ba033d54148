"""What the memory that a placement leaves is filled with: shadows, kept activations, cached units, in several mixes.

Only the time of a step tells which mix is worth most. Units are cached with all of their state, or with some classes of
it. With more memory there is always a mix that has all that one has with less, so that a step never takes longer: of a
mix that begins with cached units there is also one with a unit less, whose memory holds more of the rest.
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
SHARES = (frozenset(STATES), frozenset({"params", "optimizer"}), frozenset({"params"}), frozenset({"optimizer"}))
"""Which classes of a cached unit's state may lie in memory. In fp32 with updates in the next forward, a byte of memory
spares a step 3 bytes if it holds parameters, 2 if it holds moments, and 2.25 if it holds all state. Of these, forward,
where the drive has most to do, has 2, 2 and 1.75."""


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
    yield kept
    if choice.cache_tier == "device":
        room = plan.room("device", UNSURE) if choice.cached_states else 0
        for first in cacheable_on_device(figures, choice, room):
            if (way := judge(replace(choice, cached=first))).fits:
                yield _keeping(recipe, way, judge)
        return
    for states in dict.fromkeys(replace(choice, cacheable=auto & share).cached_states for share in SHARES):
        some = replace(choice, cacheable=states)
        if later := cacheable(figures, some, kept.room("cpu", UNSURE)):
            yield judge(replace(kept.choice, cacheable=states, cached=frozenset(later)))
        cached = cacheable(figures, some, plan.room("cpu", UNSURE))
        for count in range(len(cached), max(len(cached) - 2, len(later)), -1):
            yield _keeping(recipe, judge(replace(some, cached=frozenset(cached[:count]))), judge)


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
