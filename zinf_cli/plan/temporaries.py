"""What compute takes beside buffers and state, at its peak: an upper estimate, from what the survey has counted."""

from __future__ import annotations

from zinf_cli.model_state import DEVICE_BLOCK_NUMEL, DEVICE_LOGITS, FP32_BYTES, ITEM_BYTES
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import MIB, Choice, glue_leaves

WORKSPACE_BYTES = 32 * MIB
"""What each thread that multiplies matrices on an accelerator has of it: cuBLAS's workspace, the largest of torch's
defaults. Threads are those of the micro-batches, the one that computes and that of autograd."""
UPDATE_TEMPORARIES = 5
"""Tensors of an update's block that are there at once while masters are joined and split, and one of the kernel's."""
WHOLE_TEMPORARIES = 20
"""Bytes for each element of a matrix while it is updated whole: its momentum, and what Newton-Schulz makes of it."""
FACTORED_TEMPORARIES = 8
"""The same of a parameter of which factors are kept: its step, and a product on the way to it."""
TEMPORARIES_MORE = 1.5
"""The memory of temporaries, divided by their bytes: malloc does not always put one where the last one was."""


def compute_bytes(figures: Figures, choice: Choice) -> int:
    """Bytes of compute at its peak, on the compute device: one unit of one micro-batch, and the glue between units."""
    model = figures.model
    leaves = glue_leaves(figures, choice)
    waiting = max(model.live_bytes, *(unit.call_bytes for unit in model.units), 0) + (0 if leaves else model.glue_bytes)
    workspaces = 0
    if choice.compute_tier == "device":
        workspaces = WORKSPACE_BYTES * (choice.per_sweep + 2)
        if choice.update != "deferred":  # beside compute, so in memory of its own
            workspaces += UPDATE_TEMPORARIES * DEVICE_BLOCK_NUMEL * FP32_BYTES
    return _temporaries(figures, choice) + waiting * choice.per_sweep + workspaces


def _temporaries(figures: Figures, choice: Choice) -> int:
    """Those of the one visit, or of the one update, that takes most.

    On a CPU, blocks that malloc maps by themselves take what they are, since there are no gaps between them.
    """
    model = figures.model
    on_cpu = choice.compute_tier == "cpu"

    def more(num_bytes: int, apart: int) -> int:
        exact = apart if on_cpu else 0
        return int((num_bytes - exact) * TEMPORARIES_MORE) + exact

    before = max((unit.before_bytes for unit in model.units), default=0) if glue_leaves(figures, choice) else 0
    updated = max((unit.largest_trained_numel for unit in model.units if unit.whole_numel), default=0)
    found = [more(updated * (FACTORED_TEMPORARIES if figures.optimizer.factored else WHOLE_TEMPORARIES), 0)]
    for number, unit in enumerate(model.units):
        joined = choice.per_sweep if number != model.turn else 1  # none at the turn
        found.append(more(unit.inside_bytes(joined) + before, unit.apart_bytes(unit.calls)))
    if model.turn is not None:
        unit = model.units[model.turn]
        logits = 2 * DEVICE_LOGITS * ITEM_BYTES[figures.dtype] if model.loss_in_chunks and not on_cpu else 0
        found.append(more(unit.turn_bytes + model.loss_bytes + logits, unit.apart_bytes(1)))
    return max(found)
