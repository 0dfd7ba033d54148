"""The update of a slice, chunk by chunk.

Where a chunk's gradient and optimizer states lie in memory of the compute device, they are used in place. Otherwise
they are read into chunk buffers, and written back when the kernel has changed them. The parameters are updated in the
slot (or in place); if no visit needs them, they pass through chunk buffers, too. Where parameters are 16-bit, the
kernel acts on the fp32 master, and the slot gets it rounded. A split master is joined for that, a block at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from zinf_cli.engine.eight_bits import Blocks, blocks_in, decoded, encode
from zinf_cli.engine.split_masters import join, split
from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.traffic.destination import Destination, StateSink
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.units.store import Flat, Unit, overlap
from zinf_cli.model_state import (
    BLOCK_NUMEL,
    CHUNK_NUMEL,
    DEVICE_BLOCK_NUMEL,
    GRAD,
    MASTER,
    PARAM,
    REMAINDER,
    SCALED,
    Field,
)
from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.streams import Event
from zinf_cli.tiers.tier import Extent, Transfer, under_way
from zinf_cli.trace import Trace


@dataclass
class Updates:
    """What the engine tells the updates of a step."""

    kernel: Kernel | None = None
    """The settings of deferred updates; None while they wait for the step's gradient norm."""
    sink: StateSink | None = None
    """The checkpoint that updates go into, see destination.py."""


class ChunkUpdate:
    """The update of elements [begin, end) of the slice of a trainable flat."""

    def __init__(
        self,
        flat: Flat,
        begin: int,
        end: int,
        given: Mapping[Field, torch.Tensor],
        sources: Mapping[Field, Extent],
        goes: Destination,
        trace: Trace,
        *,
        zeros: bool,
    ) -> None:
        """`given` has what lies in memory that others hold; `sources` says where the other fields lie. `zeros`: the
        gradient is that, and is not read."""
        self._flat = flat
        self._sources = sources
        self._goes = goes
        self._begin = begin
        self._end = end
        self._trace = trace
        self._zeros = zeros
        self._fields = dict(given)
        self._in_slot = PARAM in given
        self._buffers: list[Buffer] = []
        self._writes: list[Transfer] = []
        self.reads: list[Transfer] = []

    def read(self, chunks: Arena) -> bool:
        """Start reading what does not lie in memory of the compute device. False where chunk buffers are lacking."""
        begin, end = self._begin, self._end
        where: dict[Field, tuple[Buffer, list[Event]]] = {}
        for field, extent in self._sources.items():
            if extent.view() is None:
                num_bytes = self._flat.num_bytes(field, end - begin)
                found = chunks.allocate_ahead(num_bytes) if self._is_read(field) else _room(chunks, num_bytes)
                if found is None:
                    for buffer, events in where.values():
                        buffer.free(events)
                    return False
                where[field] = found
        self._buffers = [buffer for buffer, _ in where.values()]
        for field, extent in self._sources.items():
            memory, start, dtype = extent.view(), self._flat.num_bytes(field, begin), self._flat.dtype_of(field)
            if memory is not None:
                self._fields[field] = memory[start : start + self._flat.num_bytes(field, end - begin)].view(dtype)
            else:
                buffer, events = where[field]
                self._fields[field] = buffer.data.view(dtype)
                if self._is_read(field):
                    self.reads.append(extent.read(start, buffer.data, events))
            if self._zeros and field is GRAD:
                self._fields[field].zero_()
        for extent in self._goes.into.values():
            if extent.view() is not None:  # a checkpoint may still be copying the version before
                self.reads.extend(extent.writes)
        return True

    def _is_read(self, field: Field) -> bool:
        """Whether the values of a field that lies elsewhere are needed. A parameter is its master, rounded anew."""
        return not (self._zeros and field is GRAD) and not (field is PARAM and MASTER in self._sources)

    def apply(self, kernel: Kernel) -> list[Transfer]:
        """Compute, and start to write back. Returns the writes that read the slot: it is held until these are done."""
        param = self._fields[PARAM]
        with self._trace.span("update", self._flat.unit, param.numel() * GRAD.item_bytes):
            if param.dtype == torch.float32:
                self._hold_to_bounds(param)
            for start, end, step, own in self._segments(kernel):
                self._update(own, start, end, step)
            if MASTER in self._fields:
                param.copy_(self._fields[MASTER])
        for field in self._flat.beside:
            self._writes += self._send(field, self._fields[field])
        writes = self._send(PARAM, param)
        if self._in_slot:
            return writes
        self._writes += writes
        return []

    def _update(self, kernel: Kernel, start: int, end: int, step: int) -> None:
        """Let the kernel update elements [start, end) of the chunk."""
        carrier, stored = self._flat.carrier, self._flat.moments
        as_they_are = carrier is None and all(self._fields[field].dtype == torch.float32 for field in (GRAD, *stored))
        at_once = as_they_are or self._flat.layout.whole
        most = end - start if at_once else DEVICE_BLOCK_NUMEL if kernel.fused else BLOCK_NUMEL
        for begin in range(start, end, most):
            last = min(end, begin + most)
            block = {field: values[self._range(field, begin, last)] for field, values in self._fields.items()}
            moments = {field: self._moment(field, begin, last) for field in stored}
            master = block.get(MASTER, block[PARAM])
            if carrier is not None:
                master = join(block[PARAM], block[REMAINDER], moments[carrier])
            kernel.update(master, block[GRAD].float(), *moments.values(), step)
            if carrier is not None:
                split(master, block[PARAM], block[REMAINDER], moments[carrier])
            for field, values in moments.items():
                if field.dtype == SCALED:
                    for first, blocks in self._blocks(field, begin, last):
                        encode(values[first - begin :][: blocks.codes.numel()], blocks)
                elif block[field].dtype != torch.float32:
                    block[field].copy_(values)

    def _moment(self, field: Field, begin: int, end: int) -> torch.Tensor:
        """What the optimizer keeps of elements [begin, end): fp32, in place if it is kept so."""
        if field.dtype != SCALED:
            return self._fields[field][self._range(field, begin, end)].float()
        return torch.cat([decoded(blocks) for _, blocks in self._blocks(field, begin, end)])[: end - begin]

    def _range(self, field: Field, begin: int, end: int) -> slice:
        """Where a field has its values of elements [begin, end): these are a parameter, if it is factored."""
        if not field.factored:
            return slice(begin, end)
        layout = self._flat.layout
        found = dict(zip((place.offset for place in layout.params), layout.factors[0], strict=True))
        return slice(*found[begin])

    def _blocks(self, field: Field, begin: int, end: int) -> Iterator[tuple[int, Blocks]]:
        return blocks_in(self._fields[field], self._end - self._begin, begin, end)

    def _send(self, field: Field, values: torch.Tensor) -> list[Transfer]:
        """Start writing the new values of `field` to where they go; values in place need no write."""
        data = values.view(torch.uint8)
        start = self._flat.num_bytes(field, self._begin)
        home, copy = self._goes.into[field.name], self._goes.also.get(field.name)
        writes = [home.write(start, data)] if home.view() is None else []
        if copy is not None:
            writes.append(copy.write(start, data))
            if home.view() is not None:
                home.writes = [*under_way(home.writes), *writes]
        return writes

    def trailing(self) -> tuple[list[Transfer], list[Buffer]]:
        """The write-backs, and the buffers that are free when these are done."""
        return self._writes, self._buffers

    def _hold_to_bounds(self, param: torch.Tensor) -> None:
        """Clamp the parameters to their bounds, as the forward did with its copy."""
        layout = self._flat.layout
        base = self._flat.rank * layout.slice_numel + self._begin
        for place, touched in zip(layout.params, self._flat.touched, strict=True):
            first, last = overlap(place, base, base + param.numel())
            if place.bounds is not None and touched and first < last:
                param[first - base : last - base].clamp_(*place.bounds)

    def _segments(self, kernel: Kernel) -> Iterator[tuple[int, int, int, Kernel]]:
        """(start, end, step, kernel) of ranges that share an update count and a weight decay.

        Parameters that are not touched are left out.
        """
        flat, layout = self._flat, self._flat.layout
        free = kernel.no_decay.intersection(place.name for place in layout.params)
        if not layout.whole:
            kernel = kernel.of(None)
        if not layout.whole and all(flat.touched) and len(set(flat.steps)) == 1 and not free:
            yield 0, self._end - self._begin, flat.steps[0], kernel
            return
        base = flat.rank * layout.slice_numel + self._begin
        for place, touched, step in zip(layout.params, flat.touched, flat.steps, strict=True):
            first, last = overlap(place, base, base + self._end - self._begin)
            if touched and first < last:
                own = kernel.of(place.shape) if layout.whole else kernel
                yield first - base, last - base, step, own.undecayed() if place.name in free else own


def _room(chunks: Arena, num_bytes: int) -> tuple[Buffer, list[Event]] | None:
    """A chunk buffer that is used at once."""
    buffer = chunks.allocate(num_bytes)
    return None if buffer is None else (buffer, [])


class SliceUpdate:
    """The update of this rank's trainable slices of a unit. Reads run ahead as far as there are chunk buffers.

    `own` has the parameter slice of each trainable flat, in the flat's dtype, where compute sees it. None stands for
    one that nothing computes with: the update streams it as it does the other fields. `grads` has the gradient slices
    (fp32, or narrowed); without them the update reads the gradient from its tier. The memory of both is held until
    `progress` has returned True and `writes` are done. `goes` says where the new values of each flat go. `after` are
    writes that still read `own`: nothing is changed before they are done.
    """

    def __init__(
        self,
        unit: Unit,
        own: Sequence[torch.Tensor | None],
        memory: Memory,
        trace: Trace,
        goes: Sequence[Destination],
        grads: Sequence[torch.Tensor] | None = None,
        after: Sequence[Transfer] = (),
    ) -> None:
        chunks: list[ChunkUpdate] = []
        for number, flat in enumerate(unit.trained):
            # where it lies now: a transition of its life may move it while the update is under way
            sources = {field: flat.at[field.name] for field in flat.beside}
            given = {PARAM: own[number], GRAD: None if grads is None else grads[number]}
            if given[PARAM] is None:
                sources[PARAM] = flat.slice
            if given[GRAD] is None:
                assert flat.grad is not None
                sources[GRAD] = flat.grad
            numel = flat.layout.slice_numel
            step = numel if flat.layout.whole else memory.chunk_numel
            assert numel <= step or step % CHUNK_NUMEL == 0 or not flat.scaled
            for begin in range(0, numel, step):
                end = min(numel, begin + step)
                there = {field: values[begin:end] for field, values in given.items() if values is not None}
                chunks.append(ChunkUpdate(flat, begin, end, there, sources, goes[number], trace, zeros=unit.life.zeros))
        self._memory = memory
        self._chunks = deque(chunks)
        self._unread = deque(chunks)
        self._chunks[0].reads.extend(after)
        self.writes = list(after)
        """Writes of the parameters, which read the slot."""

    @property
    def finished(self) -> bool:
        """Whether all chunks are computed. Writes may still be under way."""
        return not self._chunks

    @property
    def starved(self) -> bool:
        """Whether it waits for a chunk buffer to be freed."""
        return bool(self._unread) and self._unread[0] is self._chunks[0]

    @property
    def all_read(self) -> bool:
        """Whether every read is under way."""
        return not self._unread

    def read_ahead(self) -> bool:
        """Start as many reads as there are chunk buffers for. True when all have been started."""
        while self._unread and self._unread[0].read(self._memory.chunks):
            self._unread.popleft()
        return not self._unread

    def progress(
        self,
        kernel: Kernel,
        settle: Callable[[list[Transfer]], bool],
    ) -> bool:
        """Compute the chunks whose reads are done. True when all are computed.

        `settle` tells whether reads are done, and may wait for them.
        """
        while self._chunks:
            self.read_ahead()
            if self.starved or not settle(self._chunks[0].reads):
                return False
            chunk = self._chunks.popleft()
            self.writes.extend(chunk.apply(kernel))
            self._memory.free_after(*chunk.trailing())
        return True
