"""Exact-size, page-aligned buffers from one region of memory.

The region is mapped once, with the capacity that the plan allows. Pages that are never used cost nothing. Buffers are
cut first-fit from the low end, so the peak of resident memory is the peak of the bytes in use. A freed range merges
with the free ranges beside it.

torch's own CPU allocator is not used for streamed bytes: it aligns to 64 bytes, which O_DIRECT refuses, and memory that
it gives back to malloc may stay resident. Huge pages halve the CPU time of direct I/O, since the kernel pins pages one
by one, and spare compute its TLB misses. A forked process does not get the region: a page that a child shares is copied
at the next write, and btrfs writes shared pages through the page cache.
"""

from __future__ import annotations

import contextlib
import mmap
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from zinf_cli.model_state import round_up
from zinf_cli.tiers.pinned import pin, unpin
from zinf_cli.tiers.streams import Event, now, streams_of, wait_for

HUGE_PAGE = 2**21


class Buffer:
    """A range of an arena: `data` is its uint8 view, on the arena's device. Free it exactly once.

    Autograd counts changes of a tensor together with those of all its views. The `data` of each buffer has a count of
    its own, so a drive that fills one buffer does not make autograd refuse what lies in another.
    """

    __slots__ = ("_arena", "_offset", "data")

    def __init__(self, arena: Arena, offset: int, data: torch.Tensor) -> None:
        self._arena = arena
        self._offset = offset
        self.data = data

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    def free(self, after: Sequence[Event] = ()) -> None:
        """Give the range back. `data` must not be used afterwards, but for what the current stream has queued so far,
        and what is over with the events `after`: whoever has the range next waits for these."""
        self._arena._take_back(self._offset, round_up(self.data.numel()), after)

    def split(self, first_bytes: int) -> tuple[Buffer, Buffer]:
        """Two buffers in place of this one, to be freed one by one. `first_bytes` is a multiple of PAGE."""
        return (
            Buffer(self._arena, self._offset, self.data[:first_bytes].data),
            Buffer(self._arena, self._offset + first_bytes, self.data[first_bytes:].data),
        )


class Arena:
    """`capacity` bytes on `device`, handed out in page-aligned buffers of exact size.

    On an accelerator, work that is queued may still use a freed range. Events say when that is over, so a range is free
    for the CPU, and fetches are queued far ahead, before the device is done with it.
    """

    def __init__(self, capacity: int, device: torch.device, *, pin_for: torch.device | None = None) -> None:
        """With `pin_for`, an accelerator, CPU memory is page-locked for copies from and to it (`pinned`), if it can be.
        `unpin` has to be called then, before the arena is dropped."""
        self.capacity = round_up(max(1, capacity))
        self.device = device
        self.used = 0
        self.peak = 0
        self._holes: list[tuple[int, int]] = [(0, self.capacity)]  # (offset, size), by offset
        self._used: list[tuple[int, int, Sequence[Event]]] = []  # (begin, end, events) of holes that were in use
        if device.type == "cpu":
            self._map = mmap.mmap(-1, self.capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if self.capacity >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    self._map.madvise(mmap.MADV_HUGEPAGE)
            if hasattr(mmap, "MADV_DONTFORK"):
                self._map.madvise(mmap.MADV_DONTFORK)
            self._region = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self._region = torch.empty(self.capacity, dtype=torch.uint8, device=device)
        self._pinned_for = pin_for if pin_for is not None and pin(self._region, pin_for) else None

    def allocate(self, num_bytes: int) -> Buffer | None:
        """A buffer of `num_bytes`, or None when no hole is large enough now. The current stream may use it."""
        found = self.allocate_ahead(num_bytes)
        if found is None:
            return None
        wait_for(found[1], self.device)
        return found[0]

    def allocate_ahead(self, num_bytes: int) -> tuple[Buffer, list[Event]] | None:
        """A buffer, and the events that a stream has to wait for before it uses it."""
        size = round_up(num_bytes)
        for index, (offset, hole) in enumerate(self._holes):
            if hole >= size:
                if hole == size:
                    del self._holes[index]
                else:
                    self._holes[index] = (offset + size, hole - size)
                self.used += size
                self.peak = max(self.peak, self.used)
                buffer = Buffer(self, offset, self._region[offset : offset + num_bytes].data)
                return buffer, self._events_of(offset, offset + size)
        return None

    def _events_of(self, begin: int, end: int) -> list[Event]:
        """The events of a range that is in use again, and their end."""
        events: list[Event] = []
        left: list[tuple[int, int, Sequence[Event]]] = []
        for first, last, of_range in self._used:
            if first < end and begin < last:
                events.extend(of_range)
                outside = ((first, begin), (end, last))
                left.extend((start, stop, of_range) for start, stop in outside if start < stop)
            else:
                left.append((first, last, of_range))
        self._used = left
        return events

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in this region."""
        return bool(tensor.untyped_storage()._cdata == self._region.untyped_storage()._cdata)

    def _take_back(self, offset: int, size: int, after: Sequence[Event]) -> None:
        """Make a range a hole, merged with the holes beside it. Buffer.free calls this."""
        self.used -= size
        if not streams_of(self.device).on_cpu:
            self._used.append((offset, offset + size, (now(self.device), *after)))
        index = bisect_left(self._holes, (offset, 0))
        if index < len(self._holes) and self._holes[index][0] == offset + size:
            size += self._holes.pop(index)[1]
        if index > 0 and sum(self._holes[index - 1]) == offset:
            offset, before = self._holes.pop(index - 1)
            size += before
        insort(self._holes, (offset, size))

    @property
    def pinned(self) -> bool:
        """Whether it is page-locked."""
        return self._pinned_for is not None

    def unpin(self) -> None:
        """Unlock page-locked memory. No copy may be under way."""
        if self._pinned_for is not None:
            unpin(self._region, self._pinned_for)
            self._pinned_for = None
