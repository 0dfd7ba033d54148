"""The fetch pipeline: everything a visit of a unit needs, started ahead of time and waited for one by one.

The sweep announces its visits in order (`expect`). The pipeline issues their reads as far ahead as memory allows,
always in visit order, so that memory is never held by a later visit while an earlier one starves: no deadlock. A visit
that carries an update streams the gradient and the optimizer's fields through chunk buffers, updates chunks as they
arrive and writes them back behind itself; the new parameters then go on to the other ranks and into compute. See
docs/architecture.md, "The deferred update".

All methods run on the compute thread; drives and collectives work in threads of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from zinf_cli.engine.ranks import Flags, Ranks
from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.traffic.eager import EagerUpdates
from zinf_cli.engine.traffic.fetch import Fetch
from zinf_cli.engine.traffic.update import Updates
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.store import Unit
from zinf_cli.errors import CapacityError
from zinf_cli.tiers.tier import Transfer
from zinf_cli.trace import Trace


@dataclass(frozen=True)
class Reduction:
    """A gradient on its way to the slices of all ranks."""

    fetch: Fetch
    reduced: Sequence[Transfer]
    """Of each trainable flat."""
    touched: Flags | None
    """Which parameters have a gradient on any rank; known with the last visit of a step."""

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
        self.wait_s = 0.0
        self.norms: dict[int, torch.Tensor] = {}
        """Gradient norms of this step by parameter index; of a slice of a flat, by that of the flat's first."""
        self.completed: set[int] = set()
        """Units whose gradient of this step is complete."""
        self._coming: deque[Visit] = deque()
        self._fetches: deque[Fetch] = deque()
        self._held: dict[int, Fetch] = {}
        self._reducing: deque[Reduction] = deque()
        self.eager = EagerUpdates(units, memory, self.wait)

    def expect(self, visits: Iterable[Visit]) -> None:
        """Announce visits that will follow all announced before, and start on them."""
        self._coming.extend(visits)
        self.advance()

    @property
    def idle(self) -> bool:
        """Whether no visit is announced."""
        return not self._coming and not self._fetches

    def begin_step(self) -> None:
        """Forget the gradients of the step before, or of a step that was given up."""
        self.wait_s = 0.0
        self.norms.clear()
        self.completed.clear()
        for unit in self.units:
            unit.life.begin_step()

    def advance(self) -> None:
        """Move everything that can move without waiting. Called between pieces of compute."""
        self.memory.reclaim()
        while self._reducing and self._reducing[0].done():
            self._finish_gradient(self._reducing.popleft())
        self.eager.advance()
        self._issue_ahead()
        for fetch in self._fetches:
            if not fetch.progress():
                break
        self._issue_ahead()

    def acquire(self, visit: Visit) -> None:
        """Bind the unit of the next visit; blocks until its bytes are there."""
        fetch = self._next(visit)
        self._complete(fetch)
        self._fetches.popleft()
        self._hold(fetch)

    def acquire_aside(self, visit: Visit) -> None:
        """Bind a unit outside of the announced order, which is forgotten."""
        self.forget_coming()
        fetch = self._fetch(visit)
        self._complete(fetch)
        self._hold(fetch)

    def flush(self, unit: int) -> None:
        """Do a unit's pending update; what is announced stays."""
        fetch = self._fetch(Visit(unit, Kind.FLUSH))
        self._complete(fetch)
        fetch.forget()

    def _complete(self, fetch: Fetch) -> None:
        while not fetch.progress(self.wait):
            self.memory.reclaim()
            self._issue_ahead()
            fetch.issue()
            if fetch.starved:
                self._make_room(fetch)

    def _hold(self, fetch: Fetch) -> None:
        fetch.bind()
        self._held[fetch.visit.unit] = fetch
        self.advance()

    def give_up(self, visit: Visit) -> None:
        """Release without a gradient: the visit turned out to be none."""
        fetch = self._held.pop(visit.unit)
        fetch.unit.release()
        fetch.forget()

    def give_up_step(self) -> None:
        """Release everything without a gradient: the step will be begun again."""
        for fetch in list(self._held.values()):
            self.give_up(fetch.visit)
        self.forget_coming()  # may finish a gather that waits for a gradient
        while self._reducing:
            reduction = self._reducing.popleft()
            self.wait(reduction)
            reduction.fetch.let_go_of_grad([])

    def release(self, visit: Visit) -> None:
        """Unbind the unit; its gradient leaves for its tier and its slot becomes free."""
        fetch = self._held.pop(visit.unit)
        fetch.unit.release()
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
            fetch.let_go_of_slot()
        self.advance()

    def finish_gradients(self) -> None:
        """Wait until every gradient of the step is reduced (not until it is written)."""
        while self._reducing:
            self.wait(self._reducing[0])
            self._finish_gradient(self._reducing.popleft())

    def settle(self) -> None:
        """Wait for everything under way, announced fetches excepted."""
        self.finish_gradients()
        self.eager.finish()
        while self.memory.draining:
            self.memory.drain_one(self.wait)

    def held_flats(self, unit: int) -> list[torch.Tensor]:
        """The flats of a held unit."""
        return self._held[unit].flats

    def forget_coming(self) -> None:
        """Drop the announced visits: the prediction failed.

        Updates under way are finished; and gathers that a rank has started are finished on every rank, see "Order of
        collectives" in ranks.py.
        """
        started = max(self.ranks.all(sum(fetch.gathering for fetch in self._fetches)))
        while len(self._fetches) < started:
            self._fetches.append(self._fetch(self._coming.popleft()))
        self._coming.clear()
        for number in range(len(self._fetches)):
            fetch = self._fetches[0]
            fetch.gather = number < started
            if fetch.gather or fetch.placed:
                self._complete(fetch)
            fetch.forget()
            self._fetches.popleft()

    def _fetch(self, visit: Visit) -> Fetch:
        return Fetch(visit, self.units[visit.unit], self.memory, self.updates, self.trace)

    def _next(self, visit: Visit) -> Fetch:
        """The fetch of `visit`: the one that was announced, or a new one where the prediction failed."""
        if not self._fetches and self._coming:
            self._fetches.append(self._fetch(self._coming.popleft()))
        if self._fetches and self._fetches[0].visit != visit:
            self.forget_coming()
        if not self._fetches:
            self._fetches.append(self._fetch(visit))
        return self._fetches[0]

    def _issue_ahead(self) -> None:
        for fetch in self._fetches:
            if not fetch.issued and not fetch.issue():
                return
        while self._coming:
            self._fetches.append(self._fetch(self._coming.popleft()))
            if not self._fetches[-1].issue():
                return

    def _make_room(self, fetch: Fetch) -> None:
        """Wait for something that frees buffers; nothing left to wait for means the plan was wrong."""
        if self._reducing:
            self.wait(self._reducing[0])
            self._finish_gradient(self._reducing.popleft())
        elif self.eager:
            self.eager.wait_for_chunk()
        elif self.memory.draining:
            self.memory.drain_one(self.wait)
        elif not self._update_others(fetch):
            raise CapacityError(
                f"rank {self.ranks.rank}: no room for unit {fetch.unit.name} in {self.memory.slots.capacity} bytes",
                hint="raise offload.cpu_memory or device_memory",
            )

    def _update_others(self, fetch: Fetch) -> bool:
        """Let updates that read ahead finish, where a visit out of order needs their chunk buffers."""
        for other in self._fetches:
            if other is not fetch and other.placed and other.updating:
                other.progress(self.wait)
                return True
        return False

    def wait(self, transfer: Transfer) -> None:
        if not transfer.done():
            start = time.perf_counter()
            transfer.wait()
            end = time.perf_counter()
            self.wait_s += end - start
            self.trace.add("wait", transfer.what, start, end)
        else:
            transfer.wait()

    def _finish_gradient(self, reduction: Reduction) -> None:
        """Add what earlier visits left, note the norm; update, or write the slice to its tier."""
        reduction.wait()
        fetch, unit = reduction.fetch, reduction.fetch.unit
        own = [flat.layout.slice_of(grad, flat.rank) for flat, grad in zip(unit.trained, fetch.grads, strict=True)]
        homes = unit.grads_in_place()
        if fetch.carries:
            own = [carry.add_(values) for carry, values in zip(fetch.carries, own, strict=True)]
        elif homes is not None and fetch.grad_in_buffer:
            for home, values in zip(homes, own, strict=True):
                home.copy_(values)
        if reduction.touched is None:
            unit.life.count_backward()
        else:
            unit.life.gradient_reduced(reduction.touched.wait())
            self._note_norms(unit, own)
            if self.eager.takes(unit):
                self.eager.start(fetch, own)
                return
        fetch.let_go_of_grad(unit.write_grads(own))

    def _note_norms(self, unit: Unit, own: Sequence[torch.Tensor]) -> None:
        for flat, values in zip(unit.trained, own, strict=True):
            if self.ranks.world_size > 1:
                self.norms[flat.layout.params[0].index] = torch.linalg.vector_norm(values).double()
                continue
            for place, touched in zip(flat.layout.params, flat.touched, strict=True):
                if touched:
                    self.norms[place.index] = torch.linalg.vector_norm(place.view(values))
