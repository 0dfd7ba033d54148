"""Bytes that a step moves to and from the drives, and that a step with a checkpoint writes for it."""

from __future__ import annotations

from zinf_cli.model_state import GRAD
from zinf_cli.plan.checkpoints import CheckpointDrive, stored_bytes
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import CLASSES, Choice, activation_bytes, sent_between


def nvme_traffic(figures: Figures, choice: Choice, sweeps: int, micro_batches: int) -> int:
    """Bytes read and written per step and rank.

    Every visit of a unit reads its parameters. A call takes one visit in forward and one in backward; the last unit's
    takes one in all. Every backward visit writes the gradient, and reads what an earlier one left. A deferred update
    reads the gradient once more.
    """
    model, ranks = figures.model, figures.world_size
    total = 0
    for number, unit in enumerate(model.units):
        if not unit.resident and not unit.calls:
            continue
        away = {state for state in CLASSES if choice.tier(state, number) == "nvme"}
        calls = 1 if unit.resident else sweeps * unit.calls
        turns = calls if unit.resident else sweeps if number == model.turn else 0
        trainable = unit.trainable_numel // ranks
        if "params" in away:
            total += (unit.param_bytes * (2 * calls - turns) + unit.trainable_bytes) // ranks
        if "grads" in away:
            spared = {"deferred": 0, "speculative": 1, "eager": 2}[choice.update_of(number)]
            total += trainable * GRAD.item_bytes * (2 * calls - spared)
        if "optimizer" in away:
            total += 2 * figures.optimizer.num_bytes(unit.trainable_numel, unit.master_numel) // ranks
    if choice.placement["activations"] == "nvme":
        total += 2 * micro_batches * (sum(activation_bytes(figures, choice)) + sent_between(figures, choice))
    return total


def checkpoint_traffic(figures: Figures, choice: Choice, drive: CheckpointDrive) -> int:
    """Bytes, all ranks, that a step with a checkpoint writes to its drive beside those that every step moves.

    Where tier and checkpoint share a drive, what an update writes goes into the checkpoint instead of the tier. All
    else is written as a copy: state in memory or on other drives, and what the step does not update.
    """
    total = 0
    for number, unit in enumerate(figures.model.units):
        updated = drive.takes_updates and (unit.resident or unit.calls > 0)
        for state, num_bytes in stored_bytes(figures.optimizer, unit).items():
            if state == "frozen" or not updated or choice.tier(state, number) != "nvme":
                total += num_bytes
    return total
