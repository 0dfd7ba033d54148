"""Learning rate by step, with the formulas of transformers' get_scheduler."""

from __future__ import annotations

import math

from zinf_cli.recipe.recipe import LrScheduler, Recipe

_TIMESCALE = 10_000
"""Steps. Of inverse_sqrt without a warmup, as in transformers."""


def learning_rate(recipe: Recipe, step: int, max_steps: int) -> float:
    """The rate of update `step` (from 0) of `max_steps`."""
    scheduler = recipe.lr_scheduler
    if step < scheduler.warmup_steps:
        least = scheduler.min_lr_ratio if scheduler.name == "wsd" else 0.0
        return recipe.optimizer.lr * (least + (1.0 - least) * step / scheduler.warmup_steps)
    return recipe.optimizer.lr * _share(scheduler, step - scheduler.warmup_steps, max_steps - scheduler.warmup_steps)


def _share(scheduler: LrScheduler, step: int, steps: int) -> float:
    """The share of the peak at `step` after the warmup, of `steps` after it."""
    match scheduler.name:
        case "constant":
            return 1.0
        case "inverse_sqrt":
            timescale = scheduler.warmup_steps or _TIMESCALE
            return 1.0 / math.sqrt((step + timescale) / timescale)
        case "linear":
            factor = 1.0 - step / max(1, steps)
        case "cosine":
            factor = _half_wave(step / max(1, steps))
        case "wsd":
            decay = scheduler.decay_steps or max(1, (steps + scheduler.warmup_steps) // 10)
            factor = _half_wave(max(0, step - (steps - decay)) / decay)
    return scheduler.min_lr_ratio + (1.0 - scheduler.min_lr_ratio) * max(0.0, factor)


def _half_wave(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
