"""Bytes per rank, by tier and by what they are for.

Model states are exact: they follow from the unit layout. Working memory is an upper estimate from what the dry
forward on the meta device saw. What a process takes before it trains is measured where the model is described;
CHURN_BYTES and the like were measured (Linux, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from zinf_cli.model_state import CHUNK_NUMEL, FP32_BYTES, GRAD, MASTER, PAGE, PARAM, SLICE_MULTIPLE, STATES, round_up
from zinf_cli.plan.layout import Figures, UnitFigures

MIB = 2**20
CHURN_BYTES = 50 * MIB
"""What malloc and the libraries of matrix multiplication hold beside what is in use, as temporaries of many sizes come
and go."""
LANE_BYTES = 11 * MIB
"""More of it for each micro-batch of a sweep, which has a thread of its own."""
LAUNCHER_BYTES = 122 * MIB
"""The launcher, and what torchrun's agent and the guards do not share with the ranks, per host."""
KEPT_MORE = 1.2
"""Activations that are kept in memory are many tensors, with gaps between them."""
TEMPORARIES_MORE = 1.5
"""So are the temporaries of compute; malloc does not always find the place of the last one for the next."""
CLASSES = (*STATES, "activations")
NAMES = {
    "params": "parameters",
    "grads": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "second": "second places for updates",
    "tmpfs": "drives in memory (tmpfs)",
    "cached": "state of cached units",
    "buffers": "buffers",
    "compute": "compute, at its peak",
    "framework": "Python and torch",
    "context": "context",
    "staging": "staging",
    "matrix": "largest matrix",
    "update_buffers": "update buffers",
}
"""How a user reads what bytes are for, in plans, estimates and errors."""
GOLDEN = 0.618034
"""Multiples of the golden ratio, modulo 1, are spread evenly however many there are."""
DEPTH = 2
"""Visits whose buffers should fit beside the largest one."""


@dataclass(frozen=True)
class Working:
    """Buffers of the engine on one rank, in bytes (chunk_numel in elements)."""

    slot_bytes: int
    least_slot_bytes: int
    resident_bytes: int
    chunk_numel: int
    num_chunks: int
    staging_bytes: int
    least_staging_bytes: int

    @property
    def total(self) -> int:
        return self.slot_bytes + self.resident_bytes + self.num_chunks * self.chunk_bytes + self.staging_bytes

    @property
    def chunk_bytes(self) -> int:
        """Of one chunk buffer, which holds a chunk of any field."""
        return self.chunk_numel * FP32_BYTES

    def shrunk(self, num_bytes: int) -> Working:
        """The same with up to `num_bytes` less of read-ahead, never below what a run needs."""
        least_chunks = min(self.num_chunks, 8)
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
        )


@dataclass(frozen=True)
class Choice:
    """One placement to be judged: the tier of each class, and the micro-batches of a sweep."""

    placement: Mapping[str, str]
    per_sweep: int
    compute_tier: str
    """The tier whose memory the compute device uses: "cpu" on a CPU, "device" on an accelerator."""
    kept: frozenset[int] = frozenset()
    """Units whose activations are kept; those of the others are made again in the backward pass."""
    update: str = "deferred"
    """deferred: in the next forward, when the gradient norm is known. eager: in backward, where none has to be known.
    speculative: in backward, into second places, as long as the norm did not clip the gradient lately."""
    cacheable: frozenset[str] = frozenset()
    """Classes of which single units may lie in CPU memory, though the others lie on NVMe."""
    cached: frozenset[int] = frozenset()
    """The units that do."""

    @property
    def cached_states(self) -> frozenset[str]:
        """The classes that lie in CPU memory where a unit is cached."""
        return frozenset(state for state in self.cacheable if self.placement[state] == "nvme")

    def tier(self, state: str, unit: int) -> str:
        """Of a class of a unit."""
        return "cpu" if unit in self.cached and state in self.cached_states else self.placement[state]

    def update_of(self, unit: int) -> str:
        """When a unit is updated: there is no drive that a cached one could keep busy in backward."""
        return "deferred" if self.update == "speculative" and unit in self.cached else self.update

    def in_place(self, state: str) -> bool:
        tier = self.placement[state]
        return tier in (self.compute_tier, "device") or (tier == "cpu" and self.compute_tier == "cpu")


def state_bytes(figures: Figures, choice: Choice) -> dict[str, int]:
    """Bytes of each class on one rank, exact; "second" is what second places for updates take."""
    units = figures.model.units
    changed = [
        replace(unit, frozen_numel=0, frozen_bytes=0)
        for number, unit in enumerate(units)
        if choice.update_of(number) == "speculative"
    ]
    second = _model_states(changed, figures)
    return {
        **_model_states(units, figures),
        "second": second["params"] + second["optimizer"],
        "activations": choice.per_sweep * (sum(activation_bytes(figures, choice)) + sent_between(figures, choice)),
    }


def cached_bytes(figures: Figures, choice: Choice) -> dict[str, int]:
    """What of `state_bytes` lies in CPU memory because its unit is cached."""
    states = _model_states([figures.model.units[number] for number in choice.cached], figures)
    return {state: states[state] for state in STATES if state in choice.cached_states}


def _model_states(units: Sequence[UnitFigures], figures: Figures) -> dict[str, int]:
    """Of `units`, on one rank."""
    optimizer = figures.optimizer
    return {
        "params": sum(unit.param_bytes for unit in units) // figures.world_size,
        "grads": sum(unit.trainable_numel for unit in units) // figures.world_size * GRAD.item_bytes,
        "optimizer": sum(optimizer.num_bytes(unit.trainable_numel, unit.master_numel) for unit in units)
        // figures.world_size,
    }


def host_bytes(ranks: int, shared_bytes: int) -> int:
    """What the launcher's side takes on a host, less what its ranks share."""
    return LAUNCHER_BYTES - (ranks - 1) * shared_bytes


def churn_bytes(per_sweep: int) -> int:
    """What a rank holds of CPU memory beside what is in use, with so many micro-batches in a sweep."""
    return CHURN_BYTES + per_sweep * LANE_BYTES


def framework_bytes(figures: Figures, choice: Choice) -> int:
    """What a rank takes of CPU memory beside the model and its states."""
    return figures.machine.process_bytes + churn_bytes(choice.per_sweep)


def activation_bytes(figures: Figures, choice: Choice) -> Iterator[int]:
    """What each unit leaves for its backward, per micro-batch: its inputs, or all that autograd saved.

    The last unit turns at once and leaves nothing.
    """
    for number, unit in enumerate(figures.model.units):
        if number != figures.model.turn:
            if number not in choice.kept:
                yield unit.input_bytes
            else:
                yield int(unit.saved_bytes * (KEPT_MORE if choice.in_place("activations") else 1))


def sent_between(figures: Figures, choice: Choice) -> int:
    """What is saved between units and leaves the compute device's memory, per micro-batch."""
    return figures.model.glue_bytes if glue_leaves(figures, choice) else 0


def glue_leaves(figures: Figures, choice: Choice) -> bool:
    """Whether what is saved between units goes to the tier of activations: between parts of a block it is a lot."""
    return figures.model.most is not None and not choice.in_place("activations")


def keepable(figures: Figures, choice: Choice, room: int) -> frozenset[int]:
    """The units to keep in `room` bytes more: those that spare the most compute for a byte come first."""
    kept = []
    model = figures.model
    costs = {
        number: max(1, choice.per_sweep * (int(unit.saved_bytes * KEPT_MORE) - unit.input_bytes))
        for number, unit in enumerate(model.units)
        if number in model.order and number != model.turn
    }
    for number in sorted(costs, key=lambda number: costs[number] / max(1, model.units[number].numel)):
        if costs[number] <= room:
            kept.append(number)
            room -= costs[number]
    return frozenset(kept)


def cacheable(figures: Figures, choice: Choice, room: int) -> frozenset[int]:
    """The units to cache in `room` bytes, spread over the sweep: while one is computed, the drive brings others."""
    cached = []
    for number in sorted(range(len(figures.model.units)), key=lambda number: number * GOLDEN % 1):
        cost = sum(cached_bytes(figures, replace(choice, cached=frozenset([number]))).values())
        if 0 < cost <= room and figures.model.units[number].calls:
            cached.append(number)
            room -= cost
    return frozenset(cached)


def block_bytes(unit: UnitFigures, figures: Figures, choice: Choice, sweeps: int) -> int:
    """The largest buffer one visit of `unit` takes: parameters, gradient, and the gradient it adds to."""
    alone = figures.world_size == 1
    size = 0 if alone and choice.in_place("params") else unit.param_bytes
    again = sweeps > 1 or unit.calls > 1
    if not (alone and choice.in_place("grads")) or again:
        size += unit.trainable_numel * GRAD.item_bytes
    if again and not choice.in_place("grads"):
        size += unit.trainable_numel // figures.world_size * GRAD.item_bytes
    return round_up(size)


def working_buffers(figures: Figures, choice: Choice, sweeps: int) -> Working:
    """The engine's buffers on one rank, for a step of `sweeps` sweeps.

    Slots. A visit takes one *block* of the slot arena: `block_bytes`, parameters and gradient together. While one unit
    is computed the next one is fetched, so at any time the largest block and one beside it have to fit: of these the
    least is the largest and a typical (the median) one. DEPTH typical ones beside the largest let reads run further
    ahead of compute. Before the first step loading passes one slice of one flat through the same arena, in fp32 where
    it becomes a master; that has to fit too.

    Resident. The resident unit is held for the whole step, in an arena of its own. It is there twice, since the next
    step fetches it while this step's is not yet released.

    Chunks. An update streams what does not lie in memory of the compute device: the gradient, and the optimizer's
    fields with the master where parameters are 16-bit. Each takes one buffer of `chunk_numel` elements (a piece, or no
    more than the widest slice) at a time; with 8 of each, reads and writes are under way while one is computed.

    Staging. Activations on their way to their tier or back take buffers: those of the largest call, of the code before
    it, and of what that shares with earlier code. Twice that is the least (one arrives, one leaves); 8 times keeps the
    drive busy.
    """
    units = figures.model.units
    blocks = sorted(block_bytes(unit, figures, choice, sweeps) for unit in units if unit.calls and not unit.resident)
    largest, typical = (blocks[-1], blocks[len(blocks) // 2]) if blocks else (0, 0)
    resident = [block_bytes(unit, figures, choice, sweeps) for unit in units if unit.resident]
    widest = max(unit.trainable_numel // figures.world_size for unit in units)
    chunk_numel = max(SLICE_MULTIPLE, min(CHUNK_NUMEL, widest))
    narrow = figures.precision != "fp32"
    away = {"grads": 1, "optimizer": len(figures.optimizer.beside(narrow=narrow))}
    if choice.update == "eager":  # with the gradient as compute left it
        del away["grads"]
    fields = sum(count for state, count in away.items() if not choice.in_place(state))
    staging = 0
    if not choice.in_place("activations"):
        staging = max(
            unit.saved_bytes // max(1, unit.calls) if number in choice.kept else unit.call_bytes
            for number, unit in enumerate(units)
        )
    if glue_leaves(figures, choice):
        staging += 2 * max(unit.before_bytes for unit in units)
    # loading writes one slice of one flat through the slots
    loaded = (PARAM, MASTER) if narrow else (PARAM,)
    away_from_compute = not all(choice.in_place(field.state) for field in loaded)
    load = max(unit.numel * FP32_BYTES // figures.world_size for unit in units) if away_from_compute else 0
    least = max(largest + typical, round_up(load))
    return Working(
        slot_bytes=max(least, largest + DEPTH * typical),
        least_slot_bytes=least,
        resident_bytes=2 * sum(resident) + PAGE,
        chunk_numel=chunk_numel,
        num_chunks=8 * fields,
        staging_bytes=8 * staging,
        least_staging_bytes=2 * staging,
    )


def compute_bytes(figures: Figures, choice: Choice) -> int:
    """What the compute itself needs at its peak, on the compute device: one unit of one micro-batch, and the glue."""
    model, grad = figures.model, GRAD.item_bytes
    inside = max(
        (u.saved_bytes // max(1, u.calls) + 2 * u.output_bytes + grad * u.largest_param_numel for u in model.units),
        default=0,
    )
    last = None if model.turn is None else model.units[model.turn]
    turn = 0
    if last is not None:
        turn = last.saved_bytes + 3 * last.output_bytes + model.loss_bytes + grad * last.largest_param_numel
    waiting = max(model.live_bytes, *(unit.call_bytes for unit in model.units), 0)
    if glue_leaves(figures, choice):
        inside += max((unit.before_bytes for unit in model.units), default=0)
    else:
        waiting += model.glue_bytes
    return int(max(inside, turn) * TEMPORARIES_MORE) + waiting * choice.per_sweep
