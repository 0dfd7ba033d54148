"""The fetch pipeline: everything a visit of a unit needs, started ahead of time and waited for one by one.

The sweep announces its visits in order (`expect`). The pipeline issues their reads in that order, as far ahead as
memory allows. So a later visit never holds memory that an earlier one waits for, and there is no deadlock. A visit that
makes an update streams the gradient and the optimizer's fields through chunk buffers. It updates chunks as they arrive
and writes them back behind itself; the new parameters go on to the other ranks and into compute. See
docs/architecture.md, "The deferred update".

All methods run on the compute thread; drives and collectives work in threads of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from zinf_cli.engine.ranks import Flags, Ranks
from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.traffic.eager import EagerUpdates
from zinf_cli.engine.traffic.fetch import Fetch
from zinf_cli.engine.traffic.gather_stream import GatherStream
from zinf_cli.engine.traffic.narrow_grads import narrowed
from zinf_cli.engine.traffic.norms import GradientNorms
from zinf_cli.engine.traffic.one_order import OneOrder
from zinf_cli.engine.traffic.update import Updates
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.store import Unit
from zinf_cli.errors import CapacityError
from zinf_cli.tiers.stopwatch import stopwatch_of
from zinf_cli.tiers.streams import Event
from zinf_cli.tiers.tier import Transfer
from zinf_cli.trace import Trace


@dataclass(frozen=True)
class Reduction:
    """A gradient on its way to the slices of all ranks."""

    fetch: Fetch
    reduced: Sequence[Transfer]
    """A transfer for each trainable flat."""
    touched: Flags | None
    """Which parameters have a gradient on any rank. None before the last visit of a step, which tells."""
    event: Event | None = None

    @property
    def what(self) -> str:
        return self.reduced[0].what

    def done(self) -> bool:
        return all(part.done() for part in self.reduced) and (self.touched is None or self.touched.done())

    def wait(self) -> None:
        for part in self.reduced:
            part.wait()
        if self.touched is not None:
            self.touched.wait()


class Pipeline:
    """Fetches in visit order; `acquire` and `release` bracket the compute of a visit."""

    def __init__(self, units: Sequence[Unit], ranks: Ranks, memory: Memory, trace: Trace) -> None:
        self.units = units
        self.ranks = ranks
        self.memory = memory
        self.trace = trace
        self.updates = Updates()
        self._wait_s = 0.0
        self._stopwatch = stopwatch_of(memory.slots.device)
        self.norms = GradientNorms(ranks)
        self.completed: set[int] = set()
        """Units whose gradient of this step is complete."""
        self._coming: deque[Visit] = deque()
        self._fetches: deque[Fetch] = deque()
        self._flushes: deque[Fetch] = deque()
        """Pending updates under way of units that no visit needs."""
        self._held: dict[int, Fetch] = {}
        self._reducing: deque[Reduction] = deque()
        self._order = OneOrder(ranks)
        self._beside = GatherStream(memory.slots.device)
        self.eager = EagerUpdates(units, memory, self.wait)
        experts = [unit.layout.num_bytes for unit in units if unit.layout.on_demand]
        self._spare = 2 * max(experts, default=0)
        """Bytes of the slots that fetches behind an OPEN visit leave for those that will take its place."""

    def expect(self, visits: Iterable[Visit]) -> None:
        """Announce `visits`, which follow all that were announced before, and start their fetches."""
        self._coming.extend(visits)
        self.advance()

    def put_first(self, visits: Iterable[Visit]) -> None:
        """Announce `visits` before all others, in the place of the OPEN visit if that comes next."""
        self._order.withdraw()
        if self._first() is not None and self._fetches[0].open:
            self._fetches.popleft()
        self._fetches.extendleft(reversed([self._fetch(visit) for visit in visits]))
        self.advance()

    @property
    def idle(self) -> bool:
        """Whether no visit is announced."""
        return not self._coming and not self._fetches

    def begin_step(self) -> None:
        """Drop the gradients of the step before, or of an abandoned step."""
        self.waited()  # for something else than a step, such as an evaluation
        self._wait_s = 0.0
        self.norms.begin_step()
        self.completed.clear()
        self.eager.made.clear()
        for unit in self.units:
            unit.life.begin_step()

    def advance(self) -> None:
        """Move everything that can move without waiting. Called between pieces of compute."""
        self.memory.reclaim()
        while self._reducing and self._reducing[0].done():
            self._finish_gradient(self._reducing.popleft())
        self.eager.advance()
        self._issue_ahead()
        in_turn = True  # behind an OPEN visit nothing is gathered, since all ranks gather in one order
        for fetch in self._fetches:
            in_turn = in_turn and not fetch.open
            ahead = in_turn and self._order.may_gather(fetch)
            if not fetch.open and not (fetch.progress() if ahead else fetch.prepare()):
                break
        while self._flushes and self._flushes[0].progress():
            self._flushes.popleft().free()
        self._issue_ahead()

    def acquire(self, visit: Visit) -> None:
        """Bind the unit of the next visit. Blocks until its bytes are there.

        TierError where a transfer failed, CapacityError where the buffers are too small for the unit.
        """
        fetch = self._next(visit)
        self._complete(fetch)
        self._fetches.popleft()
        self._issue_ahead()  # what has room is offered
        self._order.visited(self._fetches)
        self._hold(fetch)

    def acquire_aside(self, visit: Visit) -> None:
        """Bind a unit out of order; the announced visits are dropped. Errors are those of `acquire`."""
        self.drop_coming()
        fetch = self._fetch(visit)
        self._complete(fetch)
        self._hold(fetch)

    def flush(self, units: Iterable[int]) -> None:
        """Begin the pending updates of `units`, which no visit needs, behind what is announced."""
        self._flushes.extend(self._fetch(Visit(unit, Kind.FLUSH)) for unit in units)
        self.advance()

    def finish_flushes(self) -> None:
        """Wait for these updates. Their writes may still be under way. Errors are those of `acquire`."""
        while self._flushes:
            self._complete(self._flushes[0])
            self._flushes.popleft().free()

    def _complete(self, fetch: Fetch, *, ahead: bool = True) -> None:
        while not fetch.progress(self.wait):
            self.memory.reclaim()
            if ahead:
                self._issue_ahead()
            fetch.issue()
            if fetch.starved:
                self._make_room(fetch)

    def _hold(self, fetch: Fetch) -> None:
        fetch.bind()
        self._held[fetch.visit.unit] = fetch
        self.advance()

    def abandon(self, visit: Visit) -> None:
        """Release the unit without a gradient: the model did not make this visit."""
        fetch = self._held.pop(visit.unit)
        fetch.unit.unbind()
        fetch.free()

    def abandon_step(self) -> None:
        """Release all units without a gradient, and drop the announced visits: the step will begin again."""
        for fetch in list(self._held.values()):
            self.abandon(fetch.visit)
        self.drop_coming()  # may finish a gather that waits for a gradient
        while self._reducing:
            reduction = self._reducing.popleft()
            self.wait(reduction)
            reduction.fetch.free_grad([])

    def release(self, visit: Visit) -> None:
        """Unbind the unit, start reducing its gradient, and free its slot unless an eager update follows."""
        fetch = self._held.pop(visit.unit)
        fetch.unit.unbind()
        self._order.meet(self._fetches)
        if fetch.grads:
            reduced = [self.ranks.reduce_scatter(grad, self.trace, fetch.unit.name) for grad in fetch.grads]
            touched = self.ranks.any(fetch.unit.life.touched) if visit.final else None
            self._reducing.append(Reduction(fetch, reduced, touched))
            if visit.final:
                self.completed.add(visit.unit)
                fetch.unit.life.complete()
            else:
                fetch.unit.life.accumulate()
        if not (self.eager.takes(fetch.unit) and visit.final):
            fetch.free_slot()
        self.advance()

    def complete(self, late: Sequence[int], unreached: Sequence[int]) -> None:
        """Complete gradients without a visit: of units that no further visit of the step has come to, and of those that
        none has come to, where they are zeros."""
        for number in unreached:
            self.units[number].life.leave_zeros()
        if late:
            self.finish_gradients()
            flags = iter(self.ranks.any([flag for number in late for flag in self.units[number].life.touched]).wait())
            for number in late:
                life = self.units[number].life
                life.complete()
                life.gradient_reduced([next(flags) for _ in life.touched])
        self.completed.update(late, unreached)

    def finish_gradients(self) -> None:
        """Wait until every gradient of the step is reduced. Writes to tiers may still be under way."""
        while self._reducing:
            self.wait(self._reducing[0])
            self._finish_gradient(self._reducing.popleft())

    def settle(self) -> None:
        """Wait for every reduction, eager update and write. Announced fetches go on."""
        self.finish_gradients()
        self.eager.finish()
        while self.memory.draining:
            self.memory.drain_one(self.wait)
        self.waited()

    def held_flats(self, unit: int) -> list[torch.Tensor]:
        """The flats of a held unit (1-D, each of its dtype)."""
        return self._held[unit].flats

    def drop_coming(self) -> None:
        """Drop the announced visits: the prediction failed.

        Updates under way are finished first. Gathers that some rank has started are finished on every rank: see "Order
        of collectives" in ranks.py.
        """
        self._order.withdraw()
        started = max(self.ranks.all(sum(fetch.gathering for fetch in self._fetches)))
        while len(self._fetches) < started:
            self._fetches.append(self._fetch(self._coming.popleft()))
        self._coming.clear()
        for number in range(len(self._fetches)):
            fetch = self._fetches[0]
            fetch.gather = number < started
            if fetch.gather or fetch.placed:
                self._complete(fetch)
            fetch.free()
            self._fetches.popleft()

    def _fetch(self, visit: Visit) -> Fetch:
        return Fetch(visit, self.units[visit.unit], self.memory, self._beside, self.updates, self.trace)

    def _next(self, visit: Visit) -> Fetch:
        """The fetch of `visit`: the one that was announced, or a new one where the prediction failed."""
        while (first := self._first()) is not None and first.open:
            self._fetches.popleft()  # nothing has taken its place
        if self._fetches and self._fetches[0].visit != visit:
            self.drop_coming()
        if not self._fetches:
            self._fetches.append(self._fetch(visit))
        return self._fetches[0]

    def _first(self) -> Fetch | None:
        """The fetch of the visit that is announced as the next one."""
        if not self._fetches and self._coming:
            self._fetches.append(self._fetch(self._coming.popleft()))
        return self._fetches[0] if self._fetches else None

    def _issue_ahead(self) -> None:
        if self._issue_announced():
            for fetch in self._flushes:
                if not fetch.issue():
                    return

    def _issue_announced(self) -> bool:
        """Start fetches in the order of their visits, as far as there is memory. True when all are under way."""
        spare = 0
        for number in range(len(self._fetches) + len(self._coming)):
            if number == len(self._fetches):
                self._fetches.append(self._fetch(self._coming.popleft()))
            fetch = self._fetches[number]
            spare = self._spare if fetch.open else spare
            slots = self.memory.slots
            if spare and not fetch.placed and slots.capacity - slots.used < fetch.num_bytes + spare:
                return False
            if not fetch.issued and not fetch.issue():
                return False
        return True

    def _make_room(self, fetch: Fetch) -> None:
        """Wait for something that frees buffers. CapacityError where nothing is under way: the plan was wrong."""
        if self._reducing:
            self.wait(self._reducing[0])
            self._finish_gradient(self._reducing.popleft())
        elif self.eager:
            self.eager.wait_for_chunk()
        elif self.memory.draining:
            self.memory.drain_one(self.wait)
        elif not self._update_others(fetch) and not self._call_back(fetch):
            hint = "raise offload.cpu_memory or device_memory"
            if fetch.visit.accumulate:  # by several ranks, whose step began again (dealing.py)
                hint = "set train.micro_batches_per_sweep=1: then the plan counts what adds to a gradient of the step"
            raise CapacityError(
                f"rank {self.ranks.rank}: no room for unit {fetch.unit.name} in {self.memory.slots.capacity} bytes",
                hint=hint,
            )

    def _update_others(self, fetch: Fetch) -> bool:
        """Go on with another fetch's update, which holds chunk buffers. False where there is none."""
        for other in (*self._fetches, *self._flushes):
            if other is not fetch and other.updating and not other.starved:
                other.prepare(self.wait)
                return True
        return False

    def _call_back(self, fetch: Fetch) -> bool:
        """Free what the last of the announced fetches behind `fetch` holds; it begins again.

        False if none holds anything. Several ranks share their gathers, and begin none again.
        """
        for number in reversed(range(len(self._fetches))):
            if (other := self._fetches[number]) is fetch:
                return False
            if other.placed and not (self.ranks.world_size > 1 and other.gathering):
                other.gather = False
                self._complete(other, ahead=False)
                other.free()
                self._fetches[number] = self._fetch(other.visit)
                return True
        return False

    def wait(self, transfer: Transfer) -> bool:
        """Wait for a transfer. The seconds in which compute stands still count as waiting (`waited`)."""
        if transfer.done():
            transfer.wait()
        else:
            self._stopwatch.time(transfer.what, transfer.wait)
        return True

    def waited(self) -> float:
        """Seconds of this step in which compute stood still for data. On an accelerator, those that are over by now."""
        for what, start, end in self._stopwatch.over():
            self._wait_s += end - start
            self.trace.add("wait", what, start, end)
        return self._wait_s

    def _finish_gradient(self, reduction: Reduction) -> None:
        """Add the earlier gradient and note the norm. Then update, or write the slice to its tier."""
        reduction.wait()
        fetch, unit = reduction.fetch, reduction.fetch.unit
        own = [flat.layout.slice_of(grad, flat.rank) for flat, grad in zip(unit.trained, fetch.grads, strict=True)]
        homes = unit.grads_in_place()
        if fetch.earlier_grads:
            own = [earlier.add_(values) for earlier, values in zip(fetch.earlier_grads, own, strict=True)]
        elif homes is not None and fetch.grad_in_buffer:
            for home, values in zip(homes, own, strict=True):
                home.copy_(values)
        if reduction.touched is not None:
            unit.life.gradient_reduced(reduction.touched.told)
        else:
            unit.life.count_backward()
        self.norms.note(unit, own)  # of a visit that is not the last one, too: no other may come
        eager = reduction.touched is not None and self.eager.takes(unit)
        if reduction.touched is not None and homes is None and not (eager and not self.eager.speculative):
            own = [narrowed(values, flat.dtype) for flat, values in zip(unit.trained, own, strict=True)]
        if eager:
            self.eager.start(fetch, own)
            return
        fetch.free_grad(unit.write_grads(own))
