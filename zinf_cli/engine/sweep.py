"""The layer-major sweep: all micro-batches pass unit k before any passes unit k+1, and back.

A parameter is fetched twice a step, whatever the number of micro-batches. At the last unit of the forward each
micro-batch turns at once: its forward keeps the graph, its loss is taken, its backward runs, before the next
micro-batch does the same. So that unit needs no recompute, and only one micro-batch's logits are alive at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from zinf_cli.engine.activations import Activations
from zinf_cli.engine.micro_batch import Finished, MicroBatchThread, UnitCall
from zinf_cli.engine.pipeline import Pipeline
from zinf_cli.engine.tape import RngState, Tape
from zinf_cli.engine.visit import Kind, Visit
from zinf_cli.trace import Trace


@dataclass(frozen=True)
class MicroBatch:
    """One forward of the model. `forward()` returns the mean loss (scalar); its gradient is scaled by `weight`."""

    forward: Callable[[], torch.Tensor]
    weight: float = 1.0
    seed: int = 0
    """Where its random numbers (dropout) start."""


class Disagreement(Exception):  # noqa: N818 (it is no error: the engine goes on)
    """Two micro-batches call different units next, so they can't share a sweep."""


@dataclass
class Route:
    """The order of units a sweep takes: seen last time, expected next time."""

    forward: list[int]
    backward: list[int] = field(default_factory=list)
    """Without the turn."""


class Lane:
    """One micro-batch in a sweep: its thread, its tape, its random state."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.thread = MicroBatchThread(number, device)
        self._device = device
        self._rng: RngState | None = None
        self.batch: MicroBatch
        self.tape: Tape
        self.at: UnitCall | Finished

    def start(self, batch: MicroBatch, tape: Tape, *, grad: bool) -> None:
        self.batch, self.tape = batch, tape
        self.walked: list[int] = []
        torch.manual_seed(batch.seed)
        self.at = self.thread.start(batch.forward, grad=grad)
        self._rng = RngState(self._device)

    def pass_unit(self, name: str, *, hot: bool = False) -> None:
        """Compute the unit the micro-batch has called, and let it go on to the next."""
        assert isinstance(self.at, UnitCall)
        assert self._rng is not None
        self._rng.restore()
        outputs = self.tape.forward(self.at, name, hot=hot)
        self.at = self.thread.resume(outputs)
        self._rng = RngState(self._device)

    def backward(self, unit: int) -> None:
        """Backward of the newest record, if it is of `unit` (a unit that took no part in the gradient has none)."""
        if self.tape.records and self.tape.records[-1].call.unit == unit:
            self.tape.backward(self.tape.records[-1])
            self.walked.append(unit)

    def give_up(self) -> None:
        self.thread.abandon()
        self.tape.close()

    def take_loss(self) -> torch.Tensor:
        """The loss, backward through the glue behind it."""
        assert isinstance(self.at, Finished)
        loss = self.at.loss
        self.at = Finished(loss.detach())
        scale = torch.full_like(loss, self.batch.weight)
        torch.autograd.backward((loss,), (scale,), retain_graph=True)
        return loss.detach()


class Sweep:
    """Runs sweeps through the pipeline's units, one step after another."""

    def __init__(
        self,
        pipeline: Pipeline,
        activations: Activations,
        device: torch.device,
        order: Sequence[int],
        trace: Trace,
    ) -> None:
        self._pipeline = pipeline
        self._units = pipeline.units
        self._activations = activations
        self._device = device
        self._trace = trace
        self._lanes: list[Lane] = []
        self._trainable = {n for n, unit in enumerate(self._units) if unit.layout.trainable is not None}
        self._resident = next((n for n, unit in enumerate(self._units) if unit.layout.resident), None)
        self._route = Route(list(order), list(reversed(order))[1:])
        self._backwards: Counter[int] = Counter()
        """Backward visits of this step, by unit."""
        self._unfinished: set[int] = set()
        """Units whose gradient of this step lacks its last visit."""

    def announce_step(self, num_sweeps: int) -> None:
        """Tell the pipeline what a training step will visit, if it takes the route of the one before."""
        route = self._route
        backwards: Counter[int] = Counter()
        for sweep in range(num_sweeps):
            self._pipeline.expect(Visit(unit, Kind.FORWARD) for unit in route.forward[:-1])
            self._pipeline.expect(self._back_visits(route, backwards, last=sweep == num_sweeps - 1))
        self._backwards.clear()
        self._unfinished.clear()

    def announce_forward(self, *, update: bool) -> None:
        """The same for the units of the next forward: their updates can be read from now on."""
        first = dict.fromkeys(self._route.forward[:-1])
        self._pipeline.expect(Visit(unit, Kind.FORWARD, update=update and unit in self._trainable) for unit in first)

    def _back_visits(self, route: Route, backwards: Counter[int], *, last: bool) -> Iterator[Visit]:
        back = route.forward[-1:] + route.backward
        left = Counter(back)
        for place, unit in enumerate(back):
            left[unit] -= 1
            kind = Kind.BACKWARD if place else Kind.TURN
            yield Visit(unit, kind, nth=backwards[unit], final=last and not left[unit])
            backwards[unit] += 1

    def evaluate(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Forward only; the losses (fp32 scalars) in order."""
        with self._sweeping(batches, resident_visit=Kind.FORWARD, last=False, grad=False) as lanes:
            while not _finished(lanes):
                self._visit_forward(lanes)
            return [lane.at.loss.detach().float() for lane in lanes if isinstance(lane.at, Finished)]

    def train(
        self, batches: Sequence[MicroBatch], *, last: bool, forward_done: Callable[[], None]
    ) -> list[torch.Tensor]:
        """Forward and backward of `batches`; gradients go to their tiers. The unscaled losses (fp32) in order.

        `last` says that no other sweep of this step follows; `forward_done` is called when every unit of the route
        has done its pending update. Disagreement leaves the step's gradients as they were before the sweep.
        """
        with self._sweeping(batches, resident_visit=Kind.TURN, last=last, grad=True) as lanes:
            taken: list[int] = []
            losses: list[torch.Tensor] = []
            while not losses and not _finished(lanes):
                unit = _agreed_unit(lanes)
                taken.append(unit)
                if taken == self._route.forward:
                    losses = self._turn(lanes, last, forward_done)
                else:
                    self._visit_forward(lanes)
            _check_same_records(lanes)
            back = taken[-1:] if losses else []
            if not losses:
                forward_done()
                losses = [lane.take_loss() for lane in lanes]
            self._backward(lanes, last)
            self._route = Route(taken, back_route(taken, lanes[0].walked, turned=bool(back)))
            return [loss.float() for loss in losses]

    def finish_step(self) -> None:
        """Complete gradients whose last visit was expected and did not come (a layer that was dropped)."""
        for unit in sorted(self._unfinished):
            visit = Visit(unit, Kind.BACKWARD, nth=self._backwards[unit], final=True)
            self._pipeline.acquire(visit)
            self._pipeline.release(visit)
        self._unfinished.clear()

    def close(self) -> None:
        """End the threads."""
        for lane in self._lanes:
            lane.thread.close()
        self._lanes.clear()

    @contextmanager
    def _sweeping(
        self, batches: Sequence[MicroBatch], *, resident_visit: Kind, last: bool, grad: bool
    ) -> Iterator[list[Lane]]:
        """Lanes at their first unit, with the resident unit held; everything is given back at the end."""
        while len(self._lanes) < len(batches):
            self._lanes.append(Lane(len(self._lanes), self._device))
        lanes = self._lanes[: len(batches)]
        held = None
        if self._resident is not None:
            has_grads = resident_visit is Kind.TURN
            nth = self._backwards[self._resident] if has_grads else 0
            held = Visit(self._resident, resident_visit, nth=nth, final=last)
            self._pipeline.acquire_aside(held)
        try:
            for lane, batch in zip(lanes, batches, strict=True):
                tape = Tape(self._device, self._activations, trainable=self._trainable)
                lane.start(batch, tape, grad=grad)
            yield lanes
        except BaseException:
            for lane in lanes:
                lane.give_up()
            self._pipeline.give_up_held()
            raise
        if held is not None:
            self._pipeline.release(held)
            if held.has_grads:
                self._count_backward(held)

    def _visit_forward(self, lanes: list[Lane]) -> None:
        visit = Visit(_agreed_unit(lanes), Kind.FORWARD)
        self._pipeline.acquire(visit)
        self._pass_unit(lanes, visit.unit)
        self._pipeline.release(visit)

    def _pass_unit(self, lanes: list[Lane], unit: int) -> None:
        name = self._units[unit].name
        for lane in lanes:
            with self._trace.span("compute", f"{name} forward"):
                lane.pass_unit(name)
            self._pipeline.advance()

    def _turn(self, lanes: list[Lane], last: bool, forward_done: Callable[[], None]) -> list[torch.Tensor]:
        """Forward, loss and backward of the last unit, one micro-batch after another.

        Empty when the first micro-batch goes on to a further unit: then this was an ordinary forward visit.
        """
        _check_same_records(lanes)
        visit = next(self._back_visits(self._route, self._backwards.copy(), last=last))
        name = self._units[visit.unit].name
        self._pipeline.acquire(visit)
        losses: list[torch.Tensor] = []
        for lane in lanes:
            with self._trace.span("compute", f"{name} forward"):
                lane.pass_unit(name, hot=True)
            if not isinstance(lane.at, Finished):
                if losses:
                    raise Disagreement
                lane.tape.cool()
                self._pass_unit(lanes[1:], visit.unit)
                self._pipeline.give_up(visit)
                return []
            if not losses:
                forward_done()
            with self._trace.span("compute", f"{name} backward"):
                losses.append(lane.take_loss())
                lane.backward(visit.unit)
            self._pipeline.advance()
        self._pipeline.release(visit)
        self._count_backward(visit)
        return losses

    def _backward(self, lanes: list[Lane], last: bool) -> None:
        """The records that are left, in reverse; all micro-batches at each unit."""
        remaining = [record.call.unit for record in lanes[0].tape.records]
        left = Counter(remaining)
        for unit in reversed(remaining):
            left[unit] -= 1
            visit = Visit(unit, Kind.BACKWARD, nth=self._backwards[unit], final=last and not left[unit])
            _prefetch(lanes)
            self._pipeline.acquire(visit)
            for lane in lanes:
                with self._trace.span("compute", f"{self._units[unit].name} backward"):
                    lane.backward(unit)
                _prefetch(lanes)
                self._pipeline.advance()
            self._pipeline.release(visit)
            self._count_backward(visit)

    def _count_backward(self, visit: Visit) -> None:
        if visit.unit in self._trainable:
            self._backwards[visit.unit] += 1
            (self._unfinished.discard if visit.final else self._unfinished.add)(visit.unit)


def back_route(taken: list[int], walked: list[int], *, turned: bool) -> list[int]:
    """The backward visits after the turn that a sweep expects next time."""
    return walked[1:] if turned or walked[:1] == taken[-1:] else walked


def _finished(lanes: list[Lane]) -> bool:
    finished = {isinstance(lane.at, Finished) for lane in lanes}
    if len(finished) > 1:
        raise Disagreement
    return finished.pop()


def _agreed_unit(lanes: list[Lane]) -> int:
    units = {lane.at.unit if isinstance(lane.at, UnitCall) else None for lane in lanes}
    unit = units.pop()
    if units or unit is None:
        raise Disagreement
    return unit


def _check_same_records(lanes: list[Lane]) -> None:
    routes = {tuple(record.call.unit for record in lane.tape.records) for lane in lanes}
    if len(routes) > 1:
        raise Disagreement


def _prefetch(lanes: list[Lane]) -> None:
    """Bring back the inputs of the records that come next, in their order, as far as there is room."""
    most = max(len(lane.tape.records) for lane in lanes)
    this_unit = [lane for lane in lanes if len(lane.tape.records) == most]
    next_unit = [lane for lane in lanes if len(lane.tape.records) < most]
    for lane in this_unit + next_unit:
        if not lane.tape.prefetch():
            return
