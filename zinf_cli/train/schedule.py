"""Learning rate by step, with the formulas of transformers' get_*_schedule_with_warmup."""

from __future__ import annotations

import math

from zinf_cli.recipe.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, max_steps: int) -> float:
    """The rate of update `step` (from 0) of `max_steps`."""
    scheduler = recipe.lr_scheduler
    if step < scheduler.warmup_steps:
        return recipe.optimizer.lr * step / max(1, scheduler.warmup_steps)
    progress = (step - scheduler.warmup_steps) / max(1, max_steps - scheduler.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
    }[scheduler.name]
    return recipe.optimizer.lr * (scheduler.min_lr_ratio + (1.0 - scheduler.min_lr_ratio) * factor)
