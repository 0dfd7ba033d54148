"""A fetch: what brings a unit's bytes for one visit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.traffic.destination import destination
from zinf_cli.engine.traffic.gather_stream import GatherStream
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.traffic.update import SliceUpdate, Updates
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.store import Flat, Unit
from zinf_cli.model_state import GRAD, PARAM
from zinf_cli.tiers.arena import Buffer
from zinf_cli.tiers.streams import Event, now, wait_for
from zinf_cli.tiers.tier import Extent, Transfer, Wait, under_way, wait_if_done
from zinf_cli.trace import Trace


class Fetch:
    """One visit on its way: its buffers, the reads that fill them, the update, the gather."""

    def __init__(
        self, visit: Visit, unit: Unit, memory: Memory, beside: GatherStream, updates: Updates, trace: Trace
    ) -> None:
        self.visit = visit
        self.unit = unit
        self.open = visit.kind is Kind.OPEN
        self.gather = visit.kind is not Kind.FLUSH
        self._memory = memory
        self._beside = beside
        self._updates = updates
        self._trace = trace
        self.flats: list[torch.Tensor] = []
        """What compute uses (1-D, each of its dtype)."""
        self._moved: list[torch.Tensor] = []
        """What is read and gathered of each: the flat itself or, of one that is packed, its bytes at the end of it. If
        these lie whole in memory, they are that memory."""
        self.grads: list[torch.Tensor] = []
        """The whole gradient of each trainable flat (fp32, 1-D), as this visit computes it; empty in a forward."""
        self.earlier_grads: list[torch.Tensor] = []
        """With several ranks, this rank's slices of the gradient that earlier visits of the step left; else empty. One
        rank adds to its gradient where that lies."""
        self._before: list[Event] = []
        """The ends of what used its memory before: reads wait for these, and so do the gather and compute."""
        self._slot: Buffer | None = None
        self._grad_buffer: Buffer | None = None
        self._earlier_buffer: Buffer | None = None
        self._reads: list[Transfer] = []
        """Of this rank's slices: compute waits for these, and this thread sees that they are over before it goes on."""
        self._queued: list[Transfer] = []
        """Those of them that the stream of gathers waits for, and not this thread."""
        self._earlier: list[Transfer] = []
        """Reads of the earlier gradient."""
        self._ready: Event | None = None
        """Compute that the gather comes behind, with several ranks: its update, or that of slices in memory."""
        self._gathers: list[Transfer] | None = None
        self._update: SliceUpdate | None = None
        self._kernel: Kernel | None = None
        """The settings of an eager update."""
        self.placed = False
        self._complete = False

    @property
    def issued(self) -> bool:
        """Whether all of its reads have begun, those of its update too."""
        return self.open or (self.placed and (self._update is None or self._update.all_read))

    @property
    def starved(self) -> bool:
        """Whether it waits for some buffer to be freed."""
        return not self.placed or (self._update is not None and self._update.starved)

    @property
    def updating(self) -> bool:
        """Whether its update is under way."""
        return self._update is not None and not self._update.finished

    @property
    def gathering(self) -> bool:
        """Whether its gather has been started."""
        return self._gathers is not None

    def issue(self) -> bool:
        """Start as many reads as memory allows; True when all of them are under way."""
        if self.open:
            return True
        if not self.placed and not (self.unit.life.readable(self.visit.nth) and self._place()):
            return False
        return self._update is None or self._update.read_ahead()

    def _place(self) -> bool:
        """Allocate one block for slot, gradient and earlier gradient; start the reads and the update.

        False where there is no room now.
        """
        unit, sizes = self.unit, self._sizes()
        block = None
        if any(sizes):
            arena = self._memory.resident if unit.layout.resident else self._memory.slots
            found = arena.allocate_ahead(sum(sizes))
            if found is None:
                return False
            block, self._before = found
        if unit.ranks.world_size > 1:
            self._ready = now(self._memory.slots.device)
        self._cut(block, sizes, unit.grads_in_place() if self._has_grads else None)
        self._read_params()
        if unit.life.update_due:
            unit.life.start_update(self._start_update(None, speculative=False))
        self.placed = True
        return True

    @property
    def num_bytes(self) -> int:
        """What it takes of an arena."""
        return sum(self._sizes())

    @property
    def _has_grads(self) -> bool:
        return self.visit.has_grads and bool(self.unit.layout.trainable)

    def _sizes(self) -> list[int]:
        """Bytes of slot, gradient and earlier gradient, as far as these do not lie in memory."""
        unit, layout = self.unit, self.unit.layout
        several = unit.ranks.world_size > 1
        sizes = [0, 0, 0]
        if self.visit.kind is not Kind.FLUSH:
            away = zip(layout.flats, unit.in_place(), strict=True)
            sizes[0] = sum(flat.num_bytes for flat, there in away if there is None)
        if self._has_grads:
            grads = unit.grads_in_place()
            if several or grads is None:
                sizes[1] = sum(flat.numel for flat in layout.trainable) * GRAD.item_bytes
            if several and self.visit.accumulate and grads is None:
                sizes[2] = sum(flat.slice_numel for flat in layout.trainable) * GRAD.item_bytes
        return sizes

    def _cut(self, block: Buffer | None, sizes: list[int], grads: list[torch.Tensor] | None) -> None:
        buffers: list[Buffer | None] = [None, None, None]
        for index, size in enumerate(sizes):
            if size and block is not None:
                last = not any(sizes[index + 1 :])
                buffers[index], block = (block, None) if last else block.split(size)
        self._slot, self._grad_buffer, self._earlier_buffer = buffers
        trained = self.unit.trained
        if self._grad_buffer is not None:
            values = self._grad_buffer.data.view(torch.float32)
            self.grads = list(values.split([flat.layout.numel for flat in trained]))
        elif grads is not None:
            self.grads = grads
        if self._earlier_buffer is not None:
            values = self._earlier_buffer.data.view(torch.float32)
            self.earlier_grads = list(values.split([flat.layout.slice_numel for flat in trained]))
        elif self.visit.accumulate and self.unit.ranks.world_size > 1 and grads is not None:
            self.earlier_grads = grads
        if self.visit.accumulate and self.grads and grads is None:
            self._read_grads(self.earlier_grads or self.grads)

    def _read_grads(self, into: Sequence[torch.Tensor]) -> None:
        """Start reading what earlier visits of the step left of the gradient."""
        for flat, values in zip(self.unit.trained, into, strict=True):
            assert flat.grad is not None
            self._earlier.append(flat.grad.read(0, values.view(torch.uint8), self._before))

    def _read_params(self) -> None:
        """Start reading this rank's slices into the slot. Those in memory are used, gathered or unpacked from there."""
        if self.visit.kind is Kind.FLUSH:
            return
        start = 0
        for flat, there in zip(self.unit.flats, self.unit.in_place(), strict=True):
            if there is not None:
                self.flats.append(there)
                self._moved.append(there)
                continue
            assert self._slot is not None
            end = start + flat.layout.num_bytes
            self.flats.append(self._slot.data[start:end].view(flat.dtype))
            moved = self._slot.data[end - flat.layout.moved_bytes : end].view(flat.dtype_of(PARAM))
            start = end
            stays = flat.slice_in_place()
            self._moved.append(moved if stays is None or self.unit.ranks.world_size > 1 else stays)
            if stays is None:
                own = self._own_part(flat, moved)
                read = flat.slice.read(0, own.view(torch.uint8), self._before)
                queued = self._ready is not None and read.event is not None and not self.unit.life.update_due
                (self._queued if queued else self._reads).append(read)

    def own_slices(self) -> list[torch.Tensor]:
        """This rank's slice of each flat (1-D): the update writes there, and the gather reads there."""
        own = []
        for flat, moved in zip(self.unit.flats, self._moved, strict=True):
            there = flat.slice_in_place()
            own.append(self._own_part(flat, moved) if there is None else there)
        return own

    def _own_part(self, flat: Flat, moved: torch.Tensor) -> torch.Tensor:
        return moved.chunk(self.unit.ranks.world_size)[flat.rank]

    def progress(self, wait: Wait = wait_if_done) -> bool:
        """Go on as far as the bytes that have arrived allow. True when the unit can be bound.

        `wait` may wait for the transfers that come next. TierError where one of them failed.
        """
        if not self._complete:
            self._complete = self.prepare(wait) and self._gathered(wait)
        return self._complete

    def _gathered(self, wait: Wait) -> bool:
        self.start_gather()
        assert self._gathers is not None
        if not self._settle(self._gathers, wait):
            return False
        if not self._settle(self._queued, wait):  # nothing is gathered that was dropped
            return False
        if not self._settle(self._earlier, wait):
            return False
        # a forward that clamps would change bytes of the slot that are still being written
        return self._update is None or not self.unit.clamped or self._settle(self._update.writes, wait)

    def prepare(self, wait: Wait = wait_if_done) -> bool:
        """The part of `progress` that comes before the gather: reads and update."""
        if not self.placed:
            return False
        if not self._settle(self._reads, wait):
            return False
        if self._update is not None and not self._update.finished:
            kernel = self._kernel or self._updates.kernel
            if kernel is None or not self._update.progress(kernel, partial(self._settle, wait=wait)):
                return False
            self.unit.life.finish_update()
            if self._ready is not None and not self.gathering:
                self._ready = now(self._memory.slots.device)
        return True

    def start_gather(self) -> None:
        """Start the gather, if it has not been; the bytes of this rank are there."""
        if self._gathers is None:
            self._gathers = self._start_gathers()

    def _start_gathers(self) -> list[Transfer]:
        ranks = self.unit.ranks
        if self._ready is None or not self.gather:
            return []
        with self._beside.behind([self._ready, *self._before]):
            for read in self._queued:
                read.wait()
            self._queued.clear()
            return [
                ranks.gather(moved, own, self._trace, self.unit.name)
                for moved, own in zip(self._moved, self.own_slices(), strict=True)
            ]

    @staticmethod
    def _settle(transfers: list[Transfer], wait: Wait) -> bool:
        if not all(map(wait, transfers)):
            return False
        transfers.clear()
        return True

    def update_now(self, grads: Sequence[torch.Tensor], kernel: Kernel, *, speculative: bool) -> None:
        """Start the eager update by `grads`, this rank's gradient slices (fp32, 1-D, in memory).

        Slot and gradient are held until `progress` returns True.
        """
        self._kernel, self._complete = kernel, False
        into = self._start_update(grads, speculative=speculative)
        if speculative:
            self.unit.life.speculate(into)
        else:
            self.unit.life.start_update(into)
            self.unit.life.count_update()

    def _start_update(self, grads: Sequence[torch.Tensor] | None, *, speculative: bool) -> list[dict[str, Extent]]:
        """Make the update of the trained flats, by `grads` or, where None, by what their tier holds.

        Returns where each flat will lie, by name of the field.
        """
        trained = self.unit.trained
        goes = [destination(flat, self._updates.sink, speculative=speculative) for flat in trained]
        # a flush has no slot
        own: Sequence[torch.Tensor | None] = self.own_slices() if self.flats else [f.slice_in_place() for f in trained]
        before = [] if self._update is None else under_way(self._update.writes)
        self._update = SliceUpdate(self.unit, own[: len(goes)], self._memory, self._trace, goes, grads, before)
        return [flat.into for flat in goes]

    def bind(self) -> None:
        """Let the model compute on the buffers of this visit.

        Gradients begin with zeros, or with those of earlier visits, as in plain PyTorch.
        """
        self._come_behind()
        self._unpack()
        self.unit.bind(self.flats)
        if self.visit.kind is Kind.BACKWARD:
            self.unit.hold_to_bounds()
        if self.grads:
            if not self.visit.accumulate:
                self.unit.life.clear_gradient()
            for grad in () if self.visit.accumulate and not self.earlier_grads else self.grads:
                grad.zero_()
            self.unit.bind_grads(self.grads)

    def _unpack(self) -> None:
        """Fill the flats that came packed with their values."""
        for flat, values, moved in zip(self.unit.flats, self.flats, self._moved, strict=True):
            if flat.layout.packing is not None:
                with self._trace.span("compute", f"{self.unit.name} unpack", moved.numel()):
                    flat.unpack(moved, values)

    def _come_behind(self) -> None:
        """Let the current stream wait for what used this memory before."""
        wait_for(self._before, self._memory.slots.device)
        self._before = []

    def free(self) -> None:
        """Free all buffers; no visit follows."""
        if self.placed:
            self._come_behind()
            self.free_slot()
            self.free_grad([])

    def free_slot(self) -> None:
        """Free the slot as soon as the update's writes, which read it, are done."""
        if self._slot is not None:
            writes = self._update.writes if self._update is not None else []
            self._memory.free_after(writes, [self._slot])

    def free_grad(self, writes: list[Transfer]) -> None:
        """Free the buffers of gradients as soon as `writes`, which read them, are done."""
        buffers = [b for b in (self._grad_buffer, self._earlier_buffer) if b is not None]
        self._memory.free_after(writes, buffers)

    @property
    def grad_in_buffer(self) -> bool:
        """Whether the gradient lies in a buffer of this visit, and not in place on its tier."""
        return self._grad_buffer is not None
