"""The layer-major sweep: all micro-batches pass unit k before any passes unit k+1, and back.

A parameter is fetched twice a step, whatever the number of micro-batches. At the last unit of the forward each
micro-batch turns at once: it runs the unit's forward with its graph, takes the loss and runs the unit's backward. Only
then the next micro-batch does the same. So that unit needs no recompute, and only one micro-batch's logits are alive at
a time.

The route. The order of units is predicted from the last sweep, so that fetches run ahead. A single rank may leave the
prediction at any unit. Several ranks share every fetch, so they must visit the same units in the same order. They
follow the prediction to the turn. There they tell each other whether their micro-batches followed it, too. If one did
not (LayerDrop, say), the step begins again in *lockstep*: before every visit the ranks agree on a unit. A rank whose
micro-batch does not call that unit only takes part in the fetch. A first sweep without a prediction is in lockstep,
too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.keep import GlueKeeper, Keeper
from zinf_cli.engine.compute.micro_batch import Finished
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.next_unit import Disagreement, NextUnit
from zinf_cli.engine.compute.sweep_member import MicroBatch, SweepMember
from zinf_cli.engine.compute.tape import Tape
from zinf_cli.engine.traffic.pipeline import Pipeline
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.trace import Trace


@dataclass
class Route:
    """The order in which a sweep visits units: seen in the last sweep, expected of the next."""

    forward: list[int]
    backward: list[int]
    """The visits of backward, without the turn."""


class Sweep:
    """Runs sweeps through the pipeline's units, one step after another."""

    def __init__(
        self,
        pipeline: Pipeline,
        activations: Activations,
        device: torch.device,
        order: Sequence[int] | None,
        kept: frozenset[int],
        state: MovingState,
        glue_leaves: Sequence[torch.Tensor] | None,
        trace: Trace,
    ) -> None:
        """`order`: the units that a forward calls, if known. `kept`: the units whose activations are kept, and not
        recomputed. `glue_leaves`: what glue saves goes to the tier of activations, except these tensors; with None all
        of it stays in memory."""
        self._pipeline = pipeline
        self._ranks = pipeline.ranks
        self._units = pipeline.units
        self._activations = activations
        self._device = device
        self._kept = kept
        self._state = state
        self._trace = trace
        self._staying = glue_leaves
        self._members: list[SweepMember] = []
        self._checks = ["recompute"] if order is not None else ["leaks", "recompute"]
        """One check for each of the first steps: for leaks (leaks.py), if the model has no survey, and that units
        compute the same when they run again (recompute.py). In these steps the model is compared before each visit."""
        self._trainable = {n for n, unit in enumerate(self._units) if unit.layout.trainable}
        self._origins = [
            {place.origin for place in unit.layout.params() if place.part is not None} for unit in self._units
        ]
        """Of each unit, the parameters that it has parts of."""
        self._resident = next((n for n, unit in enumerate(self._units) if unit.layout.resident), None)
        self._on_demand = frozenset(n for n, unit in enumerate(self._units) if unit.layout.on_demand)
        self._next = NextUnit(self._ranks, self._on_demand)
        self._lockstep = self._ranks.world_size > 1 and (order is None or bool(self._on_demand))
        self._disagreed = False
        if order is None:
            order = [number for number, unit in enumerate(self._units) if not unit.layout.resident]
        order = [number for number in order if number not in self._on_demand]
        self._route = Route(list(order), list(reversed(order))[1:])
        self._backwards: Counter[int] = Counter()
        """Backward visits of this step, by unit."""
        self._unfinished: set[int] = set()
        """Units that need one more backward visit in this step: their gradient is not complete."""

    def announce_step(self, num_sweeps: int) -> None:
        """Tell the pipeline the visits of a training step, if it takes the route of the last sweep."""
        if self._lockstep:
            return
        if self._resident is not None:
            self._pipeline.expect([self._hold_resident(Kind.TURN)])
        backwards: Counter[int] = Counter()
        for number in range(num_sweeps):
            self._pipeline.expect(Visit(unit, Kind.FORWARD) for unit in self._route.forward[:-1])
            self._pipeline.expect(self._back_visits(backwards, last=number == num_sweeps - 1))

    def step(self, sweeps: Sequence[Sequence[MicroBatch]], forward_done: Callable[[], None]) -> list[torch.Tensor]:
        """Run forward and backward of all micro-batches of a step. Returns their unscaled losses (fp32), in order.

        Gradients go to their tiers. `forward_done` is called when every unit of the route has done its pending update.
        After a Disagreement the step can begin again: of it, only these updates remain.
        """
        self._pipeline.begin_step()
        self._state.begin()
        self._backwards.clear()
        self._unfinished.clear()
        losses: list[torch.Tensor] = []
        if self._pipeline.idle:
            self.announce_step(len(sweeps))
        with self._abandoned_on_disagreement(), self._resident_held(Kind.TURN):
            for number, batches in enumerate(sweeps):
                losses += self._train(batches, last=number == len(sweeps) - 1, forward_done=forward_done)
            self._finish_gradients()
        del self._checks[:1]
        return losses

    def evaluate(self, sweeps: Sequence[Sequence[MicroBatch]]) -> list[torch.Tensor]:
        """Run forward alone. Returns the losses (fp32 scalars), in order. Pending updates are done on the way."""
        losses: list[torch.Tensor] = []
        self._pipeline.drop_coming()
        self._state.begin()
        if not self._lockstep:
            if self._resident is not None:
                self._pipeline.expect([self._hold_resident(Kind.FORWARD)])
            self._pipeline.expect(Visit(unit, Kind.FORWARD) for _ in sweeps for unit in self._route.forward)
        with self._abandoned_on_disagreement(), self._resident_held(Kind.FORWARD):
            for batches in sweeps:
                losses += self._evaluate(batches)
        return losses

    def close(self) -> None:
        """End the threads."""
        for member in self._members:
            member.thread.close()
        self._members.clear()

    def _evaluate(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        with self._members_for(batches, grad=False) as members:
            for unit in self._forward_units(members, self._route.forward):
                self._visit_forward(members, unit)
            self._next.agree(_all_finished(members) and (len(members) == 1 or not self._state.notices()))
            return [member.loss.detach().float() for member in members]

    def _train(
        self, batches: Sequence[MicroBatch], *, last: bool, forward_done: Callable[[], None]
    ) -> list[torch.Tensor]:
        with self._members_for(batches, grad=True) as members:
            taken: list[int] = []
            losses: list[torch.Tensor] = []
            for unit in self._forward_units(members, self._route.forward):
                if self._checks or [unit] == self._route.forward[-1:]:  # the model may put back what it has changed
                    self._state.look()
                if unit not in self._on_demand:
                    taken.append(unit)
                if taken == self._route.forward and unit in taken[-1:] and not self._lockstep:
                    losses = self._turn(members, last, forward_done)
                else:
                    self._visit_forward(members, unit)
            turned = bool(losses)
            if not turned:
                self._next.agree(_all_finished(members) and self._same_records(members) and not self._state.notices())
                forward_done()
                losses = [member.take_loss() for member in members]
            walked = self._backward(members, last)
            self._route = Route(taken, walked if turned or walked[:1] != taken[-1:] else walked[1:])
            self._lockstep = self._disagreed or (self._ranks.world_size > 1 and bool(self._on_demand))
            return [loss.float() for loss in losses]

    def _forward_units(self, members: list[SweepMember], predicted: list[int]) -> Iterator[int]:
        """The units to visit, one after another (see "The route"). Disagreement if members of a rank call two units."""
        if self._ranks.world_size > 1 and not self._lockstep:
            yield from predicted
            return
        while True:
            unit = self._next.of({member.called for member in members}, min)
            if unit is None:
                return
            yield unit

    def _visit_forward(self, members: list[SweepMember], unit: int) -> None:
        visit = Visit(unit, Kind.FORWARD)
        self._acquire(visit)
        self._pass_unit(members, unit)
        self._pipeline.release(visit)

    def _pass_unit(self, members: list[SweepMember], unit: int) -> None:
        passed = self._units[unit]
        for member in members:
            for _ in self._calls(unit, lambda: member.called):  # noqa: B023 (called at once)
                member.pass_unit(passed, keeper=self._keeper(unit))
                self._pipeline.advance()

    def _calls(self, unit: int, at: Callable[[], int | None]) -> Iterator[None]:
        """Once if a member is `at` the unit; of an expert as often as it comes there again at once."""
        while at() == unit:
            yield
            if unit not in self._on_demand:
                return

    def _same_records(self, members: list[SweepMember]) -> bool:
        """Whether they have called the same units in the same order, those on demand left out."""
        return len({tuple(u for u in member.units if u not in self._on_demand) for member in members}) <= 1

    def _acquire(self, visit: Visit) -> None:
        (self._pipeline.acquire_between if visit.unit in self._on_demand else self._pipeline.acquire)(visit)

    def _keeper(self, number: int) -> Keeper | None:
        """Packs the graph of a call, if the unit's activations are kept; else None."""
        if number not in self._kept:
            return None
        unit = self._units[number]
        return Keeper(self._activations, unit.params, [*unit.buffers, *self._resident_params()], unit.name)

    def _resident_params(self) -> list[torch.nn.Parameter]:
        return [] if self._resident is None else list(self._units[self._resident].params)

    def _glue_keeper(self) -> GlueKeeper | None:
        """Packs what a micro-batch's glue saves, if that goes to a tier; else None."""
        if self._staying is None:
            return None
        return GlueKeeper(self._activations, [*self._staying, *self._resident_params()])

    def _turn(self, members: list[SweepMember], last: bool, forward_done: Callable[[], None]) -> list[torch.Tensor]:
        """Run forward, loss and backward of the last unit, one micro-batch after another. Returns the losses.

        There are none if the first micro-batch goes on to a further unit. Then this is an ordinary forward visit.
        """
        visit = next(self._back_visits(self._backwards.copy(), last=last))
        name = self._units[visit.unit].name
        self._pipeline.acquire(visit)
        losses: list[torch.Tensor] = []
        agreed = self._same_records(members) and all(member.called == visit.unit for member in members)
        self._next.agree(agreed or self._ranks.world_size > 1)
        for member in members if agreed else ():
            member.pass_unit(self._units[visit.unit], hot=True)
            if not isinstance(member.at, Finished):
                member.tape.cool(name)
                agreed = False
                break
            if not losses:
                forward_done()
            losses.append(member.take_loss())
            if member.recorded == visit.unit:
                member.backward()
            self._pipeline.advance()
        if not agreed and not losses and self._ranks.world_size == 1:
            self._pass_unit(members[1:], visit.unit)
            self._pipeline.abandon(visit)
            return []
        self._next.agree(agreed and not self._state.notices())
        self._pipeline.release(visit)
        self._count_backward(visit)
        return losses

    def _backward(self, members: list[SweepMember], last: bool) -> list[int]:
        """Run backward of the remaining records, in reverse order: all micro-batches at each unit.

        Returns the units that were visited. In lockstep nobody knows which visit of a unit is its last.
        """
        left = Counter(record.call.unit for member in members for record in member.tape.records)
        walked = []
        while (unit := self._next_backward(members)) is not None:
            left[unit] -= sum(member.num_next(unit in self._on_demand) for member in members if member.recorded == unit)
            final = last and not left[unit] and not self._lockstep
            visit = Visit(unit, Kind.BACKWARD, nth=self._backwards[unit], final=final)
            if unit not in self._on_demand:
                walked.append(unit)
            _prefetch(members)
            self._acquire(visit)
            for member in members:
                for _ in self._calls(unit, lambda: member.recorded):  # noqa: B023
                    member.backward()
                _prefetch(members)
                self._pipeline.advance()
            self._pipeline.release(visit)
            self._count_backward(visit)
        return walked

    def _next_backward(self, members: list[SweepMember]) -> int | None:
        if self._lockstep or self._on_demand:
            return self._next.of({member.recorded for member in members}, max)
        return members[0].recorded

    def _back_visits(self, backwards: Counter[int], *, last: bool) -> Iterator[Visit]:
        back = self._route.forward[-1:] + self._route.backward
        left = Counter(back)
        for place, unit in enumerate(back):
            left[unit] -= 1
            kind = Kind.BACKWARD if place else Kind.TURN
            yield Visit(unit, kind, nth=backwards[unit], final=last and not left[unit])
            backwards[unit] += 1

    def _count_backward(self, visit: Visit) -> None:
        if visit.unit in self._trainable:
            self._backwards[visit.unit] += 1
            (self._unfinished.discard if visit.final else self._unfinished.add)(visit.unit)

    def _finish_gradients(self) -> None:
        """Complete the gradients whose last visit was not known, or was expected and did not come (LayerDrop).

        Plain PyTorch has one gradient of all experts: zeros for those that no token reached, if one was reached.
        """
        reached = {origin for unit in self._backwards for origin in self._origins[unit]}
        zeros = {unit for unit in self._trainable if not self._backwards[unit] and self._origins[unit] & reached}
        self._pipeline.complete(sorted(self._unfinished), sorted(zeros))

    def _hold_resident(self, kind: Kind) -> Visit:
        assert self._resident is not None
        return Visit(self._resident, kind, final=kind is Kind.TURN)

    @contextmanager
    def _abandoned_on_disagreement(self) -> Iterator[None]:
        """On Disagreement, drop the step. All ranks come here together; several go on in lockstep ("The route")."""
        try:
            yield
        except Disagreement:
            self._state.put_back()
            self._pipeline.abandon_step()
            self._lockstep = self._disagreed = self._ranks.world_size > 1
            raise

    @contextmanager
    def _resident_held(self, kind: Kind) -> Iterator[None]:
        """A context in which the resident unit, if there is one, is bound."""
        if self._resident is None:
            yield
            return
        visit = self._hold_resident(kind)
        self._pipeline.acquire(visit)
        yield
        self._pipeline.release(visit)

    @contextmanager
    def _members_for(self, batches: Sequence[MicroBatch], *, grad: bool) -> Iterator[list[SweepMember]]:
        """A member for each micro-batch, at its first unit."""
        while len(self._members) < len(batches):
            self._members.append(SweepMember(len(self._members), self._device, self._trace))
        members = self._members[: len(batches)]
        started: list[SweepMember] = []
        try:
            for member, batch in zip(members, batches, strict=True):
                started.append(member)
                tape = Tape(
                    self._device,
                    self._activations,
                    self._state,
                    trainable=self._trainable,
                    compare=self._checks[:1] == ["recompute"],
                    glue=self._glue_keeper() if grad else None,
                    trace=self._trace,
                    scale=batch.weight,
                )
                unseen = grad and (self._checks[:1] == ["leaks"] or self._state.may_leak)
                member.start(batch, tape, grad=grad, at_home=self._resident_params() if unseen else None)
            yield members
        except BaseException:
            for member in started:
                member.abandon()
            raise


def _all_finished(members: list[SweepMember]) -> bool:
    return all(isinstance(member.at, Finished) for member in members)


def _prefetch(members: list[SweepMember]) -> None:
    """Start to bring back what the next records need, in their order, as far as there is room."""
    most = max(len(member.tape.records) for member in members)
    this_unit = [member for member in members if len(member.tape.records) == most]
    next_unit = [member for member in members if len(member.tape.records) < most]
    for member in this_unit + next_unit:
        if not member.tape.prefetch():
            return
