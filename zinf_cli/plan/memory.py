"""Bytes per rank, by tier and by what they are for.

Model states are exact: they follow from the unit layout. Working memory is an upper estimate, from what the survey's
forward showed. What a process takes before it trains is measured where the figures are found (train/figures.py).
CHURN_BYTES and the like were measured on Linux with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from zinf_cli.model_state import STATES
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
        **_model_states(range(len(figures.model.units)), figures),
        "activations": choice.per_sweep * activation_bytes(figures, choice),
    }


def shadow_bytes(figures: Figures, choice: Choice) -> dict[str, int]:
    """Bytes of the shadows of speculative updates on one rank, by tier: they lie where the state itself does."""
    units = figures.model.units
    changed = [number for number in range(len(units)) if choice.update_of(number) == "speculative"]
    states, shadows = _model_states(changed, figures), dict[str, int]()
    states["params"] -= sum(units[number].frozen_bytes for number in changed) // figures.world_size
    for state in ("params", "optimizer"):
        tier = choice.placement[state]
        shadows[tier] = shadows.get(tier, 0) + states[state]
    return shadows


def cached_bytes(figures: Figures, choice: Choice) -> dict[str, int]:
    """The part of `state_bytes` that lies on a faster tier because its unit is cached, by class."""
    states, moved = _model_states(choice.cached, figures), choice.cached_states
    return {state: states[state] for state in STATES if state in moved}


def cached_cost(figures: Figures, choice: Choice, number: int) -> int:
    """The same of one unit, if it were cached."""
    return sum(figures.states[number][state] // figures.world_size for state in choice.cached_states)


def _model_states(units: Collection[int], figures: Figures) -> dict[str, int]:
    """Bytes of the model states of `units` on one rank, by class."""
    return {state: sum(figures.states[number][state] for number in units) // figures.world_size for state in STATES}


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
    left = activations_left(figures, choice)
    return staying_cost(choice, sum(sum(own) for number, own in enumerate(left) if number in choice.staying))


def staying_cost(choice: Choice, left: int) -> int:
    """The same of units that leave `left` bytes of activations in each micro-batch."""
    return int(choice.per_sweep * left * KEPT_MORE)


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
