"""The layer-major sweep: all micro-batches pass unit k before any passes unit k+1, and back.

A parameter is fetched twice a step, whatever the number of micro-batches. At the last unit of the forward each
micro-batch turns at once: it runs the unit's forward with its graph, takes the loss and runs the unit's backward. Only
then the next micro-batch does the same. So that unit needs no recompute, and only one micro-batch's logits are alive at
a time.

The route. The order of units is predicted from the last sweep, so that fetches run ahead. A single rank may leave the
prediction at any unit. Several ranks share every fetch, so they must visit the same units in the same order. They
follow the prediction to the turn; a micro-batch that leaves out a unit (LayerDrop) is at a later one then. At the turn
they tell each other whether all of their micro-batches have come there. If one has not, the step begins again in
*lockstep*: before every visit the ranks agree on a unit. A rank whose micro-batch does not call that unit only takes
part in the fetch. A first sweep without a prediction is in lockstep, too.

Experts on demand. When a layer's tokens are routed, its experts are known: of all members, and by one small all-reduce
of all ranks. The sweep visits these, one after another, and fetches run ahead again. Backward makes the visits of
forward in reverse, as far as some member has recorded them. So all of it is announced at the turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress, islice

import torch

from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.joined import backward, in_turn
from zinf_cli.engine.compute.keep import GlueKeeper, Keeper
from zinf_cli.engine.compute.micro_batch import Finished
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.next_unit import Disagreement, NextUnit
from zinf_cli.engine.compute.route import Experts, Route, back_visits, layers_of_experts, recorded
from zinf_cli.engine.compute.spared import Spared
from zinf_cli.engine.compute.sweep_member import MicroBatch, SweepMember, all_finished, prefetch
from zinf_cli.engine.compute.tape import Tape
from zinf_cli.engine.traffic.pipeline import Pipeline
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.trace import Trace


class Sweep:
    """Runs sweeps through the pipeline's units, one step after another."""

    def __init__(
        self,
        pipeline: Pipeline,
        activations: Activations,
        device: torch.device,
        order: Sequence[int] | None,
        learned: Sequence[int] | None,
        kept: frozenset[int],
        staying: frozenset[int],
        state: MovingState,
        spared: Spared,
        glue_leaves: Sequence[torch.Tensor] | None,
        trace: Trace,
    ) -> None:
        """`order`: the units that a forward calls, if known. `learned`: those of them that have a backward, or else
        all. `kept`: those whose activations are kept, and not recomputed. `staying`: those whose inputs, and what glue
        saves before them, stay in memory. `glue_leaves`: what glue saves goes to the tier of activations, except these
        tensors; with None all of it stays in memory."""
        self._pipeline = pipeline
        self._ranks, self._units = pipeline.ranks, pipeline.units
        self._activations = activations
        self._device = device
        self._kept, self._stay = kept, staying
        self._state, self._trace, self._spared = state, trace, spared
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
        self._experts = layers_of_experts([unit.layout for unit in self._units])
        """By unit that has experts on demand, all units of its layer that have some."""
        self._next = NextUnit(self._ranks, frozenset(self._experts))
        self._lockstep = self._ranks.world_size > 1 and order is None
        self._disagreed = False
        if order is None:
            order = [number for number, unit in enumerate(self._units) if not unit.layout.resident]
        self._route = Route.expected(order, learned, self._experts)
        self.moved_in_backward = False
        """Whether the first step's backward has changed the model where no forward did."""
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
            self._pipeline.expect(self._route.forward_visits(turn=True))
            visits = self._route.turn_and_backward(backwards, last=number == num_sweeps - 1)
            if self._experts:  # `_turn` announces the rest, when the experts are known
                self._pipeline.expect(islice(visits, 1))
                return
            self._pipeline.expect(visits)

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
                losses += self._train(batches, left=len(sweeps) - 1 - number, forward_done=forward_done)
            self._finish_gradients()
        self.moved_in_backward = bool(self._checks) and any(self._ranks.all(int(self._state.notices())))
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
            for _ in sweeps:
                self._pipeline.expect(self._route.forward_visits(turn=False))
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
            for unit in self._forward_units(members):
                self._visit_forward(members, unit)
            moved = self._state.notices() and len(members) > 1
            self._next.agree(all_finished(members) and not moved)
            return [member.loss.detach().float() for member in members]

    def _train(
        self, batches: Sequence[MicroBatch], *, left: int, forward_done: Callable[[], None]
    ) -> list[torch.Tensor]:
        with self._members_for(batches, grad=True) as members:
            visited: list[int] = []
            losses: list[torch.Tensor] = []
            back: list[int] = []
            for unit in self._forward_units(members):
                if self._checks or self._comes_to_last(unit, visited):  # the model may put back what it has changed
                    self._state.look()
                if self._turns_at(unit, visited, members):
                    back = self._backward_units(members, visited)
                    losses = self._turn(members, unit, back, left, forward_done)
                else:
                    self._visit_forward(members, unit)
                visited.append(unit)
            turned = bool(losses)
            if not turned:
                self._next.agree(all_finished(members) and not self._state.notices())
                forward_done()
                losses = [member.take_loss() for member in members]
                back = self._backward_units(members, visited)
            self._backward(members, back, last=not left)
            self._follow(visited, back if turned or back[:1] != visited[-1:] else back[1:])
            self._lockstep = self._disagreed
            return [loss.float() for loss in losses]

    def _follow(self, visited: Sequence[int], back: Sequence[int]) -> None:
        """Expect the next sweep to make the same visits. A layer without experts now may have some then."""
        before, self._route = self._route, Route.of(visited, back, self._experts)
        if before.forward == self._route.forward:
            self._route.experts = {**before.experts, **self._route.experts}

    def _comes_to_last(self, unit: int, visited: Sequence[int]) -> bool:
        """Whether `unit` ends the route: not as the embedding, whose weight the head may share."""
        return self._route.forward[-1:] == [unit] and visited.count(unit) + 1 >= self._route.forward.count(unit)

    def _turns_at(self, unit: int, visited: Sequence[int], members: list[SweepMember]) -> bool:
        """Whether `unit` is expected to be the last one of forward. Disagreement if not all ranks have come there."""
        ordinary = [number for number in (*visited, unit) if number not in self._experts]
        if self._lockstep or ordinary != self._route.forward or unit in self._experts:
            return False
        here = all(member.called == unit for member in members)
        if self._ranks.world_size > 1:
            self._next.agree(here)
        return here

    def _forward_units(self, members: list[SweepMember]) -> Iterator[int]:
        """The units to visit, one after another (see "The route")."""
        if self._ranks.world_size > 1 and not self._lockstep:
            for place, unit in enumerate(self._route.forward):
                for layer in self._route.experts.get(place, ()):
                    yield from self._routed_experts(members, layer)
                yield unit
            return
        while (called := self._next.of({member.called for member in members}, self._route.forward)) is not None:
            if called in self._experts and not self._lockstep:
                yield from self._routed_experts(members, self._experts[called])
            else:
                yield called

    def _routed_experts(self, members: list[SweepMember], layer: Experts) -> Iterator[int]:
        """The experts of a layer that members of any rank are routed to, and then those that they call all the same."""
        seen: set[int] = set()
        while True:
            called = {member.called for member in members}
            called |= {unit for member in members for unit in member.experts if unit not in seen}
            units = list(compress(layer, self._ranks.any([unit in called for unit in layer]).wait()))
            if not units:
                break
            self._pipeline.put_first(Visit(unit, Kind.FORWARD) for unit in units)
            yield from units
            seen.update(units)
        self._pipeline.flush(unit for unit in layer if self._units[unit].life.update_due)

    def _visit_forward(self, members: list[SweepMember], unit: int) -> None:
        visit = Visit(unit, Kind.FORWARD)
        self._pipeline.acquire(visit)
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
            if unit not in self._experts:
                return

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

    def _turn(
        self,
        members: list[SweepMember],
        unit: int,
        back: Sequence[int],
        left: int,
        forward_done: Callable[[], None],
    ) -> list[torch.Tensor]:
        """Run forward, loss and backward of the last unit, one micro-batch after another. Returns the losses.

        There are none if the first micro-batch goes on to a further unit. Then this is an ordinary forward visit.
        `back`: the units of the backward that follows. `left`: how many sweeps of the step follow.
        """
        backwards = self._backwards.copy()
        visit, *others = back_visits([unit, *back], backwards, turns=True, last=not left)
        name = self._units[unit].name
        self._pipeline.acquire(visit)
        if self._experts:
            self._pipeline.expect(others)
            if left:
                self._pipeline.expect(self._route.forward_visits(turn=True))
                self._pipeline.expect(islice(self._route.turn_and_backward(backwards, last=left == 1), 1))
        losses: list[torch.Tensor] = []
        agreed = True
        for member in members:
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
        self._disagreed |= not agreed
        self._next.agree(agreed and not self._state.notices())
        self._pipeline.release(visit)
        self._count_backward(visit)
        return losses

    def _backward_units(self, members: list[SweepMember], visited: Sequence[int]) -> list[int]:
        """The visits of backward: those `visited` that a member, of any rank, has recorded a call in; newest first."""
        here = recorded(visited, [member.units for member in members], self._experts)
        return list(compress(visited, self._ranks.any(here).wait()))[::-1]

    def _backward(self, members: list[SweepMember], back: Sequence[int], *, last: bool) -> None:
        """Run backward of the remaining records, in reverse order: all micro-batches at each unit of `back`."""
        for visit in list(back_visits(back, self._backwards.copy(), turns=False, last=last)):
            prefetch(members)
            self._pipeline.acquire(visit)
            for tapes in in_turn(members, visit.unit, self._units[visit.unit].layout, self._experts):
                backward(tapes)
                prefetch(members)
                self._pipeline.advance()
            self._pipeline.release(visit)
            self._count_backward(visit)
        assert not any(member.tape.records for member in members)

    def _count_backward(self, visit: Visit) -> None:
        self._backwards[visit.unit] += 1
        if visit.unit in self._trainable:
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
            self._disagreed |= self._ranks.world_size > 1
            self._lockstep = self._disagreed
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
                    self._device, self._activations, self._state, self._spared, trainable=self._trainable,
                    staying=self._stay, compare=self._checks[:1] == ["recompute"],
                    glue=self._glue_keeper() if grad else None, trace=self._trace, scale=batch.weight,
                )  # fmt: skip
                unseen = grad and (self._checks[:1] == ["leaks"] or self._state.may_leak)
                member.start(batch, tape, grad=grad, at_home=self._resident_params() if unseen else None)
            yield members
        except BaseException:
            for member in started:
                member.abandon()
            raise
