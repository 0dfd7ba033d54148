"""`zinf bench nvme`: how fast the drives of this machine are, and with which blocks and threads.

It moves bytes as the NVMe tier does: threads with preadv and pwritev, between an arena and a nameless, preallocated
O_DIRECT file in each folder. The file is written once, with noise; then a sweep tries every block size with every
number of threads, and the best few are repeated over the whole file. The median of the repeats is the result. As the
file has no name, nothing is left on the drive, whatever ends the bench.

The arena matters: it is huge pages, which reach the drive in a few large pieces. Out of ordinary pages, scattered as
they happen to lie, one virtual machine's drive read 0.6 to 2.7 GB/s from one run to the next; out of huge ones,
2.7 to 3.4.
"""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import CapacityError, PreflightError, TierError, UsageError
from zinf_cli.machine.drive_files import open_nameless
from zinf_cli.machine.hardware import drive_space, room_of
from zinf_cli.model_state import PAGE
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.nvme import as_memory

BLOCK_SIZES = (2**20, 4 * 2**20, 8 * 2**20)
THREADS = (1, 2, 4, 8, 16)
FINALISTS = 2
"""Points of the sweep that are repeated."""
REPEATS = 3
COMPUTE_S = 1.0
"""For which the cores compute by themselves, before they do beside the drives."""
SHARE = 4
"""A point of the sweep moves one SHARE-th of the file."""
READ, WRITE = "read", "write"


@dataclass(frozen=True)
class Point:
    """One measurement."""

    direction: str
    block_size: int
    threads: int
    bytes_per_s: float


@dataclass(frozen=True)
class Result:
    """What a bench found.

    `both` is the sum of reading and writing at once, bytes per second; `beside` are the shares of it and of the cores'
    compute that are left while all cores compute.
    """

    folders: tuple[Path, ...]
    size: int
    space: int
    read: Point
    write: Point
    both: float
    beside: tuple[float, float]
    sweep: tuple[Point, ...]

    def to_json(self) -> dict[str, object]:
        def best(point: Point) -> dict[str, object]:
            return {name: value for name, value in asdict(point).items() if name != "direction"}

        return {
            "folders": [str(folder) for folder in self.folders],
            "size": self.size,
            "space": self.space,
            "read": best(self.read),
            "write": best(self.write),
            "both": self.both,
            "beside": dict(zip(("drives", "compute"), self.beside, strict=True)),
            "sweep": [asdict(point) for point in self.sweep],
        }


Report = Callable[[str, int], None]
"""Told what is being done and how many bytes have been moved since the last call."""


def check_folders(folders: Sequence[Path], size: int) -> int:
    """What the folders hold together, evenly; an error names the folder that is no drive to bench."""
    for folder in folders:
        if not folder.is_dir():
            what = "no such directory" if not folder.exists() else "not a directory"
            raise UsageError(what, where=str(folder), hint="name a folder on the drive")
    spaces = [drive_space(folder, "folder") for folder in folders]
    for space in spaces:
        if not space.direct:
            what = "this is memory (tmpfs), not a drive" if space.in_memory else "the page cache can't be bypassed here"
            raise PreflightError(what, where=space.folder, hint="name another folder")
    room = room_of(spaces)
    if room < size:
        raise CapacityError(
            f"{format_bytes(size)} do not fit, {format_bytes(room)} are free",
            where=", ".join(map(str, folders)),
            hint="give a smaller --size, or free space",
        )
    return room


def steps_of(size: int, block_sizes: Sequence[int], threads: Sequence[int]) -> int:
    """Bytes a whole bench moves, for its progress bar."""
    points = len(block_sizes) * len(threads)
    finals = min(FINALISTS, points) * REPEATS
    return size + 2 * points * (size // SHARE) + 2 * finals * size + 2 * REPEATS * 2 * size


def bench_nvme(
    folders: Sequence[Path], size: int, block_sizes: Sequence[int], threads: Sequence[int], report: Report
) -> Result:
    """Measure; `size` is of all files together."""
    space = check_folders(folders, size)
    with open_files(folders, size) as files:
        bench = Bench(files, report)
        bench.run(WRITE, size, min(max(block_sizes), size), max(threads), "filling")
        sweep: list[Point] = []
        best: dict[str, Point] = {}
        for direction in (READ, WRITE):
            points = [
                bench.run(direction, size // SHARE, block, count, direction)
                for block, count in itertools.product(block_sizes, threads)
            ]
            sweep += points
            finalists = sorted(points, key=lambda point: -point.bytes_per_s)[:FINALISTS]
            best[direction] = bench.repeat(finalists, size)
        both = statistics.median(bench.both(best[READ], best[WRITE], size) for _ in range(REPEATS))
        beside = bench.beside_compute(best[READ], best[WRITE], size, both)
        return Result(tuple(folders), size, space, best[READ], best[WRITE], both, beside, tuple(sweep))


@contextmanager
def open_files(folders: Sequence[Path], size: int) -> Iterator[Files]:
    """A nameless file in each folder, of equal parts of `size`, preallocated."""
    part = -(-size // len(folders) // PAGE) * PAGE
    descriptors: list[int] = []
    try:
        for folder in folders:
            descriptor = open_nameless(folder, "folder").descriptor  # check_folders saw that it is direct
            descriptors.append(descriptor)
            try:
                os.posix_fallocate(descriptor, 0, part)
            except OSError as error:
                raise CapacityError(
                    f"no room for {format_bytes(part)}: {error.strerror}",
                    where=str(folder),
                    hint="give a smaller --size",
                ) from error
        yield Files(descriptors, part)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@dataclass(frozen=True)
class Files:
    """Descriptors, and the bytes of each."""

    descriptors: Sequence[int]
    part: int

    def place(self, number: int, block_size: int) -> tuple[int, int]:
        """(descriptor, offset) of the block `number`, dealt over the files, starting over at their end."""
        row, file = divmod(number, len(self.descriptors))
        return self.descriptors[file], row % max(1, self.part // block_size) * block_size


class Bench:
    """Runs measurements on open files."""

    def __init__(self, files: Files, report: Report) -> None:
        self._files = files
        self._report = report
        self._noise = torch.empty(0, dtype=torch.uint8)

    def run(self, direction: str, num_bytes: int, block_size: int, threads: int, doing: str) -> Point:
        """Move `num_bytes` in one direction; its rate."""
        shown = f"{doing}, {threads} × {format_bytes(block_size)}"
        return Point(direction, block_size, threads, self._move([(direction, block_size, threads)], num_bytes, shown))

    def repeat(self, points: Sequence[Point], size: int) -> Point:
        """The best of `points` by the median of runs over the whole file, in turn."""
        rates: list[list[float]] = [[] for _ in points]
        for _ in range(REPEATS):
            for point, seen in zip(points, rates, strict=True):
                doing = f"{point.direction}, whole file"
                seen.append(self.run(point.direction, size, point.block_size, point.threads, doing).bytes_per_s)
        medians = [statistics.median(seen) for seen in rates]
        winner = points[medians.index(max(medians))]
        return Point(winner.direction, winner.block_size, winner.threads, max(medians))

    def both(self, read: Point, write: Point, size: int) -> float:
        """Reading and writing at once until twice `size` has moved: bytes per second in sum."""
        work = [(point.direction, point.block_size, point.threads) for point in (read, write)]
        return self._move(work, 2 * size, "read and write at once")

    def beside_compute(self, read: Point, write: Point, size: int, alone: float) -> tuple[float, float]:
        """What is left of `both`, which is `alone` otherwise, and of compute on all cores, while both are done."""
        drives, compute = [], []
        for _ in range(REPEATS):
            with _Computing() as by_itself:
                time.sleep(COMPUTE_S)
            with _Computing() as beside:
                drives.append(self.both(read, write, size) / alone)
            compute.append(beside.rate / by_itself.rate)
        return min(1.0, statistics.median(drives)), min(1.0, statistics.median(compute))

    def _move(self, work: Sequence[tuple[str, int, int]], num_bytes: int, doing: str) -> float:
        """Threads of each kind of `work`, (direction, block size, count), move `num_bytes`: bytes per second."""
        mover = _Mover(self._files, num_bytes, sum(count for _, _, count in work))
        buffers = self._buffers([block_size for _, block_size, count in work for _ in range(count)])
        threads = [
            threading.Thread(target=mover.work, args=(direction, next(buffers), number), daemon=True)
            for direction, _, count in work
            for number in [itertools.count()]
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        told = 0
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    self._report(doing, min(mover.moved, num_bytes) - told)
                    told = min(mover.moved, num_bytes)
            self._report(doing, num_bytes - told)
        finally:
            mover.stop = True  # Ctrl-C: no descriptor is closed under a transfer
            for thread in threads:
                thread.join()
        if mover.error is not None:
            raise mover.error
        return mover.moved / (mover.ended - mover.began)

    def _buffers(self, sizes: Sequence[int]) -> Iterator[memoryview]:
        """Noise of these sizes, side by side in an arena that grows to the most that was asked for."""
        if sum(sizes) > self._noise.numel():
            buffer = Arena(sum(sizes), torch.device("cpu")).allocate(sum(sizes))
            assert buffer is not None
            self._noise = buffer.data.random_()
        return iter([as_memory(data) for data in self._noise[: sum(sizes)].split(list(sizes))])


class _Computing:
    """Matrix products on all cores, by a thread, while it is open; `rate` is how many a second."""

    def __enter__(self) -> _Computing:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        a = torch.ones(1024, 1024)
        a @ a  # sets the thread up
        began, count = time.perf_counter(), 0
        while not (count and self._over.is_set()):
            a @ a
            count += 1
        self.rate = count / (time.perf_counter() - began)


class _Mover:
    """What the threads of one measurement share."""

    def __init__(self, files: Files, num_bytes: int, threads: int) -> None:
        self.stop = False
        self.moved = 0
        self.error: TierError | None = None
        self.began = self.ended = 0.0
        self._files = files
        self._wanted = num_bytes
        self._lock = threading.Lock()
        self._ready = threading.Barrier(threads, action=self._begin)

    def _begin(self) -> None:
        self.began = self.ended = time.perf_counter()

    def work(self, direction: str, buffer: memoryview, numbers: Iterator[int]) -> None:
        """Move block after block through a thread's own buffer until enough is moved."""
        call = os.preadv if direction == READ else os.pwritev
        self._ready.wait()
        try:
            while not self.stop and self.moved < self._wanted:
                descriptor, offset = self._files.place(next(numbers), len(buffer))
                done = call(descriptor, [buffer], offset)
                if done <= 0:
                    raise OSError(0, f"short transfer at offset {offset}")
                with self._lock:
                    self.moved += done
                    self.ended = time.perf_counter()
        except OSError as error:
            self.stop = True
            self.error = TierError(f"{direction} of {len(buffer)} bytes failed: {error.strerror}")
