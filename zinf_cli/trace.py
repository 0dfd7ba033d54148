"""A run's timeline: spans by lane, in the Chrome/Perfetto trace format.

Every part of the engine reports to one `Trace`. Disabled, a span costs one attribute read; enabled, spans are kept
in memory and written as JSON once. Lanes are the resources of a rank: compute, gather, reduce, copies, NVMe, update.
"glue" is compute between units. "wait" is the time the compute thread stood still for data.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinf_cli.durable import write_durably
from zinf_cli.errors import UsageError

LANES = ("wait", "compute", "glue", "update", "gather", "reduce", "copy in", "copy out", "nvme read", "nvme write")


class Trace:
    """Spans of one rank. Times are `time.perf_counter()` seconds; `enabled` may change between steps."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.enabled = False
        self._spans: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @contextmanager
    def span(self, lane: str, name: str, num_bytes: int = 0) -> Iterator[None]:
        """Record the time spent in the `with` block."""
        if not self.enabled:
            yield
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, start, time.perf_counter(), num_bytes)

    def add(self, lane: str, name: str, start: float, end: float, num_bytes: int = 0) -> None:
        """Record a span that was timed by the caller (from any thread)."""
        if not self.enabled:
            return
        span = {
            "name": name,
            "ph": "X",
            "pid": self.rank,
            "tid": LANES.index(lane),
            "ts": start * 1e6,
            "dur": (end - start) * 1e6,
        }
        if num_bytes:
            span["args"] = {"bytes": num_bytes}
        with self._lock:
            self._spans.append(span)

    def write(self, path: Path) -> None:
        """Write the spans as one JSON document that Perfetto and chrome://tracing open."""
        names: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": self.rank, "args": {"name": f"rank {self.rank}"}}
        ]
        for tid, lane in enumerate(LANES):
            names.append({"name": "thread_name", "ph": "M", "pid": self.rank, "tid": tid, "args": {"name": lane}})
            names.append(
                {
                    "name": "thread_sort_index",
                    "ph": "M",
                    "pid": self.rank,
                    "tid": tid,
                    "args": {"sort_index": tid},
                }
            )
        with self._lock:
            write_durably(path, json.dumps({"traceEvents": names + self._spans}))


@dataclass(frozen=True)
class Span:
    """What a lane of a rank did from `start` to `end`, in seconds of one clock; how many bytes it moved."""

    lane: str
    name: str
    start: float
    end: float
    num_bytes: int


def read_spans(path: Path) -> dict[int, list[Span]]:
    """The spans of each rank in a trace.json, ranks in order; UsageError where there is no trace."""
    try:
        spans: dict[int, list[Span]] = defaultdict(list)
        for event in json.loads(path.read_text())["traceEvents"]:
            if event["ph"] == "X":
                start, seconds = event["ts"] / 1e6, event["dur"] / 1e6
                num_bytes = event.get("args", {}).get("bytes", 0)
                spans[event["pid"]].append(Span(LANES[event["tid"]], event["name"], start, start + seconds, num_bytes))
        return {rank: spans[rank] for rank in sorted(spans)}
    except FileNotFoundError as error:
        raise UsageError("no trace here", where=str(path), hint="run with profiler.enabled=true") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"not a trace: {type(error).__name__}: {error}", where=str(path)) from error


def summarise_trace(path: Path, rows: int = 5) -> dict[str, Any]:
    """What a trace.json says in short, rank by rank: seconds, the share of them each lane was busy, the longest waits,
    and what was computed longest in all: units or their parts, forward or backward.

    UsageError where there is no trace.
    """
    return {"ranks": [_summarise_rank(rank, spans, rows) for rank, spans in read_spans(path).items()]}


def _summarise_rank(rank: int, spans: Sequence[Span], rows: int) -> dict[str, Any]:
    begin = min(span.start for span in spans)
    seconds = max(1e-6, max(span.end for span in spans) - begin)
    by_lane: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_lane[span.lane].append(span)
    longest = sorted(by_lane["wait"], key=lambda span: span.start - span.end)[:rows]
    computed: dict[str, float] = defaultdict(float)
    for span in by_lane["compute"]:
        computed[span.name] += span.end - span.start
    most = sorted(computed, key=lambda name: -computed[name])[:rows]
    return {
        "rank": rank,
        "seconds": seconds,
        "lanes": {
            lane: {
                "busy": sum(end - start for start, end in busy(by_lane[lane])) / seconds,
                "bytes": sum(span.num_bytes for span in by_lane[lane]),
            }
            for lane in LANES
            if by_lane[lane]
        },
        "longest_waits": [
            {"what": span.name, "seconds": span.end - span.start, "at": span.start - begin} for span in longest
        ],
        "most_compute": [{"what": name, "seconds": computed[name]} for name in most],
    }


def busy(spans: Sequence[Span], gap: float = 0.0) -> list[tuple[float, float]]:
    """(start, end) of the times in which at least one of the spans was under way, in order.

    Times with no more than `gap` seconds between them are one.
    """
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and span.start <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], span.end))
        else:
            found.append((span.start, span.end))
    return found
