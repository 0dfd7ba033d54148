"""The engine's buffers on one rank: what compute, fetches, updates and activations on their way take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zinf_cli.model_state import (
    CHUNK_NUMEL,
    DEVICE_CHUNK_NUMEL,
    FP32_BYTES,
    GRAD,
    PAGE,
    PIECE,
    SLICE_MULTIPLE,
    round_up,
)
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import Choice, glue_leaves

DEPTH = 2
"""How many typical blocks should fit beside the largest one."""


@dataclass(frozen=True)
class Working:
    """Buffers of the engine on one rank, in bytes (chunk_numel in elements). `working_buffers` says what for."""

    slot_bytes: int
    least_slot_bytes: int
    """The least slots that a run needs."""
    resident_bytes: int
    chunk_numel: int
    num_chunks: int
    staging_bytes: int
    least_staging_bytes: int
    """The least staging that a run needs."""
    least_chunk_bytes: int = 0
    """What chunk buffers have at least together, since some updates take matrices whole."""
    typical_block_bytes: int = 0
    """What a visit of a typical unit takes of the slots; 0 if all that it uses lies in memory."""
    streamed_fields: int = 0
    """Fields of an update that chunk buffers are for, as many for each."""

    @property
    def total(self) -> int:
        """Bytes of all buffers."""
        return self.slot_bytes + self.resident_bytes + self.num_chunks * self.chunk_bytes + self.staging_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk buffer, which holds a chunk of any field."""
        return self.chunk_numel * FP32_BYTES

    def shrunk(self, num_bytes: int) -> Working:
        """The same with up to `num_bytes` less: first of chunks, then of staging, then of slots.

        What a run needs at least is kept. Only buffers for running ahead are given up. Chunks that are larger than
        CHUNK_NUMEL become smaller, by whole pieces, before there are fewer of them.
        """
        if num_bytes > 0 and self.num_chunks and self.chunk_numel > CHUNK_NUMEL:
            fitting = self.chunk_numel - -(-num_bytes // (self.num_chunks * FP32_BYTES))
            least = -(-self.least_chunk_bytes // (self.num_chunks * FP32_BYTES * CHUNK_NUMEL))
            smaller = replace(self, chunk_numel=max(1, fitting // CHUNK_NUMEL, least) * CHUNK_NUMEL)
            if smaller.chunk_numel < self.chunk_numel:
                return smaller.shrunk(num_bytes - (self.total - smaller.total))
        least_chunks = max(min(self.num_chunks, 8), -(-self.least_chunk_bytes // self.chunk_bytes))
        fewer = min(max(0, -(-num_bytes // self.chunk_bytes)), self.num_chunks - least_chunks)
        num_bytes -= fewer * self.chunk_bytes
        staging = max(self.least_staging_bytes, self.staging_bytes - max(0, num_bytes))
        num_bytes -= self.staging_bytes - staging
        slots = max(self.least_slot_bytes, self.slot_bytes - max(0, num_bytes))
        return replace(self, slot_bytes=slots, num_chunks=self.num_chunks - fewer, staging_bytes=staging)


def block_bytes(number: int, figures: Figures, choice: Choice, sweeps: int) -> int:
    """Bytes of the largest block that a visit of a unit takes: parameters, gradient, and the gradient it adds to.

    One rank adds to its gradient where that lies. So a step that begins again with one micro-batch a sweep has room.
    """
    unit, alone = figures.model.units[number], figures.world_size == 1
    params = figures.param_bytes(unit)
    params["params"] -= unit.packed_bytes
    moved = sum(n for state, n in params.items() if not (alone and choice.in_place(state, number)))
    size, grads_in_place = unit.unpacked_bytes + moved, choice.in_place("grads", number)
    if not (alone and grads_in_place):
        size += unit.trainable_numel * GRAD.item_bytes
    if not alone and (sweeps > 1 or unit.calls > 1) and not grads_in_place:
        size += unit.trainable_numel // figures.world_size * GRAD.item_bytes
    return round_up(size)


def working_buffers(figures: Figures, choice: Choice, sweeps: int) -> Working:
    """The engine's buffers on one rank, for a step of `sweeps` sweeps.

    Slots. A visit takes one *block* of the slot arena for parameters and gradient (`block_bytes`). While one unit is
    computed, the next one is fetched. So the least is the largest block and a typical one, the median, beside it. With
    DEPTH typical ones beside the largest, reads run further ahead of compute. No more is taken than visits in a row
    need: of a model with few units, a typical one may be the largest, which is visited seldom. Loading uses the same
    arena before the first step: a piece of the widest slice has to fit, too.

    Resident. The resident unit is held for the whole step, in an arena of its own. It takes its block twice, since it
    is fetched for the next step before this step releases it.

    Staging. The activations of a call take buffers on their way to their tier or back. Their size is that of the
    largest call, of the code before it, and of what that code shares with earlier code. The least is twice that, since
    one call's activations arrive while another's leave. 8 times that keeps the drive busy.
    """
    units = figures.model.units
    sizes = [(unit, block_bytes(number, figures, choice, sweeps)) for number, unit in enumerate(units)]
    blocks = sorted(size for unit, size in sizes if unit.calls and not unit.resident)
    largest, typical = (blocks[-1], blocks[len(blocks) // 2]) if blocks else (0, 0)
    resident = [size for unit, size in sizes if unit.resident]
    chunk_numel, num_chunks, least_chunk_bytes, fields = _chunks(figures, choice)
    staging = 0
    if not choice.in_place("activations"):
        staging = max(
            unit.saved_bytes // max(1, unit.calls) if number in choice.kept else unit.call_bytes
            for number, unit in enumerate(units)
        )
    if glue_leaves(figures, choice):
        staging += 2 * max(unit.before_bytes for unit in units)
    load = 0
    if not (choice.in_place("params") and choice.in_place("optimizer")):
        load = min(PIECE, max(unit.numel * FP32_BYTES // figures.world_size for unit in units))
    route = [size for unit, size in (sizes[number] for number in _visits(figures)) if not unit.resident]
    least = max(min(largest + typical, _in_a_row(route, 2)), round_up(load))
    return Working(
        slot_bytes=max(least, min(largest + DEPTH * typical, _in_a_row(route + route[:DEPTH], DEPTH + 1))),
        least_slot_bytes=least,
        resident_bytes=2 * sum(resident) + PAGE,
        chunk_numel=chunk_numel,
        num_chunks=num_chunks,
        staging_bytes=8 * staging,
        least_staging_bytes=2 * staging,
        least_chunk_bytes=least_chunk_bytes,
        typical_block_bytes=typical,
        streamed_fields=fields,
    )


def _visits(figures: Figures) -> list[int]:
    """The units that a sweep visits: forward, and backward without the one where it turns."""
    model = figures.model
    turns = model.learned[-1:] == model.order[-1:]
    return [*model.order, *reversed(model.learned[:-1] if turns else model.learned)]


def _in_a_row(blocks: Sequence[int], count: int) -> int:
    """The most bytes that `count` blocks in a row take."""
    return max((sum(blocks[first : first + count]) for first in range(len(blocks))), default=0)


def _chunks(figures: Figures, choice: Choice) -> tuple[int, int, int, int]:
    """Elements of a chunk, how many chunk buffers there are, the bytes that they have at least together, and how many
    fields pass through them beside compute.

    An update streams every field that does not lie in memory of the compute device: the gradient, the optimizer's
    fields, and the master of 16-bit parameters or what makes one of them. A chunk of a field takes one buffer of
    `chunk_numel` elements: a piece, 16 pieces where an accelerator computes, or the widest slice where that is less.
    With 8 buffers a field, reads and writes are under way while a chunk is computed. An eager update does not stream
    the gradient: it is still in the slot arena. The update of a unit that no visit needs (an expert that no token
    reaches) streams its parameters as well. Matrices that are updated whole take the room of all of a unit's at once.
    """
    units = figures.model.units
    widest = max((unit.trainable_numel - unit.whole_numel) // figures.world_size for unit in units)
    most = DEVICE_CHUNK_NUMEL if choice.compute_tier == "device" else CHUNK_NUMEL
    chunk_numel = max(SLICE_MULTIPLE, min(most, widest))
    dtype = figures.dtype if any(unit.master_numel for unit in units) else "F32"
    away = not choice.in_place("optimizer")
    beside, whole = (
        sum(not field.factored for field in figures.optimizer.of(whole=whole).beside(dtype)) * away
        for whole in (False, True)
    )
    gradient, param = (int(not choice.in_place(state)) for state in ("grads", figures.optimizer.param_class))
    least_chunks, fields = beside + gradient + param, beside + gradient * (choice.update != "eager")
    together = (whole + gradient + param) * max(unit.whole_numel for unit in units) * FP32_BYTES
    together += max(unit.factor_bytes for unit in units) * away
    return chunk_numel, max(8 * fields, least_chunks, -(-together // (chunk_numel * FP32_BYTES))), together, fields
