"""State between the units and a checkpoint, a piece at a time, out and in.

A flat's state on one rank is its slice of the fields that a checkpoint stores (`Flat.stored`). Gradients are no state
between two steps, since they are used up. Parameters with fp32 masters of their own are none either: they are the
masters, rounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch

from zinf_cli.engine.eight_bits import Blocks, blocks_in, set_signs
from zinf_cli.engine.packed import pack
from zinf_cli.engine.precision import STORED
from zinf_cli.engine.split_masters import split
from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.units.store import Flat, Unit, overlap
from zinf_cli.engine.units.units import ParamLayout
from zinf_cli.model_state import CHUNK_NUMEL, FROZEN, MASTER, PARAM, REMAINDER, SCALED, Field, bytes_of
from zinf_cli.tiers.arena import Buffer
from zinf_cli.tiers.tier import DONE, Extent, Transfer
from zinf_cli.told import Tell, nobody

AHEAD = 8
"""Pieces under way at once, where there is room for them."""


class StateSource(Protocol):
    """Where state comes from. It is asked for by parameter, however it is cut into slices."""

    def read(self, name: str, field: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a parameter's field: 1-D, on the CPU, in any dtype.

        `field` is the name in a checkpoint. DamagedError where checksums do not match.
        """

    def blocks(self, name: str, field: str, first: int, last: int) -> Blocks:
        """The same in eight bits, in blocks from element `first` on: as they are stored, if they are stored so."""

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
        piece = region.checksums.piece
        for start in range(0, extent.num_bytes, piece):
            copy = _Copy(start, min(start + piece, extent.num_bytes), extent, region)
            while len(under_way) >= AHEAD or not copy.issue(memory):
                under_way.popleft().finish()
            under_way.append(copy)
            for earlier in under_way:
                earlier.progress()
    for copy in under_way:
        copy.finish()


class _Copy:
    """A piece on its way into a checkpoint."""

    def __init__(self, start: int, end: int, extent: Extent, region: Extent) -> None:
        self._start = start
        self._end = end
        self._extent = extent
        self._region = region
        self._buffer: Buffer | None = None
        self._data: torch.Tensor
        self._read: Transfer = DONE
        self._write: Transfer | None = None

    def issue(self, memory: Memory) -> bool:
        """Start reading; False where there is no buffer now."""
        view = self._extent.view()
        if view is not None:
            self._data = view[self._start : self._end]
            return True
        self._buffer = _buffer(memory, self._end - self._start)
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


def load_state(units: Sequence[Unit], memory: Memory, source: StateSource, told: Tell = nobody) -> None:
    """Fill every unit's slices from `source`. No buffer may be in use. TierError where a write failed."""
    writes: deque[tuple[Transfer, Buffer]] = deque()
    for number, unit in enumerate(units, 1):
        trained = [place for flat in unit.trained for place in flat.layout.params]
        unit.life.resume([source.updates(place.origin, place.first) for place in trained])
        for flat in unit.flats:
            _load(flat, flat.stored, partial(_stored_values, source), memory, writes)
        told(number / len(units))
    while writes:
        _finish(writes)


def load_params(
    units: Sequence[Unit],
    memory: Memory,
    read: Callable[[Sequence[str]], Mapping[str, torch.Tensor]],
    flats_of: Callable[[Unit], Sequence[Flat]],
    told: Tell = nobody,
) -> None:
    """Fill parameters of every unit from `read(names)`, which gives tensors of any dtype, one unit at a time.

    `flats_of` says which of a unit's flats. The fields of the optimizer are zero, as they are in new extents.
    """
    writes: deque[tuple[Transfer, Buffer]] = deque()
    for number, unit in enumerate(units, 1):
        flats = flats_of(unit)
        values = read([param.name for flat in flats for param in flat.layout.params])
        for flat in flats:
            _load(flat, flat.stored[:1] or (FROZEN,), partial(_whole_values, values), memory, writes)
        del values  # before the next unit's are read
        told(number / len(units))
    while writes:
        _finish(writes)


_Values = Callable[[Field, ParamLayout, int, int], torch.Tensor | Blocks]
"""Gives elements [first, last) of a parameter's field: 1-D, on the CPU, in any dtype. Blocks of a SCALED one."""


def _stored_values(
    source: StateSource, field: Field, place: ParamLayout, first: int, last: int
) -> torch.Tensor | Blocks:
    read = source.blocks if field.dtype == SCALED else source.read
    return read(place.origin, field.stored, place.first + first, place.first + last)


def _whole_values(
    values: Mapping[str, torch.Tensor], _: Field, place: ParamLayout, first: int, last: int
) -> torch.Tensor:
    return values[place.name].reshape(-1)[first:last]


def _load(
    flat: Flat,
    fields: Sequence[Field],
    values_of: _Values,
    memory: Memory,
    writes: deque[tuple[Transfer, Buffer]],
) -> None:
    """Fill this rank's slice of `fields`, a piece of elements at a time; factors at once."""
    for field in (field for field in fields if field.factored):
        places, numel = flat.layout.factors
        values = torch.zeros(numel)
        for place, (first, last) in zip(flat.layout.params, places, strict=True):
            piece = values_of(field, place, 0, last - first)
            assert isinstance(piece, torch.Tensor)
            values[first:last] = piece
        _put(flat.at[field.name], 0, values, memory, writes)
    fields = [field for field in fields if not field.factored]
    for begin in range(0, flat.layout.slice_numel, CHUNK_NUMEL):
        numel = min(CHUNK_NUMEL, flat.layout.slice_numel - begin)
        pieces = {field: _gather(values_of, flat, field, begin, numel) for field in fields if field is not REMAINDER}
        if flat.carrier is not None:
            pieces |= _split(pieces[PARAM], pieces.get(flat.carrier), flat.carrier)
        if MASTER in pieces:
            pieces[PARAM] = pieces[MASTER].to(flat.dtype)
        for field, values in pieces.items():
            _put(flat.at[field.name], flat.num_bytes(field, begin), values, memory, writes)


def _split(master: torch.Tensor, carried: torch.Tensor | None, carrier: Field) -> dict[Field, torch.Tensor]:
    """The fields that `master` (fp32) is kept in. Without values, `carried` is zeros: left out if no sign is set."""
    scaled = carrier.dtype == SCALED
    values = torch.zeros_like(master) if carried is None or scaled else carried.float()
    param, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split(master, param, remainder, values)
    found = {PARAM: param, REMAINDER: remainder}
    if carried is None and not values.signbit().any():
        return found
    if not scaled:
        return {**found, carrier: values.to(STORED[carrier.dtype or "F32"])}
    data = _no_blocks(master.numel()) if carried is None else carried
    for first, blocks in blocks_in(data, master.numel(), 0, master.numel()):
        set_signs(blocks.codes, values[first:][: blocks.codes.numel()])
    return {**found, carrier: data}


def _no_blocks(numel: int) -> torch.Tensor:
    """Zeros in eight bits, as a tier has them: uint8."""
    return torch.zeros(bytes_of(SCALED, numel), dtype=torch.uint8)


def _gather(values_of: _Values, flat: Flat, field: Field, begin: int, numel: int) -> torch.Tensor:
    """Elements [begin, begin + numel) of this rank's slice (1-D); padding is zero. Masters are not split yet; what
    is kept packed is packed."""
    packing = flat.layout.packing
    if field.dtype == SCALED:
        values = _no_blocks(numel)
    else:
        in_fp32 = packing is not None or (field is PARAM and flat.carrier is not None)
        values = torch.zeros(numel, dtype=torch.float32 if in_fp32 else flat.dtype_of(field))
    base = flat.rank * flat.layout.slice_numel + begin
    for place in flat.layout.params:
        first, last = overlap(place, base, base + numel)
        if first < last:
            piece = values_of(field, place, first - place.offset, last - place.offset)
            if isinstance(piece, Blocks):
                ((_, into),) = blocks_in(values, numel, first - base, last - base)
                into.codes.copy_(piece.codes)
                into.scales.copy_(piece.scales)
            else:
                values[first - base : last - base] = piece
    return values if packing is None else pack(values, packing)


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
