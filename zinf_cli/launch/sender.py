"""Sends to the other end of a link, in a thread: nobody who says something waits for that end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

_MOST_WAITING = 1024
"""Messages that may wait for the link before heartbeats are left out."""


class Hold:
    """A point in what is sent, behind which nothing is, until it is `released`."""

    def __init__(self, last: bytes) -> None:
        self.last = last
        self.reached = threading.Event()
        """Whether `last`, and all before it, has been sent."""
        self.released = threading.Event()


class Sender:
    """Sends messages in their order by `send`, which may wait, and raises OSError once the other end is gone."""

    def __init__(self, send: Callable[[bytes], None], name: str) -> None:
        self._send = send
        self._waiting: queue.SimpleQueue[bytes | Hold | None] = queue.SimpleQueue()
        self._gone = False
        self._sends = threading.Thread(target=self._send_all, name=name, daemon=True)
        self._sends.start()

    def say(self, *messages: bytes) -> None:
        """Queue messages. It takes no lock, so a signal handler may interrupt it and do the same."""
        for message in messages:
            self._waiting.put(message)

    def hold(self, last: bytes) -> Hold:
        """Queue a last message, and then silence. As `say`, it takes no lock."""
        hold = Hold(last)
        self._waiting.put(hold)
        return hold

    @property
    def has_room(self) -> bool:
        return self._waiting.qsize() < _MOST_WAITING

    def close(self, within: float) -> None:
        """Wait until all is sent, but for no more than so many seconds."""
        self._waiting.put(None)
        self._sends.join(within)

    def _send_all(self) -> None:
        while (one := self._waiting.get()) is not None:
            if isinstance(one, Hold):
                self._send_one(one.last)
                one.reached.set()
                one.released.wait()
            else:
                self._send_one(one)

    def _send_one(self, message: bytes) -> None:
        if not self._gone:
            self._gone = True  # unless this comes to its end
            with suppress(OSError):  # whoever listens to the other end hears that it is gone
                self._send(message)
                self._gone = False
