"""Deals the micro-batches of a step to sweeps: several to a sweep, or one while they change the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zinf_cli.engine.compute.moving_state import MovingState, named
from zinf_cli.engine.compute.next_unit import Disagreement
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import ModelError


class Dealer:
    """Deals `per_sweep` micro-batches to a sweep, or all for None.

    As long as they change the model's own `state`, it deals one to a sweep.
    """

    def __init__(self, per_sweep: int | None, state: MovingState, ranks: Ranks, notice: Callable[[str], None]) -> None:
        self._per_sweep = per_sweep
        self._state = state
        self._ranks = ranks
        self._notice = notice
        self._moved: set[tuple[str, str]] = set()
        """The places in the model that the last step has changed."""

    def deal(self, batches: Sequence[MicroBatch]) -> list[list[MicroBatch]]:
        size = 1 if self._state.moving else self._per_sweep or len(batches)
        return [list(batches[start : start + size]) for start in range(0, len(batches), size)]

    def until_agreed(self, run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Call `run`, which deals and sweeps, and return its losses. After a Disagreement, call it again."""
        while True:
            known = len(self._state.moving)
            try:
                return run()
            except Disagreement:
                moved = len(self._state.moving) > known
                if moved:
                    self._note_moving()
                if max(self._ranks.all(int(moved))):
                    self._one_on_all_ranks()

    def step_done(self) -> None:
        """A training step has ended. If nothing has moved in it, sweeps may be large again: a state that is made when
        it is first needed moves once. ModelError where a forward changes the model in every step on several ranks."""
        if not self._state.moving:
            return
        self._state.look()
        moved = set(self._state.moved)
        if self._ranks.world_size == 1:
            if not moved:
                self._state.moving.clear()
        elif always := sorted(moved & self._moved):
            raise ModelError(
                f"the model's forward changes {named(always[0])} in every step, on each rank in its own way",
                hint="train it on one rank",
            )
        self._moved = moved

    def step_moved_in_backward(self, *, begins_again: bool) -> None:
        """The first step's backward has changed the model. ModelError if the step can't begin again."""
        if not begins_again:
            raise ModelError(
                f"the model changes its own {self._moving()} in the backward of its first step",
                hint="that can be trained where gradients are clipped and the first step writes no checkpoint",
            )
        self._note_moving()
        self._one_on_all_ranks()

    def _one_on_all_ranks(self) -> None:
        if self._ranks.world_size > 1:  # all of them have to make the same number of sweeps
            self._per_sweep = 1

    def _moving(self) -> str:
        names = [named(place) for place in sorted(self._state.moving)]
        return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")

    def _note_moving(self) -> None:
        self._notice(f"the model's forward changes its own {self._moving()}: one micro-batch per sweep while it does")
