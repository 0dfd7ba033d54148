"""Memory that an accelerator copies from and to: who locks it, in which thread, until when; and who asks for copies.

CUDA is not here. What its calls promise is: an error stays with the thread that made the call, a thread begins on the
first device, and memory that is locked must be there until it is unlocked.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zinf_cli.batches.collator import Batch
from zinf_cli.engine.compute.micro_batch import MicroBatchThread
from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.model_state import PAGE
from zinf_cli.tiers import streams
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.memory import MemoryTier, StreamCopy
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.tiers.tier import Tier
from zinf_cli.trace import Trace

CPU, DEVICE = torch.device("cpu"), torch.device("cpu:0")
REFUSED = 304


class Runtime:
    """The calls of CUDA's runtime that lock memory, and the streams of its devices, whose copies are made at once."""

    def __init__(self) -> None:
        self.refuses = False
        self.locked: dict[int, int] = {}
        self.calls: list[str] = []
        self.strays: list[str] = []
        """Threads that have worked on the first device, which is not theirs."""
        self._thread = threading.local()

    @property
    def left_error(self) -> int:
        """The error that the next kernel of this thread would raise."""
        error: int = getattr(self._thread, "error", 0)
        return error

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        self._work()
        assert flags & 1, "other devices copy as if it were not locked"
        if self.refuses:
            self._thread.error = REFUSED
            return REFUSED
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self._work()
        self.calls.append("unlock")
        del self.locked[address]
        return 0

    def set_device(self, device: torch.device) -> None:
        self._thread.device = device

    def use(self, stream: Any) -> Any:
        self._work()
        return streams._Cpu().use(stream)

    def new(self, device: torch.device) -> Any:
        stream = streams._Cpu().new(device)
        return SimpleNamespace(
            wait_event=stream.wait_event,
            wait_stream=stream.wait_stream,
            synchronize=lambda: self.calls.append("synchronize"),
        )

    def _work(self) -> None:
        if not hasattr(self._thread, "device"):
            self.strays.append(threading.current_thread().name)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    runtime.set_device(DEVICE)
    cpu = streams._Cpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    device: Any = SimpleNamespace(
        on_cpu=False, new=runtime.new, current=cpu.current, use=runtime.use, event=cpu.event,
        set_device=runtime.set_device, synchronize=cpu.synchronize,
    )  # fmt: skip
    monkeypatch.setitem(streams.implementations, "cpu", device)
    return runtime


def there_and_back(tier: Tier, num_bytes: int) -> None:
    extent = tier.allocate(num_bytes, "weights")
    (buffer, into) = (Arena(num_bytes, DEVICE).allocate(num_bytes) for _ in range(2))
    assert buffer is not None
    assert into is not None
    buffer.data.random_(0, 256)
    extent.write(0, buffer.data).wait()
    extent.read(0, into.data).wait()
    assert torch.equal(into.data, buffer.data)


def test_a_refusal_is_said_and_leaves_no_error_behind(runtime: Runtime) -> None:
    runtime.refuses = True
    said: list[str] = []
    tier = MemoryTier("cpu", CPU, DEVICE, Trace(), pin=True, notice=said.append)
    there_and_back(tier, PAGE)
    tier.close()
    assert runtime.left_error == 0
    assert [line.split(" (")[0] for line in said] == ["the system refuses page-locked memory"]


def test_memory_is_unlocked_when_its_copies_are_done(runtime: Runtime) -> None:
    tier = MemoryTier("cpu", CPU, DEVICE, Trace(), pin=True)
    there_and_back(tier, PAGE)
    assert list(runtime.locked.values()) == [PAGE]
    tier.close()
    assert runtime.calls == ["synchronize", "synchronize", "unlock"]


def test_each_thread_of_a_drive_has_one_locked_buffer_until_it_ends(runtime: Runtime, tmp_path: Path) -> None:
    tier = NvmeTier([tmp_path], Trace(), readers=1, writers=1)
    for pages in (1, 2, 1):
        there_and_back(tier, pages * PAGE)
        assert len(runtime.locked) == 2
    tier.close()
    assert runtime.locked == {}
    assert not runtime.strays


def test_a_micro_batch_computes_on_the_device_of_its_rank(runtime: Runtime) -> None:
    def forward() -> torch.Tensor:
        runtime._work()
        return torch.zeros(())

    thread = MicroBatchThread(0, DEVICE)
    thread.start(forward, grad=False)
    thread.close()
    assert not runtime.strays


def test_inputs_come_from_locked_memory_and_nobody_waits_for_them(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From other memory, CUDA would first wait for all that is queued."""
    locked, queued = list[torch.Tensor](), list[bool]()
    moved = torch.Tensor.to

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(tensor.clone())
        return locked[-1]

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        queued.append(non_blocking and any(tensor is each for each in locked))
        return moved(tensor, device, copy=True)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch.Tensor, "to", to)
    ids = torch.arange(6).reshape(2, 3)
    inputs = Batch(ids, ids + 1, 6, 0, 6).inputs(DEVICE)
    assert queued == [True, True]
    assert torch.equal(inputs["input_ids"], ids)
    assert torch.equal(inputs["labels"], ids + 1)


def test_a_thread_that_waits_for_a_stream_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's other way to wait keeps a core busy, and a drive has several threads."""
    calls: list[Any] = []

    def event(*, blocking: bool) -> Any:
        calls.append(blocking)
        return SimpleNamespace(record=calls.append, synchronize=lambda: calls.append("synchronize"))

    monkeypatch.setattr(torch.cuda, "Event", event)
    stream: Any = object()
    streams._CudaStream.synchronize(stream)
    assert calls == [True, stream, "synchronize"]


class Slow:
    """A transfer that is done when it is told. It counts how often it is asked."""

    what = "slow"
    event = None

    def __init__(self) -> None:
        self.over = False
        self.asked = 0

    def done(self) -> bool:
        self.asked += 1
        return self.over

    def wait(self) -> None: ...


def test_a_host_that_is_ahead_does_not_ask_for_every_copy_again_and_again() -> None:
    """With a chunk a copy, a layer has hundreds under way, and each question takes a call of the driver."""
    slots, resident, chunks = (Arena(PAGE, CPU) for _ in range(3))
    memory = Memory(slots, resident, chunks, chunk_numel=1)
    slot = memory.slots.allocate(PAGE)
    assert slot is not None
    copies = [Slow() for _ in range(100)]
    memory.free_after(copies, [slot])
    for copy in copies:
        memory.reclaim()
        copy.over = True
    assert memory.slots.used == PAGE
    memory.reclaim()
    assert memory.slots.used == 0
    assert sum(copy.asked for copy in copies) <= 3 * len(copies)


def test_nor_does_a_tier_whose_copies_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[StreamCopy] = []
    monkeypatch.setattr(StreamCopy, "done", asked.append)
    tier = MemoryTier("cpu", CPU, DEVICE, Trace())
    extent = tier.allocate(PAGE, "weights")
    for _ in range(100):
        extent.write(0, torch.ones(PAGE, dtype=torch.uint8))
    assert len(asked) < 100
    tier.close()
