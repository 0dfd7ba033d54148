"""Hands what every step has measured to those that follow the run, from the launcher, which reads metrics.jsonl.

No rank knows of them: a tracker that is slow, or fails, holds up no step, and the hosts need no way to its server.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from zinf_cli.durable import write_durably
from zinf_cli.run_folder.metrics import ACCURACY, HELD_OUT
from zinf_cli.run_folder.names import tracker_id

SCALARS = (
    "loss", HELD_OUT, ACCURACY, "lr", "grad_norm", "reward_margin", "reward_accuracy", "tokens_per_s",
    "tflops_per_rank", "wait_s", "step_s",
)  # fmt: skip
_PATIENCE_S = 60.0
"""For what a tracker still has to send when the run is over."""


class Tracker(Protocol):
    """One run in TensorBoard, or in another library's way of looking at runs. Any call may raise anything."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """The point of each curve at `step`."""

    def close(self, status: str) -> None:
        """The run is over: done, failed or interrupted, as in summary.json."""


Open = Callable[[], Tracker]


class Tracking:
    """Gives every `interval` steps to the trackers, by name; each lives in a thread of its own.

    `say` is told of one that fails, once; the run and the other trackers go on.
    """

    def __init__(self, trackers: Mapping[str, Open], interval: int, say: Callable[[str], None]) -> None:
        self._interval = interval
        self._say = say
        self._followers = [_Follower(name, opens, say) for name, opens in trackers.items()]

    def write(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. What is not a finite number in it is left out."""
        if line["step"] % self._interval == 0 and not line.get("skipped"):
            of_texts = (name for name in line if name.startswith((f"{HELD_OUT}/", f"{ACCURACY}/")))
            values = {name: line[name] for name in (*SCALARS, *of_texts) if line.get(name) is not None}
            for follower in self._followers:
                follower.news.put((values, line["step"]))

    def close(self, status: str) -> None:
        """Return when all trackers have what they were given, or after a minute, or when the user presses Ctrl-C."""
        for follower in self._followers:
            follower.news.put(status)
        deadline = time.monotonic() + _PATIENCE_S
        with suppress(KeyboardInterrupt):
            for follower in self._followers:
                follower.join(max(0.0, deadline - time.monotonic()))
        for follower in self._followers:
            if follower.is_alive():
                self._say(f"{follower.name}: does not end, and may lack the last steps; metrics.jsonl has them all")


class _Follower(threading.Thread):
    """The thread of one tracker."""

    def __init__(self, name: str, opens: Open, say: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.news: queue.SimpleQueue[tuple[Mapping[str, float], int] | str] = queue.SimpleQueue()
        self._opens = opens
        self._tell = say
        self.start()

    def run(self) -> None:
        tracker = None
        try:
            tracker = self._opens()
            while not isinstance(news := self.news.get(), str):
                tracker.add(*news)
            tracker.close(news)
        except Exception as error:  # a library's, which may raise anything
            why = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
            self._tell(f"{self.name}: {why}; the run goes on without it")
            with suppress(Exception):
                if tracker is not None:
                    tracker.close("failed")


def tracked(run_dir: Path, name: str) -> str | None:
    """The id under which a tracker knows the run in `run_dir`. None if it does not yet."""
    with suppress(OSError, UnicodeDecodeError):
        return (run_dir / tracker_id(name)).read_text() or None
    return None


def remember(run_dir: Path, name: str, known_as: str) -> None:
    """Keep the id of a tracker's run, so that a run that goes on goes on there. OSError if it can't be written."""
    write_durably(run_dir / tracker_id(name), known_as)
