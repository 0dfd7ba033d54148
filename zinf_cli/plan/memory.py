"""Bytes per rank, by tier and by what they are for.

Model states are exact: they follow from the unit layout. Working memory is an upper estimate, from what the survey's
forward showed. What a process takes before it trains is measured where the figures are found (train/figures.py).
CHURN_BYTES and the like were measured on Linux with torch 2.13.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from zinf_cli.model_state import (
    CHUNK_NUMEL,
    DEVICE_CHUNK_NUMEL,
    FP32_BYTES,
    GRAD,
    PAGE,
    PIECE,
    SLICE_MULTIPLE,
    STATES,
    round_up,
)
from zinf_cli.plan.layout import Figures, UnitFigures

MIB = 2**20
CHURN_BYTES = 50 * MIB
"""What malloc and the libraries of matrix multiplication hold beside what is in use, since temporaries of many sizes
come and go."""
LANE_BYTES = 11 * MIB
"""What each micro-batch of a sweep adds to CHURN_BYTES: each has a thread of its own."""
LAUNCHER_BYTES = 122 * MIB
"""Per host: the launcher, and what torchrun's agent and the guards do not share with the ranks."""
KEPT_MORE = 1.2
"""The memory of kept activations, divided by their bytes. They are many tensors, with gaps between them."""
LEAST_PART = 1 << 16
"""Elements of the smallest part that any model is cut into; a row of a matrix may have more."""
CLASSES = (*STATES, "activations")
NAMES = {
    "params": "parameters",
    "grads": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "second": "shadows for updates",
    "tmpfs": "drives in memory (tmpfs)",
    "cached": "state of cached units",
    "staying": "activations of parts that stay",
    "buffers": "buffers",
    "compute": "compute, at its peak",
    "framework": "Python and torch",
    "device": "what lies on the device",
    "context": "context",
    "staging": "staging",
    "matrix": "largest matrix",
    "update_buffers": "update buffers",
}
"""What bytes are for, in words for the user: in plans, estimates and errors."""
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
        return Working(
            slots,
            self.least_slot_bytes,
            self.resident_bytes,
            self.chunk_numel,
            self.num_chunks - fewer,
            staging,
            self.least_staging_bytes,
            self.least_chunk_bytes,
        )


@dataclass(frozen=True)
class Choice:
    """One placement to be judged: the tier of each class, and the micro-batches of a sweep."""

    placement: Mapping[str, str]
    per_sweep: int
    compute_tier: str
    """The tier whose memory the compute device uses: "cpu" on a CPU, "device" on an accelerator."""
    kept: frozenset[int] = frozenset()
    """Units whose activations are kept. The other units are recomputed in the backward pass."""
    update: str = "deferred"
    """When units are updated. deferred: in the next forward, when the gradient norm is known. eager: in backward, where
    nothing depends on the norm. speculative: in backward, into shadows, as long as no gradient was clipped lately."""
    cacheable: frozenset[str] = frozenset()
    """Classes that may lie on `cache_tier` for cached units, while they lie on a slower tier for the others."""
    cached: frozenset[int] = frozenset()
    """The cached units."""
    staying: frozenset[int] = frozenset()
    """Parts of a cut model that leave their activations in memory of the compute device, whatever the tier is."""

    @property
    def cache_tier(self) -> str:
        """Where cached units have the cacheable classes: in CPU memory if the others have some on NVMe, or else on the
        device."""
        drives = any(self.placement[state] == "nvme" for state in self.cacheable)
        return "device" if self.compute_tier == "device" and not drives else "cpu"

    @property
    def cached_states(self) -> frozenset[str]:
        """The classes that lie there where a unit is cached, and on a slower tier elsewhere. On the device that is all
        that is not there anyway, or none: what updates change lies there as a whole."""
        slower = {"cpu": ("nvme",), "device": ("cpu", "nvme")}[self.cache_tier]
        states = frozenset(state for state in self.cacheable if self.placement[state] in slower)
        away = {state for state in STATES if self.placement[state] != "device"}
        return states if self.cache_tier == "cpu" or states == away else frozenset()

    def tier(self, state: str, unit: int) -> str:
        """The tier of class `state` of a unit."""
        return self.cache_tier if unit in self.cached and state in self.cached_states else self.placement[state]

    def update_of(self, unit: int) -> str:
        """When a unit is updated. A cached one never speculatively: no drive or link is to be kept busy."""
        return "deferred" if self.update == "speculative" and unit in self.cached else self.update

    def in_place(self, state: str, unit: int | None = None) -> bool:
        """Whether the compute device uses the state of this class where it lies, without a copy: of a unit, or of those
        that are not cached."""
        tier = self.placement[state] if unit is None else self.tier(state, unit)
        return tier in (self.compute_tier, "device")


def state_bytes(figures: Figures, choice: Choice) -> dict[str, int]:
    """Bytes of each class on one rank. Only those of activations are an estimate."""
    return {
        **_model_states(figures.model.units, figures),
        "activations": choice.per_sweep * activation_bytes(figures, choice),
    }


def shadow_bytes(figures: Figures, choice: Choice) -> dict[str, int]:
    """Bytes of the shadows of speculative updates on one rank, by tier: they lie where the state itself does."""
    changed = [
        replace(unit, frozen_numel=0, frozen_bytes=0)
        for number, unit in enumerate(figures.model.units)
        if choice.update_of(number) == "speculative"
    ]
    states, shadows = _model_states(changed, figures), dict[str, int]()
    for state in ("params", "optimizer"):
        tier = choice.placement[state]
        shadows[tier] = shadows.get(tier, 0) + states[state]
    return shadows


def cached_bytes(figures: Figures, choice: Choice) -> dict[str, int]:
    """The part of `state_bytes` that lies on a faster tier because its unit is cached, by class."""
    states = _model_states([figures.model.units[number] for number in choice.cached], figures)
    return {state: states[state] for state in STATES if state in choice.cached_states}


def _model_states(units: Sequence[UnitFigures], figures: Figures) -> dict[str, int]:
    """Bytes of the model states of `units` on one rank, by class."""
    params = sum(map(figures.param_bytes, units), Counter[str]())
    return {
        "params": params["params"] // figures.world_size,
        "grads": sum(unit.trainable_numel for unit in units) // figures.world_size * GRAD.item_bytes,
        "optimizer": (params["optimizer"] + sum(map(figures.moments_bytes, units))) // figures.world_size,
    }


def host_bytes(ranks: int, shared_bytes: int) -> int:
    """Bytes of CPU memory of the launcher's processes on a host, less what its ranks share.

    Each of its `ranks` counts `shared_bytes` as its own, but a host has them once.
    """
    return LAUNCHER_BYTES - (ranks - 1) * shared_bytes


def churn_bytes(per_sweep: int) -> int:
    """CPU memory that a rank holds beside what is in use, with `per_sweep` micro-batches in a sweep."""
    return CHURN_BYTES + per_sweep * LANE_BYTES


def framework_bytes(figures: Figures, choice: Choice) -> int:
    """CPU memory that a rank takes beside the model and its states."""
    return figures.machine.process_bytes + churn_bytes(choice.per_sweep)


def activations_left(figures: Figures, choice: Choice) -> Iterator[tuple[int, int]]:
    """Of each unit, the bytes per micro-batch that are left for backward: by its calls, and by the code before them.

    Calls leave their inputs or, if they are kept, all activations. The last unit, where a sweep turns, leaves nothing.
    The code before counts if what it saves goes to the tier of activations.
    """
    leaves = glue_leaves(figures, choice)
    for number, unit in enumerate(figures.model.units):
        if number == figures.model.turn:
            own = 0
        elif number in choice.kept:
            own = int(unit.saved_bytes * (KEPT_MORE if choice.in_place("activations") else 1))
        else:
            own = unit.input_bytes
        yield own, unit.sent_bytes if leaves else 0


def activation_bytes(figures: Figures, choice: Choice) -> int:
    """Bytes per micro-batch on the tier of activations."""
    left = enumerate(activations_left(figures, choice))
    return sum(own + before for number, (own, before) in left if number not in choice.staying)


def staying_bytes(figures: Figures, choice: Choice) -> int:
    """Bytes of activations that stay in memory of the compute device, though that is not their tier."""
    left = list(activations_left(figures, choice))
    return int(choice.per_sweep * sum(sum(left[number]) for number in choice.staying) * KEPT_MORE)


def activations_moved(figures: Figures, choice: Choice) -> Iterator[tuple[int, int]]:
    """Of each unit, the bytes per micro-batch that go to the tier of activations, and those that come back.

    Each call's backward brings its inputs back. That of the code before it brings back what this has saved, also if
    earlier code had saved that, too.
    """
    model = figures.model
    for number, (own, before) in enumerate(activations_left(figures, choice)):
        unit = model.units[number]
        back = own if number in choice.kept or number == model.turn else unit.taken_bytes
        again = unit.again_bytes if before else 0
        yield (0, 0) if number in choice.staying else (own + before, back + before + again)


def glue_leaves(figures: Figures, choice: Choice) -> bool:
    """Whether what is saved between units goes to the tier of activations. Between parts of a block it is a lot."""
    return figures.model.most is not None and not choice.in_place("activations")


def sweeps_share(unit: UnitFigures, figures: Figures, choice: Choice) -> float:
    """The share of sweeps that visit a unit: 1, but for experts, which are visited if a token of any rank reaches
    them."""
    return 1 - (1 - unit.reached) ** (choice.per_sweep * figures.world_size)


def block_bytes(number: int, figures: Figures, choice: Choice, sweeps: int) -> int:
    """Bytes of the largest block that a visit of a unit takes: parameters, gradient, and the gradient it adds to.

    One rank adds to its gradient where that lies. So a step that begins again with one micro-batch a sweep has room.
    """
    unit, alone = figures.model.units[number], figures.world_size == 1
    params = figures.param_bytes(unit) - Counter({"params": unit.packed_bytes})
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
    chunk_numel, num_chunks, least_chunk_bytes = _chunks(figures, choice)
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
    )


def _visits(figures: Figures) -> list[int]:
    """The units that a sweep visits: forward, and backward without the one where it turns."""
    model = figures.model
    turns = model.learned[-1:] == model.order[-1:]
    return [*model.order, *reversed(model.learned[:-1] if turns else model.learned)]


def _in_a_row(blocks: Sequence[int], count: int) -> int:
    """The most bytes that `count` blocks in a row take."""
    return max((sum(blocks[first : first + count]) for first in range(len(blocks))), default=0)


def _chunks(figures: Figures, choice: Choice) -> tuple[int, int, int]:
    """Elements of a chunk, how many chunk buffers there are, and the bytes that they have at least together.

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
    return chunk_numel, max(8 * fields, least_chunks, -(-together // (chunk_numel * FP32_BYTES))), together
