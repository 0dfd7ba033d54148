"""The disk space that a run's checkpoints will take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zinf_cli.checkpoint.folder import checkpoints_of, checkpoints_to_resume, steps_done
from zinf_cli.machine.hardware import drive_space
from zinf_cli.plan.layout import Figures
from zinf_cli.recipe.recipe import Recipe


def checkpoint_bytes(figures: Figures) -> int:
    """One checkpoint, all ranks: all that it stores of what is trained, and the rest as the model computes with it."""
    stored = figures.optimizer.stored_bytes_per_param
    return sum(unit.trainable_numel * stored + unit.frozen_bytes for unit in figures.model.units)


def checkpoints_to_come(recipe: Recipe, max_steps: int) -> int:
    """How many more of them there will be at once than there are now.

    With keep_latest_k, one more than those that are kept: the oldest goes when the newest is whole. That is in the step
    after; so two more where each step has a checkpoint.
    """
    interval, kept = recipe.checkpoint.interval, recipe.checkpoint.keep_latest_k
    resumed = checkpoints_to_resume(recipe.output_dir, recipe.checkpoint.resume)
    first = steps_done(resumed[0]) if resumed else 0
    if interval is None or first >= max_steps:
        return 0
    written = -(-max_steps // interval) - first // interval
    if kept is None:
        return written
    there = len(checkpoints_of(recipe.output_dir)) if recipe.checkpoint.resume == "auto" else 0
    return max(1, min(written + there, kept + (2 if interval == 1 else 1)) - there)


def space_left(recipe: Recipe, nvme_folders: Sequence[Path], nvme_bytes: int) -> int:
    """Free bytes for checkpoints, once the NVMe tier has taken `nvme_bytes`, evenly from its folders."""
    space = drive_space(recipe.output_dir, "output_dir")
    shared = sum(drive_space(folder).device == space.device for folder in nvme_folders)
    return space.free_bytes - nvme_bytes * shared // max(1, len(nvme_folders))
