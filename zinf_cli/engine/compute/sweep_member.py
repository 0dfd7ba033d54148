"""One micro-batch in a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from zinf_cli.engine.compute.keep import Keeper
from zinf_cli.engine.compute.leaks import check_between, check_call
from zinf_cli.engine.compute.micro_batch import Finished, MicroBatchThread, UnitCall
from zinf_cli.engine.compute.record import RngState
from zinf_cli.engine.compute.tape import Tape
from zinf_cli.engine.units.constant_weights import constant
from zinf_cli.engine.units.store import Unit
from zinf_cli.trace import Trace


@dataclass(frozen=True)
class MicroBatch:
    """One forward of the model. `forward()` returns the mean loss (scalar); its gradient is scaled by `weight`."""

    forward: Callable[[], torch.Tensor]
    weight: float = 1.0
    seed: int = 0
    """Seed of its random numbers (dropout)."""


class SweepMember:
    """One micro-batch in a sweep: its thread, its tape, its random state."""

    def __init__(self, number: int, device: torch.device, trace: Trace) -> None:
        self.thread = MicroBatchThread(number, device)
        self._device = device
        self._trace = trace
        self._rng: RngState | None = None
        self._at_home: Sequence[torch.Tensor] | None = None
        self.batch: MicroBatch
        self.tape: Tape
        self.at: UnitCall | Finished

    def start(
        self, batch: MicroBatch, tape: Tape, *, grad: bool, at_home: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Go to the first unit. With `at_home`, the weights used between units, look for leaks, too (leaks.py)."""
        self.batch, self.tape, self._at_home = batch, tape, at_home
        torch.manual_seed(batch.seed)
        within = tape.glue.packing() if grad and tape.glue is not None else None
        self._goes_on(self.thread.start(batch.forward, grad=grad, within=within))
        self._rng = RngState(self._device)

    def pass_unit(self, unit: Unit, *, hot: bool = False, keeper: Keeper | None = None) -> None:
        """Compute the unit that the micro-batch calls, and let it go on to the next."""
        assert isinstance(self.at, UnitCall)
        assert self._rng is not None
        self._rng.restore()
        num_records = len(self.tape.records)
        seen = self._at_home is not None  # a leak shows in the graph
        watch = constant(unit.layout, unit.params) if seen or self.tape.compares else nullcontext()
        with watch, self._trace.span("compute", f"{unit.name} forward"):
            outputs = self.tape.forward(self.at, unit.name, hot=hot or (seen and keeper is None), keeper=keeper)
        if self._at_home is not None and len(self.tape.records) > num_records:
            check_call(self.tape.records[-1], [*unit.params, *self._at_home])
            if not hot and keeper is None:
                self.tape.cool(unit.name)
        with self._trace.span("glue", f"after {unit.name}"):
            self._goes_on(self.thread.resume(outputs))
        self._rng = RngState(self._device)

    def _goes_on(self, to: UnitCall | Finished) -> None:
        self.at = to
        if isinstance(to, UnitCall):
            self.tape.send_glue(to.unit)
        else:  # the next micro-batch goes on with them, as in plain PyTorch
            for variable, value in to.variables.items():
                variable.set(value)

    @property
    def called(self) -> int | None:
        """The unit that the micro-batch waits for; None if its forward has ended."""
        return self.at.unit if isinstance(self.at, UnitCall) else None

    @property
    def experts(self) -> Sequence[int]:
        """The experts of the present layer that its tokens are routed to, as far as that is known."""
        return self.thread.experts

    @property
    def recorded(self) -> int | None:
        """The unit of the newest record, whose backward is next; None if there is no record."""
        return self.tape.records[-1].call.unit if self.tape.records else None

    @property
    def units(self) -> list[int]:
        """The units of all records, oldest first."""
        return [record.call.unit for record in self.tape.records]

    def backward(self) -> None:
        """Run backward of the newest record."""
        self.tape.backward(self.tape.records[-1])

    def abandon(self) -> None:
        self.thread.abandon()
        self.tape.close()

    @property
    def loss(self) -> torch.Tensor:
        """The loss that the forward returned."""
        assert isinstance(self.at, Finished)
        return self.at.loss

    def take_loss(self) -> torch.Tensor:
        """Run backward from the loss through the glue after the last unit. Returns the loss, detached."""
        loss = self.loss
        if self._at_home is not None:
            glue = [glue.edge.node for record in self.tape.records for glue in record.glue_inputs()]
            check_between([loss.grad_fn, *glue], self._at_home)
        self.at = Finished(loss.detach())
        with self._trace.span("glue", "loss backward"):
            self.tape.loss_backward(loss)
        return loss.detach()


def all_finished(members: list[SweepMember]) -> bool:
    return all(isinstance(member.at, Finished) for member in members)


def prefetch(members: list[SweepMember]) -> None:
    """Start to bring back what the next records need, in their order, as far as there is room."""
    most = max(len(member.tape.records) for member in members)
    this_unit = [member for member in members if len(member.tape.records) == most]
    next_unit = [member for member in members if len(member.tape.records) < most]
    for member in this_unit + next_unit:
        if not member.tape.prefetch():
            return
