"""The state of the units in and out, a piece at a time: what a checkpoint is written from and read into.

A unit's state on one rank is its slice of a few fields: "param" (fp32: the master where the compute is 16-bit),
"exp_avg" and "exp_avg_sq" of what is trained, "frozen" (in the dtype of the compute) of what is not. Gradients and
16-bit parameters are no state between two steps: the ones are used up, the others are the masters, rounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from zinf_cli.engine.store import Unit, overlap
from zinf_cli.engine.units import FlatLayout
from zinf_cli.engine.visit import Memory
from zinf_cli.tiers.arena import Buffer
from zinf_cli.tiers.tier import DONE, Extent, Transfer

PIECE = 4 * 2**20
"""Bytes that are moved at once."""
AHEAD = 8
"""Pieces under way, where there is room for them."""


class StateSink(Protocol):
    """Where state goes."""

    def write(self, unit: str, field: str, start: int, data: torch.Tensor) -> None:
        """Take bytes `start` and on of this rank's slice of a field; `data` (uint8, on the compute device) is free
        again on return. `start` is a multiple of PIECE, and only a field's last piece is shorter than PIECE."""


class StateSource(Protocol):
    """Where state comes from, cut into slices or not: it is asked for by parameter."""

    def read(self, name: str, field: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a parameter's field, on the CPU, in any dtype."""

    def updates(self, name: str) -> int:
        """How often the parameter has been updated."""


def fields_of(unit: Unit) -> Iterator[tuple[str, FlatLayout, Extent]]:
    """Each field of a unit with the flat it belongs to and where its slice lies now."""
    for layout, extent in zip(unit.layout.flats, unit.slices, strict=True):
        if not layout.trainable:
            yield "frozen", layout, extent
            continue
        yield "param", layout, unit.optimizer.get("master", extent)
        for name in ("exp_avg", "exp_avg_sq"):
            yield name, layout, unit.optimizer[name]


def save_state(units: Sequence[Unit], memory: Memory, sink: StateSink) -> None:
    """Hand every unit's slices to `sink`, in order, reading ahead; no update is pending and no buffer in use."""
    ahead: deque[_Read] = deque()
    for unit in units:
        for field, _, extent in fields_of(unit):
            for start in range(0, extent.num_bytes, PIECE):
                piece = _Read(unit.name, field, start, extent)
                while len(ahead) >= AHEAD or not piece.issue(memory):
                    ahead.popleft().hand_to(sink)
                ahead.append(piece)
    for piece in ahead:
        piece.hand_to(sink)


class _Read:
    """A piece on its way out."""

    def __init__(self, unit: str, field: str, start: int, extent: Extent) -> None:
        self._where = (unit, field, start)
        self._extent = extent
        self._buffer: Buffer | None = None
        self._data: torch.Tensor
        self._read: Transfer = DONE

    def issue(self, memory: Memory) -> bool:
        """Start reading; False where there is no buffer now."""
        start = self._where[2]
        end = min(start + PIECE, self._extent.num_bytes)
        view = self._extent.view()
        if view is not None:
            self._data = view[start:end]
            return True
        self._buffer = _buffer(memory, end - start)
        if self._buffer is None:
            return False
        self._data = self._buffer.data
        self._read = self._extent.read(start, self._data)
        return True

    def hand_to(self, sink: StateSink) -> None:
        self._read.wait()
        sink.write(*self._where, self._data)
        if self._buffer is not None:
            self._buffer.free()


def load_state(units: Sequence[Unit], memory: Memory, source: StateSource) -> None:
    """Fill every unit's slices from `source`; nothing of the engine is in use."""
    writes: deque[tuple[Transfer, Buffer]] = deque()
    for unit in units:
        trainable = unit.layout.trainable
        unit.steps = [source.updates(place.name) for place in trainable.params] if trainable is not None else []
        for field, layout, extent in fields_of(unit):
            dtype = unit.dtype if field == "frozen" else torch.float32
            rounded = unit.slices[0] if field == "param" and extent is not unit.slices[0] else None
            for start in range(0, extent.num_bytes, PIECE):
                numel = min(PIECE, extent.num_bytes - start) // dtype.itemsize
                values = _gather(source, layout, unit.ranks.rank, field, start // dtype.itemsize, numel, dtype)
                _put(extent, start, values, memory, writes)
                if rounded is not None:
                    _put(rounded, start // dtype.itemsize * unit.dtype.itemsize, values.to(unit.dtype), memory, writes)
    while writes:
        _finish(writes)


def _gather(
    source: StateSource, layout: FlatLayout, rank: int, field: str, begin: int, numel: int, dtype: torch.dtype
) -> torch.Tensor:
    """Elements [begin, begin + numel) of this rank's slice, from the parameters they belong to."""
    values = torch.zeros(numel, dtype=dtype)
    base = rank * layout.slice_numel + begin
    for place in layout.params:
        first, last = overlap(place, base, base + numel)
        if first < last:
            values[first - base : last - base] = source.read(
                place.name, field, first - place.offset, last - place.offset
            )
    return values


def _put(
    extent: Extent, start: int, values: torch.Tensor, memory: Memory, writes: deque[tuple[Transfer, Buffer]]
) -> None:
    """Bring `values` to their place in an extent; writes are left under way."""
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
    """A buffer of the update, or of the slots where the plan gave the update none."""
    return memory.chunks.allocate(num_bytes) or memory.slots.allocate(num_bytes)
