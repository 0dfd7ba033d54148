"""Proves the order of an accelerator's work on a CPU: two touches of a page, one of them a write, have to be ordered.

The CPU counts as an accelerator (the compute device is `cpu:0`), so the engine's copies, events and bounce memory run.
Everything is computed at once, and so always rightly. What is checked is the order that the code asks for. Every stream
and every thread is an actor with a vector clock. Launches, events, waits, queues and drive jobs carry clocks from one
actor to another, as far as the real thing promises order there. A touch is what an operation reads or writes of arenas
and files, by page.

Whether something is over is answered by a seeded coin, and orders nothing: who goes on because of it has to wait, too.
`removed` names a wait that orders nothing, though it waits: a checker that then finds no race says that this wait is
needless, or that the checker is blind.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import zinf_cli
from zinf_cli.model_state import PAGE

DEVICE = torch.device("cpu", 0)
_ROOT = str(Path(zinf_cli.__file__).parent)
PASSING_ON = {"wait", "wait_for", "wait_if_done", "wait_if_queued", "now", "under_way", "_finish", "_settle", "time"}
"""Functions that wait for whoever calls them: the site of a wait is their caller."""
Clock = dict[int, int]


class Actor:
    """A stream or a thread. `clock` says up to which moment of each actor its next touch comes later."""

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name
        self.clock: Clock = {number: 1}
        self.changes = 0
        """How often the clock has changed."""
        self._followed: dict[int, int] = {}
        """The changes of other actors, up to which this has followed them."""
        self.before: Clock = {}
        """Of a drive's thread and its stream: what earlier jobs of this thread have done. It orders touches of the
        thread's own bounce memory, and nothing else: another thread might have made those jobs."""

    def join(self, clock: Clock) -> None:
        self.learn(self.unknown(clock))

    def unknown(self, clock: Clock) -> Clock:
        """What of `clock` this does not come after yet."""
        known = self.clock
        return {number: time for number, time in clock.items() if known.get(number, 0) < time}

    def learn(self, unknown: Clock) -> None:
        if unknown:
            self.clock.update(unknown)
            self.changes += 1

    def follow(self, other: Actor) -> None:
        """Come after all that `other` has done. Most often that is what it had done the last time."""
        if self._followed.get(other.number) != other.changes:
            self.join(other.clock)
            self._followed[other.number] = other.changes

    def release(self) -> Clock:
        """The clock of what comes behind all that was done so far."""
        clock = dict(self.clock)
        self.clock[self.number] += 1
        self.changes += 1
        return clock


def _join(clock: Clock, other: Clock) -> None:
    for number, time in other.items():
        if clock.get(number, 0) < time:
            clock[number] = time


class Checker:
    """What was touched, by whom; which waits there were; which races were found."""

    on_cpu = False

    def __init__(self, removed: str | None = None, *, chance: float = 0.5, seed: int = 0) -> None:
        """`chance`: of something under way, to be over when it is asked; `seed` says which."""
        self.races: dict[tuple[str, str], str] = {}
        self.waits: Counter[str] = Counter()
        """Their sites in the engine and the tiers, "tiers/bounce.py:42 Moment.read"; how often each told something."""
        self.launches = 0
        self.gathers_beside_compute = 0
        """How many gathers did not wait for all that compute had queued."""
        self._removed = removed
        self._coin = random.Random(seed)
        self._chance = chance
        self._lock = threading.RLock()
        self._local = threading.local()
        self._actors = 0
        self._regions: list[tuple[int, int]] = []
        self._beside: dict[int, CheckedStream] = {}
        """Memory of the allocator that a stream beside compute has taken, by address."""
        self._told: dict[int, torch.Tensor] = {}
        """Numbers that ranks have told each other, in CPU memory, by address of their storage."""
        self._bounce: set[int] = set()
        """Pages of memory that a drive's thread has taken for itself."""
        self._pages: dict[Any, tuple[tuple[Actor, int, str] | None, dict[int, tuple[Actor, int, str]]]] = {}
        self._compute = self.new(DEVICE)
        self._computed = 0
        """The moment of compute's newest launch."""
        self.communicator = self.new(DEVICE)

    # -- the seam: see zinf_cli/tiers/streams.py

    def new(self, device: torch.device) -> CheckedStream:
        stream = CheckedStream(self)
        self._local.own_streams = [*getattr(self._local, "own_streams", ()), stream]
        return stream

    def current(self, device: torch.device) -> CheckedStream:
        streams: list[CheckedStream] = getattr(self._local, "streams", [])
        return streams[-1] if streams else self._compute

    @contextmanager
    def use(self, stream: CheckedStream) -> Iterator[None]:
        self._local.streams = [*getattr(self._local, "streams", []), stream]
        try:
            yield
        finally:
            self._local.streams.pop()

    def event(self) -> CheckedEvent:
        return CheckedEvent(self)

    def set_device(self, device: torch.device) -> None: ...

    def synchronize(self, device: torch.device) -> None:
        raise AssertionError("the engine waits for events and streams, never for a whole device")

    # -- clocks

    def actor(self, name: str) -> Actor:
        with self._lock:
            self._actors += 1
            return Actor(self._actors, name)

    @property
    def thread(self) -> Actor:
        """That of the thread that asks."""
        if not hasattr(self._local, "actor"):
            self._local.actor = self.actor(f"thread {threading.current_thread().name}")
        return self._local.actor  # type: ignore[no-any-return]

    def send(self) -> Clock:
        with self._lock:
            return self.thread.release()

    def begin_job(self, clock: Clock) -> None:
        """This thread of a drive begins a job that was handed over at `clock`."""
        with self._lock:
            done = getattr(self._local, "actor", None)
            job = self._local.actor = self.actor(threading.current_thread().name)
            job.join(clock)
            if done is not None:
                job.before = done.before
                _join(job.before, done.release())
            for stream in getattr(self._local, "own_streams", ()):
                stream.actor = self.actor(stream.actor.name)

    def ends(self) -> Clock:
        """The clock of what comes behind all jobs of this thread, which ends."""
        with self._lock:
            clock = self.thread.release()
            _join(clock, self.thread.before)
            return clock

    def wait(self, waits: Actor, clock: Clock) -> bool:
        """`waits` comes after `clock` from now on. False where this is the wait that was removed."""
        with self._lock:
            unknown = waits.unknown(clock)
            if self.is_removed(tells=bool(unknown)):
                return False
            waits.learn(unknown)
            return True

    def is_removed(self, *, tells: bool = False) -> bool:
        """Whether what orders work here was removed. It is noted in `waits`, and whether it tells something new."""
        site = _site()
        with self._lock:
            if site.startswith(("engine/", "tiers/", "train/")):
                self.waits[site] += tells
        return site == self._removed

    def has_found(self) -> bool:
        """Whether the wait that was removed is needed: then the rest needs no check."""
        return self._removed is not None and bool(self.races)

    def is_beside_compute(self, actor: Actor) -> bool:
        """Whether what comes next there does not wait for all that compute has queued."""
        return actor.clock.get(self._compute.actor.number, 0) < self._computed

    def says_over(self) -> bool:
        return self._coin.random() < self._chance

    # -- touches

    def add_region(self, begin: int, num_bytes: int) -> None:
        with self._lock:
            self._regions.append((begin, begin + num_bytes))
            self._regions.sort()
            pages = range(begin // PAGE, (begin + num_bytes) // PAGE)
            for page in pages:
                self._pages.pop(page, None)
            if self.thread.name.startswith("zinf-nvme"):
                self._bounce.update(pages)
            else:
                self._bounce.difference_update(pages)

    def in_arena(self, address: int) -> bool:
        index = bisect_right(self._regions, (address, sys.maxsize)) - 1
        return index >= 0 and address < self._regions[index][1]

    def launch(self, name: str, touched: list[tuple[int, int, bool]]) -> None:
        """An operation on the thread's current stream: (first address, end, whether it writes) of each tensor."""
        with self._lock:
            stream = self.current(DEVICE).actor
            stream.follow(self.thread)
            stream.before = self.thread.before
            self.launches += 1
            if stream is self._compute.actor:
                self._computed = stream.clock[stream.number]
            for begin, end, writes in touched:
                for page in range(begin // PAGE, (end - 1) // PAGE + 1):
                    self._touch(stream, page, name, writes=writes)

    def tell(self, values: torch.Tensor) -> Clock:
        """Numbers in CPU memory travel between ranks, beside all else. Returns the clock of what comes behind that."""
        with self._lock:
            key = values.untyped_storage().data_ptr()
            self._told[key] = values  # so that no other gets its address
            on_its_way = self.actor("control group")
            on_its_way.join(self.send())
            self._touch(on_its_way, ("told", key), "all-reduce", writes=True)
            return on_its_way.release()

    def read_told(self, values: torch.Tensor) -> bool:
        """This thread reads such numbers. False if they are none."""
        with self._lock:
            key = values.untyped_storage().data_ptr()
            if key in self._told:
                self._touch(self.thread, ("told", key), "this thread", writes=False)
            return key in self._told

    def may_use_allocated(self) -> bool:
        """Whether `uses_allocated` may find something, or has to know what is used now."""
        return bool(self._beside) or self.current(DEVICE) is not self._compute

    def uses_allocated(self, name: str, used: set[int], results: set[int]) -> None:
        """An operation on the current stream uses memory of the allocator, at these addresses, and gives results there.

        As soon as that is freed, the allocator has it for what is queued next on the stream that had taken it. So no
        other stream may use it. What torch.tensor has made is seen first as it is lifted: nothing else has used it.
        """
        if name == "aten::lift_fresh":
            used, results = set(), used | results
        with self._lock:
            stream, site = self.current(DEVICE), _site()
            own = None if stream is self._compute else stream
            for address in used:
                if self._beside.get(address) is not own:
                    what = f"{name} at {site}"
                    self.races.setdefault(("memory of the allocator", what), f"{what}: another stream has allocated it")
            for address in results - used:
                self._beside.pop(address, None)
                if own is not None:
                    self._beside[address] = own

    def touch_file(self, descriptor: int, begin: int, num_bytes: int, *, writes: bool) -> None:
        with self._lock:
            file = os.fstat(descriptor).st_ino
            for page in range(begin // PAGE, (begin + num_bytes - 1) // PAGE + 1):
                self._touch(self.thread, (file, page), "drive", writes=writes)

    def touch_by_thread(self, begin: int, num_bytes: int, *, writes: bool) -> None:
        with self._lock:
            for page in range(begin // PAGE, (begin + num_bytes - 1) // PAGE + 1):
                self._touch(self.thread, page, "drive", writes=writes)

    def _touch(self, actor: Actor, page: Any, name: str, *, writes: bool) -> None:
        if self.has_found():
            return
        written, read = self._pages.get(page, (None, {}))
        what = f"{'write' if writes else 'read'} by {name} at {_site()}"
        mine = (actor, actor.clock[actor.number], what)
        before = [written, *(read.values() if writes else ())]
        for earlier in before:
            known = 0 if earlier is None else actor.clock.get(earlier[0].number, 0)
            if earlier is not None and page in self._bounce:
                known = max(known, actor.before.get(earlier[0].number, 0))
            if earlier is not None and known < earlier[1]:
                self.races.setdefault(
                    (earlier[2], what),
                    f"page {page}: {earlier[2]} ({earlier[0].name}) and {what} ({actor.name}): nothing orders them",
                )
        if writes:
            self._pages[page] = mine, {}
        else:
            self._pages[page] = written, {**read, actor.number: mine}


class CheckedStream:
    """A stream of the double."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self.actor = checker.actor("stream")
        self.actor.name = f"stream {self.actor.number}"

    def wait_event(self, event: CheckedEvent) -> None:
        self._checker.wait(self.actor, event.clock)

    def wait_stream(self, stream: CheckedStream) -> None:
        self._checker.wait(self.actor, stream.reached())

    def synchronize(self) -> None:
        self._checker.wait(self._checker.thread, self.reached())

    def reached(self) -> Clock:
        """The clock of what comes behind all that is queued here."""
        self.actor.follow(self._checker.thread)
        return self.actor.release()


class CheckedEvent:
    """An event of the double."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self.clock: Clock = {}
        self._over = False

    def record(self, stream: CheckedStream) -> None:
        if not self._checker.is_removed():
            self.stand_behind(stream)

    def stand_behind(self, stream: CheckedStream) -> None:
        """What `record` does, for work whose own order is not zinf's."""
        self._checker.send()
        self.clock = stream.reached()

    def query(self) -> bool:
        self._over = self._over or self._checker.says_over()
        return self._over

    def synchronize(self) -> None:
        self._checker.wait(self._checker.thread, self.clock)


def _site() -> str:
    """Where zinf does what is done now: the file, the function and the line in it."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_ROOT) and code.co_name not in PASSING_ON:
            name = getattr(code, "co_qualname", code.co_name)
            return f"{code.co_filename[len(_ROOT) + 1 :]}:{frame.f_lineno} {name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"
