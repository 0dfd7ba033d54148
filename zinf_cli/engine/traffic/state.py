"""State between the units and a checkpoint, a piece at a time, out and in.

A flat's state on one rank is its slice of the fields that a checkpoint stores (`Flat.stored`). Gradients are no state
between two steps, since they are used up. 16-bit parameters that are trained are none either: they are the masters,
rounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.units.store import Flat, Unit, overlap
from zinf_cli.engine.units.units import FlatLayout
from zinf_cli.model_state import MASTER, PIECE, Field
from zinf_cli.tiers.arena import Buffer
from zinf_cli.tiers.tier import DONE, Extent, Transfer

AHEAD = 8
"""Pieces under way at once, where there is room for them."""


class StateSource(Protocol):
    """Where state comes from. It is asked for by parameter, however it is cut into slices."""

    def read(self, name: str, field: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a parameter's field: 1-D, on the CPU, in any dtype.

        `field` is the name in a checkpoint. DamagedError where checksums do not match.
        """

    def updates(self, name: str, first: int) -> int:
        """How often the parameter has been updated, at its element `first`."""


def fields_of(unit: Unit) -> Iterator[tuple[Flat, Field, Extent]]:
    """(flat, field, extent) for each stored field of a unit: where this rank's slice of it lies now."""
    for flat in unit.flats:
        for field in flat.stored:
            yield flat, field, flat.at[field.name]


def save_state(fields: Iterable[tuple[Extent, Extent]], memory: Memory) -> None:
    """Copy each (extent, region of a StateSink). No update may be pending and no buffer in use.

    TierError where a read or a write failed.
    """
    under_way: deque[_Copy] = deque()
    for extent, region in fields:
        for start in range(0, extent.num_bytes, PIECE):
            copy = _Copy(start, extent, region)
            while len(under_way) >= AHEAD or not copy.issue(memory):
                under_way.popleft().finish()
            under_way.append(copy)
            for earlier in under_way:
                earlier.progress()
    for copy in under_way:
        copy.finish()


class _Copy:
    """A piece on its way into a checkpoint."""

    def __init__(self, start: int, extent: Extent, region: Extent) -> None:
        self._start = start
        self._extent = extent
        self._region = region
        self._buffer: Buffer | None = None
        self._data: torch.Tensor
        self._read: Transfer = DONE
        self._write: Transfer | None = None

    def issue(self, memory: Memory) -> bool:
        """Start reading; False where there is no buffer now."""
        end = min(self._start + PIECE, self._extent.num_bytes)
        view = self._extent.view()
        if view is not None:
            self._data = view[self._start : end]
            return True
        self._buffer = _buffer(memory, end - self._start)
        if self._buffer is None:
            return False
        self._data = self._buffer.data
        self._read = self._extent.read(self._start, self._data)
        return True

    def progress(self) -> None:
        """Start writing what has been read."""
        if self._write is None and self._read.done():
            self._start_write()

    def finish(self) -> None:
        """Wait until it is written. The read may still be on its way on a stream, where the write comes behind it."""
        write = self._write or self._start_write()
        write.wait()
        if self._buffer is not None:
            self._buffer.free()

    def _start_write(self) -> Transfer:
        self._read.wait()
        self._write = self._region.write(self._start, self._data)
        return self._write


def load_state(units: Sequence[Unit], memory: Memory, source: StateSource) -> None:
    """Fill every unit's slices from `source`. No buffer may be in use. TierError where a write failed."""
    writes: deque[tuple[Transfer, Buffer]] = deque()
    for unit in units:
        trained = [place for flat in unit.trained for place in flat.layout.params]
        unit.life.resume([source.updates(place.origin, place.first) for place in trained])
        for flat, field, extent in fields_of(unit):
            dtype = flat.dtype_of(field)
            rounded = flat.slice if field == MASTER else None
            for start in range(0, extent.num_bytes, PIECE):
                first, numel = start // dtype.itemsize, min(PIECE, extent.num_bytes - start) // dtype.itemsize
                values = _gather(source, flat.layout, flat.rank, field.stored, first, numel, dtype)
                _put(extent, start, values, memory, writes)
                if rounded is not None:
                    _put(rounded, first * flat.dtype.itemsize, values.to(flat.dtype), memory, writes)
    while writes:
        _finish(writes)


def _gather(
    source: StateSource, layout: FlatLayout, rank: int, field: str, begin: int, numel: int, dtype: torch.dtype
) -> torch.Tensor:
    """Elements [begin, begin + numel) of this rank's slice (1-D); padding is zero."""
    values = torch.zeros(numel, dtype=dtype)
    base = rank * layout.slice_numel + begin
    for place in layout.params:
        first, last = overlap(place, base, base + numel)
        if first < last:
            begin_there = first - place.offset + place.first
            values[first - base : last - base] = source.read(
                place.origin, field, begin_there, begin_there + last - first
            )
    return values


def _put(
    extent: Extent, start: int, values: torch.Tensor, memory: Memory, writes: deque[tuple[Transfer, Buffer]]
) -> None:
    """Put `values` into an extent at byte `start`. A write is left under way, in `writes`."""
    data = values.view(torch.uint8)
    view = extent.view()
    if view is not None:
        view[start : start + data.numel()].copy_(data)
        return
    while (buffer := _buffer(memory, data.numel())) is None:
        _finish(writes)
    buffer.data.copy_(data)
    writes.append((extent.write(start, buffer.data), buffer))


def _finish(writes: deque[tuple[Transfer, Buffer]]) -> None:
    transfer, buffer = writes.popleft()
    transfer.wait()
    buffer.free()


def _buffer(memory: Memory, num_bytes: int) -> Buffer | None:
    """A chunk buffer; where the plan has none, or all are taken, a part of the slot arena; None where both are full."""
    return memory.chunks.allocate(num_bytes) or memory.slots.allocate(num_bytes)
