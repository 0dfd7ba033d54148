"""A run's timeline: spans by lane, in the Chrome/Perfetto trace format.

Every part of the engine reports to one `Trace`. Disabled, a span costs one attribute read; enabled, spans are kept
in memory and written as JSON once. Lanes are the resources of a rank: compute, gather, reduce, copies, NVMe, update,
and "wait", the time the compute thread stood still for data.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LANES = ("wait", "compute", "update", "gather", "reduce", "copy in", "copy out", "nvme read", "nvme write")


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
            path.write_text(json.dumps({"traceEvents": names + self._spans}))
