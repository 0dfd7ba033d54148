"""The fetch pipeline: everything a visit of a unit needs, started ahead of time and waited for one by one.

The sweep announces its visits in order (`expect`). The pipeline issues their reads as far ahead as memory allows,
always in visit order, so that memory is never held by a later visit while an earlier one starves: no deadlock. A visit
that carries an update streams {gradient, exp_avg, exp_avg_sq[, master]} through chunk buffers, computes AdamW as chunks
arrive and writes them back behind itself; the new parameters then go on to the other ranks and into compute. See
docs/architecture.md, "The deferred update".

All methods run on the compute thread; drives and collectives work in threads of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from zinf_cli.engine.adamw import AdamW
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.store import Unit
from zinf_cli.engine.update import ChunkUpdate, chunk_updates
from zinf_cli.errors import CapacityError
from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.tier import Transfer
from zinf_cli.trace import Trace


class Kind(Enum):
    FORWARD = "forward"
    TURN = "turn"
    """The last unit of a sweep: forward and backward in one visit."""
    BACKWARD = "backward"
    FLUSH = "flush"
    """Only the pending update."""


@dataclass(frozen=True)
class Visit:
    """One stop at a unit."""

    unit: int
    kind: Kind
    update: bool = field(default=False, compare=False)
    """The unit's pending update happens on the way in."""
    nth: int = 0
    """How many backward visits of this step came before; their gradient is added to."""
    final: bool = False
    """The gradient of the step is complete after this visit."""

    @property
    def accumulate(self) -> bool:
        return self.nth > 0

    @property
    def has_grads(self) -> bool:
        return self.kind in (Kind.TURN, Kind.BACKWARD)


@dataclass
class Memory:
    """The buffers a pipeline works in, all on the compute device."""

    slots: Arena
    """Parameters and gradients of held and coming units."""
    resident: Arena
    """The resident unit, for the whole step."""
    chunks: Arena
    """Equal buffers of the update."""
    chunk_numel: int


class Fetch:
    """One visit on its way: buffers, transfers, the update, the gather."""

    def __init__(self, pipeline: Pipeline, visit: Visit) -> None:
        self.visit = visit
        self.unit = pipeline.units[visit.unit]
        self._pipeline = pipeline
        self._memory = pipeline.memory
        self.flats: list[torch.Tensor] = []
        self.grad: torch.Tensor | None = None
        self.carry: torch.Tensor | None = None
        self._slot: Buffer | None = None
        self._grad_buffer: Buffer | None = None
        self._carry_buffer: Buffer | None = None
        self._reads: list[Transfer] = []
        self._gathers: list[Transfer] | None = None
        self._writes: list[Transfer] = []
        self._updates: deque[ChunkUpdate] = deque()
        self._unread: deque[ChunkUpdate] = deque()
        self.placed = False

    @property
    def issued(self) -> bool:
        return self.placed and not self._unread

    @property
    def starved(self) -> bool:
        """Whether it can't go on before some buffer is freed."""
        return not self.placed or (bool(self._updates) and self._is_unread(self._updates[0]))

    @property
    def updating(self) -> bool:
        return bool(self._updates)

    def issue(self) -> bool:
        """Start as many reads as memory allows; True when all of them are under way."""
        if not self.placed and not self._gradient_settled():
            return False
        if not self.placed and not self._place():
            return False
        while self._unread and self._unread[0].read(self._memory.chunks):
            self._unread.popleft()
        return not self._unread

    def _gradient_settled(self) -> bool:
        """Whether the gradient this visit reads has been handed to its tier."""
        if self.visit.update:
            return self.unit.grad_ready
        return not self.visit.has_grads or self.unit.backwards >= self.visit.nth

    def _place(self) -> bool:
        """Find room for the slot, the gradient and its carry, in one block; start the parameter reads."""
        unit, layout = self.unit, self.unit.layout
        in_place = unit.in_place()
        sizes = [0, 0, 0]
        if in_place is None:
            sizes[0] = layout.numel * unit.dtype.itemsize
        grad_view = None
        if self.visit.has_grads and unit.grad is not None and layout.trainable is not None:
            grad_view = unit.grad.view()
            if unit.ranks.world_size > 1 or self.visit.accumulate or grad_view is None:
                sizes[1] = layout.trainable.numel * 4
            if self.visit.accumulate and grad_view is None:
                sizes[2] = layout.trainable.slice_numel * 4
        block = None
        if any(sizes):
            arena = self._memory.resident if layout.resident else self._memory.slots
            block = arena.allocate(sum(sizes))
            if block is None:
                return False
        self._cut(block, sizes, grad_view)
        if in_place is not None:
            self.flats = in_place
        self._read_params()
        if self.visit.update:
            self._plan_update()
        self.placed = True
        return True

    def _cut(self, block: Buffer | None, sizes: list[int], grad_view: torch.Tensor | None) -> None:
        buffers: list[Buffer | None] = [None, None, None]
        for index, size in enumerate(sizes):
            if size and block is not None:
                last = not any(sizes[index + 1 :])
                buffers[index], block = (block, None) if last else block.split(size)
        self._slot, self._grad_buffer, self._carry_buffer = buffers
        if self._grad_buffer is not None:
            self.grad = self._grad_buffer.data.view(torch.float32)
        elif grad_view is not None:
            self.grad = grad_view.view(torch.float32)
        if self._carry_buffer is not None and self.unit.grad is not None:
            self.carry = self._carry_buffer.data.view(torch.float32)
            self._reads.append(self.unit.grad.read(0, self._carry_buffer.data))
        elif self.visit.accumulate and grad_view is not None:
            self.carry = grad_view.view(torch.float32)

    def _read_params(self) -> None:
        """Bring this rank's slices into the slot, unless they are gathered straight from memory."""
        if self._slot is None:
            return
        start = 0
        for layout, extent in zip(self.unit.layout.flats, self.unit.slices, strict=True):
            flat = self._slot.data[start : start + layout.numel * self.unit.dtype.itemsize].view(
                self.unit.dtype
            )
            start += flat.numel() * flat.element_size()
            self.flats.append(flat)
            if extent.view() is None:
                own = layout.slice_of(flat, self.unit.ranks.rank)
                self._reads.append(extent.read(0, own.view(torch.uint8)))

    def _own_slices(self) -> list[torch.Tensor]:
        """This rank's slice of each flat, where the update writes and the gather reads."""
        own = []
        for layout, extent, flat in zip(self.unit.layout.flats, self.unit.slices, self.flats, strict=True):
            memory = extent.view()
            in_slot = layout.slice_of(flat, self.unit.ranks.rank)
            own.append(in_slot if memory is None else memory.view(self.unit.dtype))
        return own

    def _plan_update(self) -> None:
        self._unread.extend(
            chunk_updates(self.unit, self._own_slices()[0], self._memory.chunk_numel, self._pipeline.trace)
        )
        self._updates.extend(self._unread)

    def progress(self, wait: Callable[[Transfer], None] | None = None) -> bool:
        """Do what the bytes that have arrived allow; with `wait`, wait for the next piece. True when ready to bind."""
        if not self.placed:
            return False
        if not self._settle(self._reads, wait):
            return False
        while self._updates:
            chunk = self._updates[0]
            adamw = self._pipeline.adamw
            if adamw is None or self._is_unread(chunk) or not self._settle(chunk.reads, wait):
                return False
            self._writes.extend(chunk.apply(adamw))
            self._updates.popleft()
            self._pipeline.drain_later(*chunk.trailing())
            if wait is not None and self._unread:
                return False  # let the caller issue more reads first
        if self._gathers is None:
            if self.visit.update:
                self.unit.grad_ready = False
            self._gathers = self._start_gathers()
        return self._settle(self._gathers, wait)

    def _is_unread(self, chunk: ChunkUpdate) -> bool:
        return bool(self._unread) and self._unread[0] is chunk

    def _start_gathers(self) -> list[Transfer]:
        ranks = self.unit.ranks
        if ranks.world_size == 1 or self.visit.kind is Kind.FLUSH:
            return []
        return [
            ranks.gather(flat, own, self._pipeline.trace, self.unit.name)
            for flat, own in zip(self.flats, self._own_slices(), strict=True)
        ]

    @staticmethod
    def _settle(transfers: list[Transfer], wait: Callable[[Transfer], None] | None) -> bool:
        for transfer in transfers:
            if not transfer.done() and wait is None:
                return False
            (wait or _finish)(transfer)
        transfers.clear()
        return True

    def bind(self) -> None:
        self.unit.bind(self.flats)
        if self.grad is not None:
            if not self.visit.accumulate:
                self.unit.touched = [False] * len(self.unit.touched)
            self.grad.zero_()
            self.unit.bind_grads(self.grad)

    def let_go_of_slot(self) -> None:
        if self._slot is not None:
            self._pipeline.drain_later(self._writes, [self._slot])

    def let_go_of_grad(self, writes: list[Transfer]) -> None:
        buffers = [b for b in (self._grad_buffer, self._carry_buffer) if b is not None]
        self._pipeline.drain_later(writes, buffers)

    @property
    def grad_in_buffer(self) -> bool:
        return self._grad_buffer is not None


def _finish(transfer: Transfer) -> None:
    transfer.wait()


class Pipeline:
    """Fetches in visit order; `acquire` and `release` bracket the compute of a visit."""

    def __init__(self, units: Sequence[Unit], ranks: Ranks, memory: Memory, trace: Trace) -> None:
        self.units = units
        self.ranks = ranks
        self.memory = memory
        self.trace = trace
        self.adamw: AdamW | None = None
        """The settings pending updates are waiting for; None while the step's gradient norm is not known."""
        self.wait_s = 0.0
        self.norms: dict[int, torch.Tensor] = {}
        """Gradient norms of this step by parameter index (world of one), or by unit number (slices)."""
        self._coming: deque[Visit] = deque()
        self._fetches: deque[Fetch] = deque()
        self._held: dict[int, Fetch] = {}
        self._reducing: deque[tuple[Fetch, Transfer]] = deque()
        self._draining: deque[tuple[list[Transfer], list[Buffer]]] = deque()

    def expect(self, visits: Iterable[Visit]) -> None:
        """Announce visits that will follow all announced before."""
        self._coming.extend(visits)
        self.advance()

    def advance(self) -> None:
        """Move everything that can move without waiting. Called between pieces of compute."""
        self._reclaim()
        while self._reducing and self._reducing[0][1].done():
            self._finish_gradient(*self._reducing.popleft())
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
        """Bind a unit that is not part of the announced order (the resident one)."""
        fetch = Fetch(self, self._with_due_update(visit))
        self._complete(fetch)
        self._hold(fetch)

    def _complete(self, fetch: Fetch) -> None:
        while not fetch.progress(self.wait):
            self._reclaim()
            self._issue_ahead()
            fetch.issue()
            if fetch.starved:
                self._make_room(fetch)

    def _hold(self, fetch: Fetch) -> None:
        fetch.bind()
        self._held[fetch.visit.unit] = fetch
        self.advance()

    def give_up(self, visit: Visit) -> None:
        """Release without a gradient: the visit turned out to be none, or its sweep was given up."""
        fetch = self._held.pop(visit.unit)
        fetch.unit.release()
        fetch.let_go_of_slot()
        fetch.let_go_of_grad([])

    def give_up_held(self) -> None:
        for fetch in list(self._held.values()):
            self.give_up(fetch.visit)

    def release(self, visit: Visit) -> None:
        """Unbind the unit; its gradient leaves for its tier and its slot becomes free."""
        fetch = self._held.pop(visit.unit)
        fetch.unit.release()
        fetch.let_go_of_slot()
        if fetch.grad is not None:
            layout = fetch.unit.layout.trainable
            assert layout is not None
            own = layout.slice_of(fetch.grad, self.ranks.rank)
            self._reducing.append(
                (fetch, self.ranks.reduce_scatter(own, fetch.grad, self.trace, fetch.unit.name))
            )
        self.advance()

    def finish_gradients(self) -> None:
        """Wait until every gradient of the step is reduced (not until it is written)."""
        while self._reducing:
            self.wait(self._reducing[0][1])
            self._finish_gradient(*self._reducing.popleft())

    def settle(self) -> None:
        """Wait for everything under way, announced fetches excepted."""
        self.finish_gradients()
        while self._draining:
            self._drain_one()

    def held_flats(self, unit: int) -> list[torch.Tensor]:
        """The flats of a held unit."""
        return self._held[unit].flats

    def forget_coming(self) -> None:
        """The prediction failed: drop announced visits, finish those under way (their updates count)."""
        self._coming.clear()
        while self._fetches:
            fetch = self._fetches[0]
            if not fetch.placed:
                self._fetches.clear()
                return
            self._complete(fetch)
            fetch.let_go_of_slot()
            fetch.let_go_of_grad([])
            self._fetches.popleft()

    def drain_later(self, transfers: list[Transfer], buffers: list[Buffer]) -> None:
        """Free `buffers` when `transfers` are done."""
        if transfers:
            self._draining.append((list(transfers), buffers))
        else:
            for buffer in buffers:
                buffer.free()

    def _next(self, visit: Visit) -> Fetch:
        """The fetch of `visit`: the one that was announced, or a new one where the prediction failed."""
        coming = self._fetches[0].visit if self._fetches else self._coming[0] if self._coming else None
        if coming != visit:
            self.forget_coming()
        elif not self._fetches:
            self._coming.popleft()
        if not self._fetches:
            self._fetches.append(Fetch(self, self._with_due_update(visit)))
        return self._fetches[0]

    def _with_due_update(self, visit: Visit) -> Visit:
        return replace(visit, update=self.units[visit.unit].grad_ready and visit.nth == 0)

    def _issue_ahead(self) -> None:
        for fetch in self._fetches:
            if not fetch.issued and not fetch.issue():
                return
        while self._coming:
            self._fetches.append(Fetch(self, self._coming.popleft()))
            if not self._fetches[-1].issue():
                return

    def _make_room(self, fetch: Fetch) -> None:
        """Wait for something that frees buffers; nothing left to wait for means the plan was wrong."""
        if self._reducing:
            self.wait(self._reducing[0][1])
            self._finish_gradient(*self._reducing.popleft())
        elif self._draining:
            self._drain_one()
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

    def _drain_one(self) -> None:
        transfers, buffers = self._draining.popleft()
        for transfer in transfers:
            self.wait(transfer)
        for buffer in buffers:
            buffer.free()

    def _reclaim(self) -> None:
        for _ in range(len(self._draining)):
            transfers, buffers = self._draining.popleft()
            if all(transfer.done() for transfer in transfers):
                for transfer in transfers:
                    transfer.wait()  # an error of a write surfaces here
                for buffer in buffers:
                    buffer.free()
            else:
                self._draining.append((transfers, buffers))

    def wait(self, transfer: Transfer) -> None:
        if not transfer.done():
            start = time.perf_counter()
            transfer.wait()
            end = time.perf_counter()
            self.wait_s += end - start
            self.trace.add("wait", "wait", start, end)
        else:
            transfer.wait()

    def _finish_gradient(self, fetch: Fetch, reduced: Transfer) -> None:
        """Add what earlier visits left, note the norm, write the slice to its tier."""
        reduced.wait()
        unit, layout = fetch.unit, fetch.unit.layout.trainable
        assert layout is not None and fetch.grad is not None and unit.grad is not None
        own = layout.slice_of(fetch.grad, self.ranks.rank)
        home = unit.grad.view()
        if fetch.carry is not None:
            own = fetch.carry.add_(own)
        elif home is not None and fetch.grad_in_buffer:
            home.view(torch.float32).copy_(own)
        unit.backwards += 1
        if fetch.visit.final:
            unit.backwards = 0
            self._note_norms(fetch.visit.unit, unit, own)
            unit.grad_ready = True
        fetch.let_go_of_grad([] if home is not None else [unit.grad.write(0, own.view(torch.uint8))])

    def _note_norms(self, number: int, unit: Unit, own: torch.Tensor) -> None:
        assert unit.layout.trainable is not None
        if self.ranks.world_size > 1:
            self.norms[number] = torch.linalg.vector_norm(own).double()
            return
        for place, touched in zip(unit.layout.trainable.params, unit.touched, strict=True):
            if touched:
                self.norms[place.index] = torch.linalg.vector_norm(place.view(own))
