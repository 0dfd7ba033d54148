"""What each choice would buy: the plans of other recipes, more memory or a faster drive, beside the plan of a recipe.

Each is made by the planner that made the plan itself, for the same hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from zinf_cli.amounts import format_bytes
from zinf_cli.machine.hardware import Room
from zinf_cli.machine.profiles import Profile
from zinf_cli.model_state import STATE_DTYPES
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe import Recipe

MORE_MEMORY = (1.25, 1.5, 2.0, 4.0)
"""Steps, as shares of the CPU memory that the plan may use."""

Planner = Callable[[Recipe, Callable[[Figures], Figures], Profile, Room], Plan]
"""Plans a recipe whose figures are changed by a function, on a machine with such drives and so much room."""


@dataclass(frozen=True)
class Alternative:
    """A plan, and what makes it another."""

    change: str
    """As a user makes it, where a key of the recipe does."""
    plan: Plan
    other_results: bool = False
    """Whether losses are others: by rounding, or since a step is another."""

    @property
    def cpu_bytes(self) -> int:
        """CPU memory of a host."""
        return next(limit.needed for limit in self.plan.limits if limit.tier == "cpu")

    def tokens_per_s(self, each: int) -> float:
        """Of all ranks, where what a step takes has `each` so many tokens."""
        return self.plan.sequences_per_step * each / self.plan.step_s

    def to_json(self, each: int) -> dict[str, Any]:
        """For `zinf estimate --explain --json`."""
        return {
            "change": self.change,
            "other_results": self.other_results,
            "fits": self.plan.fits,
            "step_s": self.plan.step_s,
            "calm_step_s": self.plan.calm_step_s,
            "tokens_per_s": self.tokens_per_s(each),
            "nvme_traffic_bytes": self.plan.nvme_traffic,
            "cpu_bytes": self.cpu_bytes,
        }


def alternatives(recipe: Recipe, plan: Plan, profile: Profile, room: Room, planned: Planner) -> Iterator[Alternative]:
    """Those that differ from the recipe of `plan`. `room` is what the plan was made with."""

    def of(change: str, section: str, other_results: bool = True, **keys: Any) -> Alternative:
        return Alternative(change, planned(_with(recipe, section, **keys), _as_they_are, profile, room), other_results)

    for name, dtype in STATE_DTYPES.items():
        if name != recipe.optimizer.state_dtype and not plan.figures.optimizer.factored:
            rounding = _with(recipe, "optimizer", state_dtype=name)
            other = planned(rounding, partial(_stored_as, dtype), profile, room)
            yield Alternative(f"optimizer.state_dtype={name}", other, other_results=True)
    if recipe.train.max_grad_norm is not None:
        yield of("train.max_grad_norm=null", "train", max_grad_norm=None)
    if plan.precision != "bf16":
        yield of("train.precision=bf16", "train", precision="bf16")
    more = 2 * plan.sequences_per_step
    yield of(f"train.global_batch_size={more}", "train", global_batch_size=more, gradient_accumulation_steps=None)
    if not plan.nvme_traffic:
        return
    drives = profile.drives
    faster = replace(drives, read=2 * drives.read, write=2 * drives.write, both=2 * drives.both)
    yield Alternative("drives twice as fast", planned(recipe, _as_they_are, replace(profile, drives=faster), room))
    if not any(tier == "nvme" and getattr(recipe.offload, state) == "auto" for state, tier in plan.placement.items()):
        return
    allowed = next(limit.allowed for limit in plan.limits if limit.tier == "cpu")
    for share in MORE_MEMORY:
        budget = int(share * allowed)
        larger = replace(room, memory=max(room.memory, budget))
        roomy = _with(recipe, "offload", cpu_memory=budget)
        yield Alternative(f"offload.cpu_memory={format_bytes(budget)}", planned(roomy, _as_they_are, profile, larger))


def _with(recipe: Recipe, section: str, **keys: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=keys)})


def _as_they_are(figures: Figures) -> Figures:
    return figures


def _stored_as(dtype: str, figures: Figures) -> Figures:
    return replace(figures, optimizer=figures.optimizer.stored_as(dtype))
