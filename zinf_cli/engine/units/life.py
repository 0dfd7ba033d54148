"""A unit's life in a step: what has become of its gradient and of its update.

A trained unit goes round once a step. Other files call the transitions; they set no field themselves.

    CLEAN ─► ACCUMULATING ─► REDUCING ─► DUE ─► UPDATING ─► CLEAN        deferred and eager updates
                                         DUE ─► SPECULATING ─► UNDECIDED  speculative ones (eager.py):
                                                UNDECIDED ─► CLEAN          the update holds
                                                UNDECIDED ─► DUE            it does not, and is made again

Every transition, and where it leads. From any other state it is an error.

    begin_step        CLEAN → CLEAN, ACCUMULATING → CLEAN, DUE → DUE, UPDATING → UPDATING
    clear_gradient    CLEAN → CLEAN
    leave_zeros       CLEAN → DUE
    accumulate        CLEAN → ACCUMULATING, ACCUMULATING → ACCUMULATING
    count_backward    ACCUMULATING → ACCUMULATING
    complete          CLEAN → REDUCING, ACCUMULATING → REDUCING
    gradient_reduced  REDUCING → DUE
    start_update      DUE → UPDATING
    speculate         DUE → SPECULATING
    count_update      DUE → DUE, UPDATING → UPDATING
    update_nothing    DUE → DUE, UPDATING → UPDATING
    finish_update     UPDATING → CLEAN, SPECULATING → UNDECIDED
    commit            SPECULATING → UPDATING, UNDECIDED → CLEAN
    roll_back           UNDECIDED → DUE
    resume            CLEAN → CLEAN

One enum is enough, since gradient and update follow each other: the next gradient begins when the update by the last
one is over. Whether the unit is bound is no part of its state: a fetch (fetch.py) binds what is CLEAN or ACCUMULATING.
A unit without trained parameters stays CLEAN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto

from zinf_cli.tiers.tier import Extent


class State(Enum):
    """What has become of a unit's gradient and of its update."""

    CLEAN = auto()
    """The tiers hold the newest parameters. There is no gradient."""
    ACCUMULATING = auto()
    """Some backward visits of the step are over. Their gradient is on its tier, or on its way there."""
    REDUCING = auto()
    """The last backward visit is over. The gradient is on its way to the slices of all ranks."""
    DUE = auto()
    """Every rank has its slice of the gradient. The update has not begun."""
    UPDATING = auto()
    """The update is under way. The unit lies where the update writes, and nobody reads it there yet."""
    SPECULATING = auto()
    """A speculative update is under way. The unit still lies where it lay."""
    UNDECIDED = auto()
    """The speculative update is computed. The gradient norm will tell whether it holds."""


class FlatLife:
    """What transitions change of a flat: where it lies, and which of its parameters are updated how often."""

    def __init__(self, home: Mapping[str, Extent], num_params: int) -> None:
        self.at = dict(home)
        """Where each field lies now: at home, or in a checkpoint that the last update went into (destination.py)."""
        self.proposed: dict[str, Extent] | None = None
        """Where a speculative update puts each field: the flat lies there if the update holds."""
        self.steps = [0] * num_params
        """Updates of each parameter so far."""
        self.touched = [False] * num_params
        """Which of them got a gradient in this step; the others are not updated."""

    def touch(self, place: int) -> None:
        """A backward has computed a gradient of the parameter at `place`."""
        self.touched[place] = True

    def count_update(self, by: int) -> None:
        """Add `by` to the updates of each parameter that got a gradient in this step."""
        self.steps = [step + by * touched for step, touched in zip(self.steps, self.touched, strict=True)]


class Life:
    """The state of a unit, and the transitions."""

    def __init__(self, unit: str, flats: Sequence[FlatLife]) -> None:
        """`flats`: the trained ones."""
        self.state = State.CLEAN
        self.backwards = 0
        """Backward visits of this step whose gradient has been handed to its tier, the last one left out."""
        self.zeros = False
        """Whether the gradient is zeros, which no tier holds."""
        self._unit = unit
        self._flats = flats

    @property
    def update_due(self) -> bool:
        """Whether the next visit has to make the update."""
        return self.state is State.DUE

    @property
    def undecided(self) -> bool:
        """Whether it has a speculative update that may or may not hold."""
        return self.state in (State.SPECULATING, State.UNDECIDED)

    def readable(self, backwards: int) -> bool:
        """Whether the tiers hold what a visit reads: the parameters, and the gradient of `backwards` visits.

        Where the update is due, the visit makes it, and reads what that needs. A unit without trained parameters has no
        gradient.
        """
        if self.state in (State.CLEAN, State.ACCUMULATING):
            return self.backwards >= backwards or not self._flats
        return self.update_due

    @property
    def touched(self) -> list[bool]:
        """Of every trained parameter, whether it got a gradient in this step."""
        return [touched for flat in self._flats for touched in flat.touched]

    def begin_step(self) -> None:
        """A step begins. The gradient that an abandoned step left is dropped."""
        self._go(
            {
                State.CLEAN: State.CLEAN,
                State.ACCUMULATING: State.CLEAN,
                State.DUE: State.DUE,
                State.UPDATING: State.UPDATING,
            }
        )
        self.backwards = 0

    def clear_gradient(self) -> None:
        """The first backward visit of the step begins."""
        self._go({State.CLEAN: State.CLEAN})
        self._set_touched([False] * len(self.touched))

    def accumulate(self) -> None:
        """A backward visit is over, and another one follows in this step."""
        self._go({State.CLEAN: State.ACCUMULATING, State.ACCUMULATING: State.ACCUMULATING})

    def count_backward(self) -> None:
        """The gradient of such a visit has been added, and handed to its tier."""
        self._go({State.ACCUMULATING: State.ACCUMULATING})
        self.backwards += 1

    def complete(self) -> None:
        """The last backward visit of the step is over."""
        self._go({State.CLEAN: State.REDUCING, State.ACCUMULATING: State.REDUCING})

    def leave_zeros(self) -> None:
        """No backward visit of the step has come. The gradient of every parameter is zeros, which lie nowhere."""
        self._go({State.CLEAN: State.DUE})
        self._set_touched([True] * len(self.touched))
        self.zeros = True

    def gradient_reduced(self, touched: Sequence[bool]) -> None:
        """Every rank has its slice. `touched`: of every trained parameter, whether any rank computed a gradient."""
        self._go({State.REDUCING: State.DUE})
        self.backwards = 0
        self.zeros = False
        self._set_touched(touched)

    def start_update(self, into: Sequence[dict[str, Extent]]) -> None:
        """The update begins. From now on the trained flats lie in `into`, each field in an extent."""
        self._go({State.DUE: State.UPDATING})
        for flat, places in zip(self._flats, into, strict=True):
            flat.at = places

    def speculate(self, into: Sequence[dict[str, Extent]]) -> None:
        """An update begins that may not hold. If it does, the trained flats will lie in `into`."""
        self._go({State.DUE: State.SPECULATING})
        for flat, places in zip(self._flats, into, strict=True):
            flat.proposed = places
            flat.count_update(1)

    def count_update(self) -> None:
        """The settings of the update are known. Every parameter that got a gradient has one update more."""
        self._go({State.DUE: State.DUE, State.UPDATING: State.UPDATING})
        for flat in self._flats:
            flat.count_update(1)

    def update_nothing(self) -> None:
        """The gradient is not finite: the update changes no parameter."""
        self._go({State.DUE: State.DUE, State.UPDATING: State.UPDATING})
        self._set_touched([False] * len(self.touched))

    def finish_update(self) -> None:
        """The update is computed, and its writes have been handed to the tiers."""
        self._go({State.UPDATING: State.CLEAN, State.SPECULATING: State.UNDECIDED})

    def commit(self) -> None:
        """The speculative update holds."""
        self._go({State.SPECULATING: State.UPDATING, State.UNDECIDED: State.CLEAN})
        for flat in self._flats:
            assert flat.proposed is not None
            flat.at, flat.proposed = flat.proposed, None

    def roll_back(self) -> None:
        """The speculative update does not hold. It is due again, from where the unit lies."""
        self._go({State.UNDECIDED: State.DUE})
        for flat in self._flats:
            flat.proposed = None
            flat.count_update(-1)

    def resume(self, steps: Sequence[int]) -> None:
        """The unit comes from a checkpoint. `steps`: of every trained parameter, how often it has been updated."""
        self._go({State.CLEAN: State.CLEAN})
        given = iter(steps)
        for flat in self._flats:
            flat.steps = [next(given) for _ in flat.steps]

    def _set_touched(self, touched: Sequence[bool]) -> None:
        given = iter(touched)
        for flat in self._flats:
            flat.touched = [next(given) for _ in flat.touched]

    def _go(self, leads: Mapping[State, State]) -> None:
        """Move to the state that the present one leads to. AssertionError where it leads nowhere."""
        if self.state not in leads:
            allowed = " or ".join(dict.fromkeys(state.name for state in leads.values()))
            raise AssertionError(f"{self._unit} can't go from {self.state.name} to {allowed}")
        self.state = leads[self.state]
