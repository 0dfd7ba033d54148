"""The bytes that a step moves to and from drives, and those that a step with a checkpoint writes in addition."""

from __future__ import annotations

from typing import NamedTuple

from zinf_cli.model_state import GRAD, ITEM_BYTES
from zinf_cli.plan.checkpoints import CheckpointDrive, stored_bytes
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import CLASSES, Choice, activations_moved, sweeps_share


class Traffic(NamedTuple):
    """Bytes to and from drives, per step and rank."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def nvme_traffic(figures: Figures, choice: Choice, sweeps: int, micro_batches: int) -> Traffic:
    """What a step moves.

    A call of a unit takes one visit in forward and, if it has a backward, one there; a call of the last unit takes one
    for both. Every visit reads the unit's parameters. Every backward visit writes the gradient, and reads the one that
    an earlier visit left. A deferred update reads the gradient once more. The gradient of a single micro-batch may be
    16-bit.

    Only a share of the sweeps visits an expert. If none does, its gradient is zeros, which nothing writes or reads. The
    update reads parameters by itself if no visit brings them.
    """
    model, ranks = figures.model, figures.world_size
    read = written = 0.0
    for number, unit in enumerate(model.units):
        if not unit.resident and not unit.calls:
            continue
        away = {state for state in CLASSES if choice.tier(state, number) == "nvme"}
        share = sweeps_share(unit, figures, choice)
        calls = 1 if unit.resident else sweeps * unit.calls * share
        back = 0 if unit.resident else sweeps * unit.learned * share
        turns = sweeps if number == model.turn else 0
        update = choice.update_of(number)  # in backward, it follows a visit of the last sweep
        due = 1.0 if update == "deferred" else 1 - share  # in the next forward
        alone = due * (1 - share) if unit.trainable_numel else 0
        params = figures.param_bytes(unit).items()
        held = sum(num_bytes for state, num_bytes in params if state in away)
        read += held * (calls + back - turns + alone) // ranks
        if figures.optimizer.param_class in away:
            written += unit.trainable_bytes // ranks
        if "grads" in away:
            moved = grad_bytes(figures, choice, number, micro_batches) // ranks
            read += moved * (calls - (share if update != "deferred" else 0))
            written += moved * (calls - (share if update == "eager" else 0))
        if "optimizer" in away:
            read += figures.moments[number] // ranks
            written += figures.moments[number] // ranks
    if choice.placement["activations"] == "nvme":
        sent, brought = zip(*activations_moved(figures, choice), strict=True)
        written += micro_batches * sum(sent)
        read += micro_batches * sum(brought)
    return Traffic(int(read), int(written))


def grad_bytes(figures: Figures, choice: Choice, number: int, micro_batches: int) -> int:
    """Bytes of a unit's gradient as it goes to its tier, the slices of all ranks together.

    Parameters that are computed in 16 bits, once a step, have gradients of as many (engine/traffic/narrow_grads.py).
    Backward adds up those of logits and MLPs that are computed a few tokens at a time.
    """
    model, unit = figures.model, figures.model.units[number]
    once = figures.world_size * micro_batches == 1 and (unit.resident or unit.calls == 1)
    in_chunks = (model.loss_in_chunks and number == model.turn) or (model.tokens_in_chunks and unit.chunkable_numel)
    narrow = unit.master_numel if once and choice.compute_tier == "cpu" and not in_chunks else 0
    spared = GRAD.item_bytes - ITEM_BYTES[figures.dtype]
    return unit.trainable_numel * GRAD.item_bytes - narrow * spared


def experts_reached(figures: Figures, choice: Choice, sweeps: int) -> float | None:
    """The share of experts that some token of a step reaches, if routing is even; None if none is a unit."""
    shares = [sweeps_share(unit, figures, choice) for unit in figures.model.units if unit.reached < 1]
    return sum(1 - (1 - share) ** sweeps for share in shares) / len(shares) if shares else None


def checkpoint_traffic(figures: Figures, choice: Choice, drive: CheckpointDrive) -> int:
    """Bytes that all ranks write to the checkpoint's drive in a step with a checkpoint, beside those of every step.

    If tier and checkpoint share a drive, an update writes into the checkpoint instead of the tier. All other state is
    written as a copy: state in memory or on other drives, and state that the step does not update.
    """
    total = 0
    for number, unit in enumerate(figures.model.units):
        updated = drive.takes_updates and (unit.resident or unit.calls > 0)
        for state, num_bytes in stored_bytes(figures, unit).items():
            if state == "frozen" or not updated or choice.tier(state, number) != "nvme":
                total += num_bytes
    return total
