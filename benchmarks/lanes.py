"""An accelerator in virtual time: streams and events over lanes that have given rates.

The engine queues work through the seam of tiers/streams.py. Here a queue is a list of operations with a length in
seconds, and the host has a clock that goes on by what a launch costs it. A lane (the kernels, each direction of the
link) does one operation at a time: of those whose stream has come to them, the one that can begin first, and of several
the one that has waited longest. So all that has begun by the host's clock is known when the host asks for an event, and
nothing later can change it.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

KERNELS, IN, OUT, HOST = "kernels", "copies in", "copies out", "host"


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, and what a launch takes. Times are in seconds."""

    matmul: float = 790e12
    """FLOPs of matrix products, as measured on an H100."""
    attention: float = 500e12
    """FLOPs of fused attention."""
    memory: float = 3.35e12
    """Bytes of device memory, read or written."""
    link: float = 50e9
    """Bytes of page-locked CPU memory to the device; as many the other way at the same time."""
    pageable: float = 10e9
    """Bytes of other CPU memory to or from the device; the host makes these copies itself."""
    launch: float = 5e-6
    """Of the host, for a kernel or a copy."""
    event: float = 1e-6
    """Of the host, to record an event or to let a stream wait for one."""
    kernel: float = 2e-6
    """The least that a kernel takes."""


@dataclass(slots=True)
class Operation:
    """Work on a lane. `end` is known once it has begun."""

    lane: str
    seconds: float
    issued: float
    after: tuple[Operation, ...]
    end: float | None = None


@dataclass(eq=False)
class Queue:
    """A stream: operations that begin one after the other."""

    lanes: Lanes
    coming: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None
    free_at: float = 0.0
    """The end of what has begun here last."""
    waits: list[Operation] = field(default_factory=list)
    """What the next operation waits for."""

    def add(self, lane: str, seconds: float) -> Operation:
        operation = Operation(lane, seconds, self.lanes.now, tuple(self.waits))
        self.waits.clear()
        self.coming.append(operation)
        self.last = operation
        return operation

    def wait_event(self, event: Mark) -> None:
        self.lanes.now += self.lanes.rates.event
        self.waits += event.operations

    def wait_stream(self, stream: Queue) -> None:
        mark = Mark(self.lanes)
        mark.record(stream)
        self.wait_event(mark)

    def synchronize(self) -> None:
        mark = Mark(self.lanes)
        mark.record(self)
        mark.synchronize()


class Mark:
    """An event: the operations that it stands for, one at most and what a stream without one waits for."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.operations: tuple[Operation, ...] = ()

    def record(self, stream: Queue) -> None:
        self._lanes.now += self._lanes.rates.event
        last = () if stream.last is None else (stream.last,)
        self.operations = (*last, *stream.waits)

    def query(self) -> bool:
        self._lanes.play(self._lanes.now)
        return all(done.end is not None and done.end <= self._lanes.now for done in self.operations)

    def synchronize(self) -> None:
        for operation in self.operations:
            self._lanes.wait_for(operation)


class Lanes:
    """All streams of one device, the clock of the host, and what each lane has done."""

    on_cpu = False

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.now = 0.0
        """The host's clock, in seconds."""
        self.host: float = 0.0
        """Seconds that the host has worked itself, with launches left out."""
        self.busy: defaultdict[str, float] = defaultdict(float)
        """Seconds, by lane."""
        self.launches: Counter[str] = Counter()
        """By name of the operation."""
        self.kernel_seconds: defaultdict[str, float] = defaultdict(float)
        """By name of the operation."""
        self.waited: defaultdict[str, float] = defaultdict(float)
        """Seconds that the host waited, by the function of zinf's that did."""
        self._free: defaultdict[str, float] = defaultdict(float)
        self._queues: list[Queue] = []
        self._main = self.new(torch.device("cpu"))
        self._own = threading.local()

    def new(self, device: torch.device) -> Queue:
        self._queues.append(Queue(self))
        return self._queues[-1]

    def current(self, device: torch.device) -> Queue:
        queue: Queue = getattr(self._own, "queue", self._main)
        return queue

    @contextmanager
    def use(self, stream: Queue) -> Iterator[None]:
        before = self.current(torch.device("cpu"))
        self._own.queue = stream
        try:
            yield
        finally:
            self._own.queue = before

    def event(self) -> Mark:
        return Mark(self)

    def set_device(self, device: torch.device) -> None: ...

    def synchronize(self, device: torch.device) -> None:
        for queue in self._queues:
            queue.synchronize()

    def launch(self, name: str, lane: str, seconds: float) -> Operation:
        """Queue an operation on the thread's current stream."""
        self.now += self.rates.launch
        self.launches[name] += 1
        self.kernel_seconds[name] += seconds
        return self.current(torch.device("cpu")).add(lane, seconds)

    def work(self, seconds: float) -> None:
        """The host itself works."""
        self.now += seconds
        self.host += seconds

    def wait_for(self, operation: Operation) -> None:
        """The host waits for an operation."""
        while operation.end is None:
            assert self._begin_next(float("inf")), "an operation waits for itself"
        if operation.end > self.now:
            self.waited[_waiting()] += operation.end - self.now
            self.now = operation.end

    def play(self, until: float) -> None:
        """Begin all that can begin by `until`."""
        while self._begin_next(until):
            pass

    def _begin_next(self, until: float) -> bool:
        """Begin the operation that can begin first; False if it can't by `until`."""
        first, chosen = (until, until), None
        for queue in self._queues:
            if queue.coming:
                could = self._could_begin(queue)
                if could is not None and could[0] <= until and (chosen is None or could < first):
                    first, chosen = could, queue
        if chosen is None:
            return False
        operation = chosen.coming.popleft()
        operation.end = chosen.free_at = self._free[operation.lane] = first[0] + operation.seconds
        operation.after = ()
        self.busy[operation.lane] += operation.seconds
        return True

    def _could_begin(self, queue: Queue) -> tuple[float, float] | None:
        """When the next operation of a stream could begin, and since when it could if its lane were free."""
        operation = queue.coming[0]
        ready = max(operation.issued, queue.free_at)
        for other in operation.after:
            if other.end is None:
                return None
            ready = max(ready, other.end)
        return max(ready, self._free[operation.lane]), ready


def _waiting() -> str:
    """The function that waits, of zinf's own or of what it runs: "fetch.py _settle < pipeline.py acquire"."""
    frame, names = sys._getframe(2), list[str]()
    while frame is not None and len(names) < 3:
        path = frame.f_code.co_filename
        if "/zinf_cli/" in path:
            names.append(f"{path.rpartition('/')[2]} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(names)
