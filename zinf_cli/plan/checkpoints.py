"""The checkpoints of a run: how large they are, how many are to come, and the drive that takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zinf_cli.checkpoint.folder import FOLDER, checkpoints_of, checkpoints_to_resume, steps_done
from zinf_cli.machine.hardware import drive_space
from zinf_cli.model_state import bytes_of
from zinf_cli.plan.layout import Figures, UnitFigures
from zinf_cli.recipe.recipe import Recipe


@dataclass(frozen=True)
class CheckpointDrive:
    """The drive that checkpoints go to, and what it shares with the NVMe tier."""

    folder: str
    free_bytes: int
    shared: float
    """The share of the tier's bytes that lies on the same file system: 0 to 1."""
    to_come: int
    """How many more checkpoints there will be at once than there are now."""

    @property
    def takes_updates(self) -> bool:
        """Whether updates can write into a checkpoint instead of the tier (engine/traffic/destination.py)."""
        return self.shared == 1

    def left(self, nvme_bytes: int) -> int:
        """Free bytes for checkpoints, when the NVMe tier has taken `nvme_bytes` evenly from its folders."""
        return max(0, self.free_bytes - int(nvme_bytes * self.shared))


def checkpoint_drive(recipe: Recipe, nvme_folders: Sequence[Path], max_steps: int) -> CheckpointDrive | None:
    """The drive that a run of `max_steps` steps writes checkpoints to; None where it writes none.

    PreflightError where the folder can't hold any.
    """
    to_come = checkpoints_to_come(recipe, max_steps)
    if not to_come:
        return None
    space = drive_space(recipe.output_dir / FOLDER, "output_dir")
    shared = sum(drive_space(folder).device == space.device for folder in nvme_folders)
    return CheckpointDrive(space.folder, space.free_bytes, shared / max(1, len(nvme_folders)), to_come)


def stored_bytes(figures: Figures, unit: UnitFigures) -> dict[str, int]:
    """Bytes that a checkpoint holds of a unit, all ranks, by class of state.

    Frozen parameters are a class of their own, "frozen": no update writes them.
    """
    stored = Counter({"frozen": unit.frozen_bytes if figures.optimizer.frozen else 0})
    for kept, dtype, numel in figures.trained(unit):
        for field in (field for field in kept.stored(dtype) if not field.factored):
            own = bytes_of(field.dtype or dtype, numel // figures.world_size)
            stored[figures.optimizer.class_of(field)] += own * figures.world_size
    stored["optimizer"] += unit.factor_bytes
    return stored


def checkpoint_bytes(figures: Figures) -> int:
    """Bytes of one checkpoint, all ranks."""
    return sum(sum(stored_bytes(figures, unit).values()) for unit in figures.model.units)


def checkpoints_to_come(recipe: Recipe, max_steps: int) -> int:
    """How many more checkpoints there will be at once than there are now.

    With keep_latest_k there is one more than those that are kept, since the oldest goes when the newest is whole. The
    newest is whole in the step after; so there are two more where every step has a checkpoint. The best may be older
    than all these.
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
    return max(1, min(written + there, kept + recipe.checkpoint.keep_best + (2 if interval == 1 else 1)) - there)
