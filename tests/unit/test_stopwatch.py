"""Waiting is the time in which compute stands still, and not the time that a call takes to queue a wait."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.traffic.pipeline import Pipeline
from zinf_cli.tiers import stopwatch
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.stopwatch import EventStopwatch, Span
from zinf_cli.trace import Trace, summarise_trace

CPU = torch.device("cpu")


class Stream:
    """A stream that is behind this thread: work that is queued takes its seconds when `run` is called."""

    def __init__(self) -> None:
        self.queued: list[float | Event] = []
        self.now = 0.0

    def run(self) -> None:
        for work in self.queued:
            if isinstance(work, Event):
                work.at = self.now
            else:
                self.now += work
        self.queued.clear()


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.at: float | None = None

    def record(self) -> None:
        self._stream.queued.append(self)

    def query(self) -> bool:
        return self.at is not None

    def synchronize(self) -> None:
        self._stream.run()

    def elapsed_time(self, other: Event) -> float:
        assert self.at is not None
        assert other.at is not None
        return float(np.float32(1e3 * (other.at - self.at)))  # CUDA tells so many bits


class Copy:
    """A copy that the stream waits `seconds` for, when it comes there."""

    what = "copy in weights"
    event = None

    def __init__(self, stream: Stream, seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        self._stream.queued.append(self._seconds)


def test_a_stream_is_timed_where_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setitem(stopwatch._OF_KIND, "cpu", lambda: EventStopwatch(lambda: Event(stream)))
    trace = Trace()
    trace.enabled = True
    slots, resident, chunks = (Arena(4096, CPU) for _ in range(3))
    pipeline = Pipeline([], Ranks(), Memory(slots, resident, chunks, chunk_numel=1), trace)
    for compute, copying in ((3.0, 0.25), (2.0, 0.5)):
        pipeline.wait(Copy(stream, copying))
        stream.queued.append(compute)
    assert pipeline.waited() == 0  # the stream has not come there yet
    stream.run()
    assert pipeline.waited() == pytest.approx(0.75)
    trace.write(tmp_path / "trace.json")
    (rank,) = summarise_trace(tmp_path / "trace.json")["ranks"]
    assert [wait["seconds"] for wait in rank["longest_waits"]] == pytest.approx([0.5, 0.25])
    assert rank["longest_waits"][0]["at"] == pytest.approx(3.25)
    pipeline.begin_step()
    assert pipeline.waited() == 0


def test_a_wait_of_the_second_day_has_its_place() -> None:
    stream = Stream()
    watch = EventStopwatch(lambda: Event(stream))
    watch.time("first", lambda: None)
    spans = list[Span]()
    for _ in range(1000):
        stream.queued.append(111.1)
        watch.time("copy in", lambda: stream.queued.append(0.25))
        stream.run()
        spans += watch.over()
    (_, first, _), (_, start, end) = spans[0], spans[-1]
    assert end - start == pytest.approx(0.25)
    assert start - first == pytest.approx(1000 * 111.1 + 999 * 0.25, abs=0.001)
