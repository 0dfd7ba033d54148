"""Puts the double of happens_before.py in the place of what the engine orders its work by.

These are the seam of streams, the memory that arenas take, the drives' jobs and files, threads with their queues and
futures, and NCCL's collectives.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.priced import products_added_up
from happens_before import DEVICE, Actor, CheckedEvent, Checker
from touches import Touches
from zinf_cli.engine import ranks
from zinf_cli.engine.compute import micro_batch
from zinf_cli.tiers import nvme
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.streams import implementations
from zinf_cli.train import rank_file


class _Work:
    """A collective on the stream of its communicator, as NCCL's are."""

    def __init__(self, checker: Checker, event: CheckedEvent) -> None:
        self._checker, self._event = checker, event

    def is_completed(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._checker.wait(self._checker.current(DEVICE).actor, self._event.clock)


class Twin(ranks.Ranks):
    """One of two ranks. The other one computes the same, and is not there."""

    def __init__(self) -> None:
        super().__init__(0, 2, whole=True)

    def all(self, number: int) -> list[int]:
        return [number, number]


@contextmanager
def checking(checker: Checker) -> Iterator[None]:
    """The CPU counts as an accelerator whose order `checker` checks."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(implementations, {"cpu": checker}))
        for owner, name, new in (*_memory(checker), *_drives(checker), *_threads(checker), *_collectives(checker)):
            stack.enter_context(patch.object(owner, name, new))
        stack.enter_context(products_added_up())
        stack.enter_context(Touches(checker))
        yield


def _memory(checker: Checker) -> Iterator[tuple[Any, str, Any]]:
    begin, unpin = Arena.__init__, Arena.unpin
    locked: set[int] = set()

    def noted(self: Arena, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        checker.add_region(self._region.data_ptr(), self.capacity)
        if kwargs.get("pin_for") is not None:
            locked.add(id(self))

    def unlocked(self: Arena) -> None:
        """What copies is over by then."""
        if id(self) in locked:
            checker.touch_by_thread(self._region.data_ptr(), self.capacity, writes=True)
        unpin(self)

    yield Arena, "__init__", noted
    yield Arena, "unpin", unlocked


def _drives(checker: Checker) -> Iterator[tuple[Any, str, Any]]:
    move, sync, close = nvme.NvmeTier._move, os.fsync, os.close
    files: set[int] = set()

    def checked(self: Any, call: Callable[..., int], place: Any, memory: memoryview) -> None:
        writes = call is os.pwritev
        address = np.frombuffer(memory, np.uint8).ctypes.data
        files.add(self._files[place.file])
        checker.touch_by_thread(address, len(memory), writes=not writes)
        checker.touch_file(self._files[place.file], place.position, len(memory), writes=writes)
        move(self, call, place, memory)

    def synced(file: int) -> None:
        """It makes sure of what was written before."""
        if file in files:
            checker.touch_file(file, 0, os.fstat(file).st_size, writes=False)
        sync(file)

    def closed(file: int) -> None:
        """What uses the file is over by then."""
        if file in files:
            files.remove(file)
            checker.touch_file(file, 0, os.fstat(file).st_size, writes=True)
        close(file)

    class Job(nvme._Job):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.moved = Actor(0, "job")
            self.over = False

        def block_done(self, error: Exception | None) -> None:
            self.moved.join(checker.send())
            super().block_done(error)

        def done(self) -> bool:
            self.over = self.over or checker.says_over()
            if self.over:
                self._finished.wait()
            return self.over

        def wait(self) -> None:
            super().wait()
            self.over = checker.wait(checker.thread, self.moved.clock) or self.over

    yield os, "fsync", synced
    yield os, "close", closed
    yield nvme.NvmeTier, "_move", checked
    yield nvme, "_Job", Job


def _threads(checker: Checker) -> Iterator[tuple[Any, str, Any]]:
    start, run, join = threading.Thread.start, threading.Thread.run, threading.Thread.join

    class Queue(queue.SimpleQueue[Any]):
        """Who takes something from it comes after who has put it there."""

        def put(self, item: Any, *_: Any) -> None:
            super().put((checker.send(), item))

        def get(self, *_: Any) -> Any:
            clock, item = super().get()
            if threading.current_thread().name.startswith("zinf-nvme"):
                checker.begin_job(clock)
            else:
                checker.thread.join(clock)
            return item

    def started(self: Any) -> None:
        self.begins = checker.send()
        start(self)

    def runs(self: Any) -> None:
        checker.thread.join(self.begins)
        with Touches(checker):
            run(self)
        self.ends = checker.ends()

    def joins(self: Any, timeout: float | None = None) -> None:
        join(self, timeout)
        checker.thread.join(getattr(self, "ends", {}))

    submit, set_result, result = ThreadPoolExecutor.submit, Future.set_result, Future.result

    def submitted(self: Any, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        clock = checker.send()

        def after() -> Any:
            checker.thread.join(clock)
            return work(*args, **kwargs)

        return submit(self, after)

    def has_result(self: Any, value: Any) -> None:
        self.clock = checker.send()
        set_result(self, value)

    def gets_result(self: Any, timeout: float | None = None) -> Any:
        value = result(self, timeout)
        checker.thread.join(self.clock)
        return value

    def waits_for(futures: list[Any]) -> None:
        """concurrent.futures.wait, of futures that do not fail."""
        for future in futures:
            future.exception()
            checker.wait(checker.thread, future.clock)

    yield rank_file, "wait", waits_for
    yield ThreadPoolExecutor, "submit", submitted
    yield Future, "set_result", has_result
    yield Future, "result", gets_result
    yield threading.Thread, "start", started
    yield threading.Thread, "run", runs
    yield threading.Thread, "join", joins
    for module in (nvme, micro_batch):
        yield module, "queue", SimpleNamespace(SimpleQueue=Queue)


def _collectives(checker: Checker) -> Iterator[tuple[Any, str, Any]]:
    def on_its_stream(work: Callable[[], None]) -> _Work:
        stream = checker.communicator
        stream.actor.join(checker.current(DEVICE).reached())
        with checker.use(stream):
            work()
        event = checker.event()
        event.stand_behind(stream)
        return _Work(checker, event)

    def all_gather(flat: torch.Tensor, own: torch.Tensor, *, group: None, async_op: bool) -> _Work:
        def gather() -> None:
            checker.gathers_beside_compute += checker.is_beside_compute(checker.communicator.actor)
            for part in flat.chunk(2):
                if part.data_ptr() != own.data_ptr():
                    part.copy_(own)

        return on_its_stream(gather)

    def reduce_scatter(into: torch.Tensor, flat: torch.Tensor, *, group: None, async_op: bool) -> _Work:
        def reduce() -> None:
            begin = flat.data_ptr()
            checker.launch("reduce", [(begin, begin + flat.nbytes, False)])
            into.mul_(2)

        return on_its_stream(reduce)

    def all_reduce(values: torch.Tensor, op: Any = None, *, group: None, async_op: bool = False) -> Any:
        if op is None:
            values.mul_(2)
        clock = checker.tell(values)
        if not async_op:
            checker.thread.join(clock)
        return SimpleNamespace(wait=lambda: checker.wait(checker.thread, clock), is_completed=checker.says_over)

    yield ranks, "_all_gather", all_gather
    yield ranks, "_reduce_scatter", reduce_scatter
    yield ranks, "dist", SimpleNamespace(all_reduce=all_reduce, ReduceOp=SimpleNamespace(MIN="least"))
