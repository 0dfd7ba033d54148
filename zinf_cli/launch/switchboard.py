"""One thread that serves the lifelines of all hosts: it hears what they say, beats, and notices who is silent.

It never waits for a host. Sockets and pipes are read when something has come, and a heartbeat that has no room is left
out: what takes the room is a sign of life as well.
"""

from __future__ import annotations

import select
import threading
import time
from typing import Protocol

_HEARTBEAT_S = 1.0


class Line(Protocol):
    """A lifeline, as the switchboard knows it. No call may wait for the host."""

    def fileno(self) -> int:
        """What can be read when something has come."""

    def hear(self) -> bool:
        """Take in what has come. False if that was the end."""

    def beat(self) -> None:
        """Send a heartbeat."""

    def judge(self) -> None:
        """Give the host up if it has been silent for too long."""


class Switchboard:
    """Serves the lines that have joined, from `start` to `close`."""

    def __init__(self) -> None:
        self._heard = select.epoll()
        self._lines: dict[int, Line] = {}
        self._changing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="serves all hosts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        with self._changing:
            self._lines.clear()
            self._heard.close()

    def __len__(self) -> int:
        return len(self._lines)

    def join(self, line: Line) -> None:
        with self._changing:
            if not self._heard.closed:
                self._lines[line.fileno()] = line
                self._heard.register(line.fileno(), select.EPOLLIN)

    def leave(self, line: Line) -> None:
        """From now on nothing of the line is called, and its descriptor may be closed."""
        with self._changing:
            if self._lines.get(line.fileno()) is line:
                self._forget(line.fileno())

    def pause(self, line: Line) -> None:
        """Don't hear the line until `resume`. It is still sent heartbeats."""
        self._heard.modify(line.fileno(), 0)

    def resume(self, line: Line) -> None:
        with self._changing:
            if self._lines.get(line.fileno()) is line:
                self._heard.modify(line.fileno(), select.EPOLLIN)

    def _forget(self, descriptor: int) -> None:
        del self._lines[descriptor]
        self._heard.unregister(descriptor)

    def _serve(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            wait = min(0.1, max(0.0, due - time.monotonic()))
            for descriptor, _ in self._heard.poll(wait, max(1, len(self._lines))):
                with self._changing:
                    line = self._lines.get(descriptor)
                    if line is not None and not line.hear():
                        self._forget(descriptor)
            if time.monotonic() >= due:
                due = time.monotonic() + _HEARTBEAT_S
                with self._changing:
                    lines = tuple(self._lines.items())
                for descriptor, line in lines:
                    with self._changing:
                        if self._lines.get(descriptor) is line:
                            line.beat()
                            line.judge()
