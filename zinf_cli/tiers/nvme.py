"""The NVMe tier: nameless, preallocated O_DIRECT files striped over folders, moved by a pool of threads.

There is one file in each folder. The tier's address space is cut into stripes of STRIPE bytes, dealt round-robin to the
files, so every large transfer uses every drive. With one file, transfers are cut at multiples of STRIPE from the start
of their extent, where the engine cuts them, too. Threads call preadv and pwritev on such blocks, without the GIL. That
is as fast as fio with io_uring, at the drive's limit, so there is no native code here.

The files have no name while they are used (O_TMPFILE, or unlinked at once), so a killed run leaves nothing behind.
posix_fallocate takes their space at the start, so a full drive is found before the first step. Extents that were never
written read as zeros, which is how optimizer states begin.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError, TierError
from zinf_cli.machine.drive_files import FULL, GROWTH, file_system_of, open_nameless, what_is_left, why_buffered
from zinf_cli.model_state import PIECE, round_up
from zinf_cli.tiers.bounce import Moment, close_own
from zinf_cli.tiers.streams import Event
from zinf_cli.tiers.tier import Extent, Transfer, under_way
from zinf_cli.trace import Trace

STRIPE = PIECE
"""Bytes of a stripe: a piece, so that each piece lies on one drive."""


def as_memory(data: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 CPU tensor, shared."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


class _Job:
    """A Transfer: one read or write, split into blocks that several threads move."""

    event: Event | None = None

    def __init__(self, what: str, span: tuple[int, int], blocks: int, after: Sequence[Transfer]) -> None:
        self.what = what
        self.span = span
        """[begin, end) in its extent."""
        self.after = after
        self._left = blocks
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._error: Exception | None = None

    def block_done(self, error: Exception | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if self._left == 0:
                self._finished.set()

    def done(self) -> bool:
        return self._finished.is_set()

    def wait(self) -> None:
        self._finished.wait()
        if self._error is not None:
            raise self._error


class _Place(NamedTuple):
    """The place of a block: byte `begin` of its extent, at `position` in a file."""

    extent: Extent
    begin: int
    file: int
    position: int


class NvmeTier:
    """Extents on drives. `notice` gets a line for the user if O_DIRECT is not possible, or a read was wrong once."""

    def __init__(
        self,
        folders: Sequence[Path],
        trace: Trace,
        *,
        rank: int = 0,
        readers: int = 2,
        writers: int = 2,
        block_bytes: int = STRIPE,
        notice: Callable[[str], None] | None = None,
        file: int | None = None,
        written: Callable[[int, int, int], None] | None = None,
        verify: bool = True,
    ) -> None:
        """`readers` and `writers` are threads for each folder. A thread moves `block_bytes` at once, a part of STRIPE.
        With more of these a drive may be faster, and less of the cores is left to compute.

        With `file`, an open file's descriptor, that file is the tier, and `folders` is its path. Then a range of the
        tier is the same range of the file. `written` is told (position in the file, length, checksum) of each span, by
        the thread that is about to write it. With `verify`, reads are compared with what was written."""
        self.name = "nvme"
        self.in_place = False
        self.used = self.peak = 0
        self.read_bytes = 0
        self.write_bytes = 0
        self._trace = trace
        self._rank = rank
        self._folders = list(folders)
        self._written = written
        self._verify = verify
        self._notice = notice
        self._block_bytes = block_bytes
        self._threads_of_lane = (readers * len(self._folders), writers * len(self._folders))
        self._files: list[int] = []
        self._reserved = 0
        self._next = 0
        self._freed: dict[int, list[int]] = defaultdict(list)  # num_bytes -> starts
        if file is not None:
            self._files.append(file)
        for folder in self._folders if file is None else ():
            self._files.append(_opened(folder, notice))
        self.devices = {file_system_of(descriptor) for descriptor in self._files}
        """The file systems that the tier's files lie on."""
        self._queues: tuple[queue.SimpleQueue[Callable[[], None] | None], ...] = (
            queue.SimpleQueue(),
            queue.SimpleQueue(),
        )
        self._threads = [
            threading.Thread(target=_work, args=(jobs,), name=f"zinf-nvme-{lane}", daemon=True)
            for jobs, lane, count in zip(self._queues, ("read", "write"), self._threads_of_lane, strict=True)
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def reserve(self, num_bytes: int) -> None:
        """Take the space for `num_bytes` of extents now. CapacityError, with the numbers, if a drive has too little."""
        if num_bytes <= self._reserved:
            return
        for descriptor, folder, part in zip(self._files, self._folders, self._parts(num_bytes), strict=True):
            if part:
                self._reserve(descriptor, folder, part)
        self._reserved = num_bytes

    def _parts(self, num_bytes: int) -> list[int]:
        """How many of the tier's first `num_bytes` lie in each file."""
        stripes, rest = divmod(num_bytes, STRIPE)
        rows, last = divmod(stripes, len(self._files))
        return [(rows + (file < last)) * STRIPE + (rest if file == last else 0) for file in range(len(self._files))]

    def _reserve(self, descriptor: int, folder: Path, num_bytes: int) -> None:
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            left = what_is_left(descriptor, error)
            hint = "have the quota raised" if error.errno == errno.EDQUOT else "free space"
            raise CapacityError(
                f"rank {self._rank} needs {format_bytes(num_bytes)} on this drive, {left}",
                where=str(folder),
                hint=f"{hint}, add a folder to offload.nvme_path, or keep a class of state in CPU memory",
            ) from error

    def allocate(self, num_bytes: int, label: str) -> Extent:
        size = round_up(num_bytes)
        if self._freed[size]:
            start = self._freed[size].pop()
        else:
            start = self._next
            self._next += size
            if self._next > self._reserved:
                self.reserve(max(self._next, self._reserved + GROWTH))
        self.used += size
        self.peak = max(self.peak, self.used)
        return Extent(self, size, label, start=start)

    def free(self, extent: Extent) -> None:
        self.used -= extent.num_bytes
        self._freed[extent.num_bytes].append(extent.start)

    def view(self, extent: Extent) -> None:
        return None

    def read(self, extent: Extent, offset: int, into: torch.Tensor, after: Sequence[Event] | None = None) -> Transfer:
        self.read_bytes += into.numel()
        return self._start(extent, offset, into, Moment(into.device, after), write=False)

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> Transfer:
        self.write_bytes += source.numel()
        job = self._start(extent, offset, source, Moment(source.device), write=True)
        extent.writes = [*under_way(extent.writes), job]
        return job

    def close(self) -> None:
        """Stop the threads and close the files, which frees their space."""
        for jobs, count in zip(self._queues, self._threads_of_lane, strict=True):
            for _ in range(count):
                jobs.put(None)
        for thread in self._threads:
            thread.join()
        for descriptor in self._files:
            os.close(descriptor)
        self._files.clear()

    def _start(self, extent: Extent, offset: int, data: torch.Tensor, moment: Moment, *, write: bool) -> _Job:
        if offset + data.numel() > extent.num_bytes:
            raise ValueError(f"{extent.label}: {offset}+{data.numel()} bytes is past its {extent.num_bytes}")
        blocks = list(self._blocks(extent, offset, data.numel()))
        what = f"{'write' if write else 'read'} {extent.label}"
        span = (offset, offset + data.numel())
        job = _Job(what, span, len(blocks), [earlier for earlier in extent.writes if _overlap(earlier, span)])
        jobs = self._queues[1 if write else 0]
        for file, position, begin, end in blocks:
            place = _Place(extent, offset + begin, file, position)
            jobs.put(self._block(job, place, data[begin:end], moment, write=write))
        return job

    def _blocks(self, extent: Extent, offset: int, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """(file, position in the file, begin, end in the transfer) of each block."""
        base, first = (extent.start, offset) if len(self._files) == 1 else (0, extent.start + offset)
        begin = 0
        while begin < num_bytes:
            stripe, inside = divmod(first + begin, STRIPE)
            length = min(self._block_bytes - inside % self._block_bytes, num_bytes - begin)
            row, file = divmod(stripe, len(self._files))
            yield file, base + row * STRIPE + inside, begin, begin + length
            begin += length

    def _block(
        self, job: _Job, place: _Place, data: torch.Tensor, moment: Moment, *, write: bool
    ) -> Callable[[], None]:
        def move() -> None:
            error: Exception | None = None
            try:
                for write_before in job.after:
                    write_before.wait()  # its own threads are at work on it: no deadlock
                start = time.perf_counter()
                if write:
                    moment.write(data, partial(self._put, place))
                else:
                    moment.read(data, partial(self._get, place))
                lane = "nvme write" if write else "nvme read"
                self._trace.add(lane, place.extent.label, start, time.perf_counter(), data.numel())
            except OSError as failure:
                what = f"{'write' if write else 'read'} of {data.numel()} bytes at offset {place.position}"
                hint = "a run that has written a checkpoint can resume from it"
                if failure.errno in FULL:
                    hint = "free space there, or add a folder to offload.nvme_path"
                error = TierError(
                    f"rank {self._rank}: {what} failed: {failure.strerror}",
                    where=str(self._folders[place.file]),
                    hint=f"of {place.extent.label}; {hint}",
                )
            except Exception as failure:
                error = failure
            job.block_done(error)

        return move

    def _put(self, place: _Place, data: torch.Tensor) -> None:
        """Write, after the checksums are kept."""
        memory = as_memory(data)
        spans = place.extent.checksums.note(place.begin, memory) if self._verify or self._written is not None else []
        if self._written is not None:
            for first, last, value in spans:
                self._written(place.position + first - place.begin, last - first, value)
        self._move(os.pwritev, place, memory)

    def _get(self, place: _Place, data: torch.Tensor) -> None:
        """Read. If that is not what was written, read once more. TierError if it still is not."""
        memory = as_memory(data)
        self._move(os.preadv, place, memory)
        if not self._verify or place.extent.checksums.agree(place.begin, memory):
            return
        self._move(os.preadv, place, memory)
        folder = str(self._folders[place.file])
        what = f"{format_bytes(len(memory))} at offset {place.position} (of {place.extent.label})"
        if not place.extent.checksums.agree(place.begin, memory):
            raise TierError(
                f"rank {self._rank}: {what} are not what was written there, read twice",
                where=folder,
                hint="this drive changes data: leave it out of offload.nvme_path; the run can resume from its last "
                "checkpoint",
            )
        if self._notice is not None:
            self._notice(f"{folder}: {what} were read wrong, and right when read again: look after this drive")

    def _move(self, call: Callable[..., int], place: _Place, memory: memoryview) -> None:
        """Move all of `memory`. OSError where a transfer makes no progress."""
        moved = 0
        while moved < len(memory):
            count = call(self._files[place.file], [memory[moved:]], place.position + moved)
            if count <= 0:
                raise OSError(errno.EIO, f"short transfer: {moved} of {len(memory)} bytes")
            moved += count


def _overlap(earlier: Transfer, span: tuple[int, int]) -> bool:
    """Whether an earlier write touches bytes of `span`. If so, the read or write of `span` waits for it."""
    assert isinstance(earlier, _Job)
    return earlier.span[0] < span[1] and span[0] < earlier.span[1]


def _opened(folder: Path, notice: Callable[[str], None] | None) -> int:
    """The descriptor of a nameless file in `folder`. `notice` is told if it lies in memory or has no direct I/O."""
    file = open_nameless(folder)
    if notice is not None and not file.direct:
        notice(f"{folder}: {why_buffered(file.descriptor)}")
    return file.descriptor


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
    close_own()
