"""A host as the launcher deals with it: requests and answers, events as they come, and whether it is still there."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from zinf_cli.errors import HostError, ZinfError
from zinf_cli.hosts import Host
from zinf_cli.launch.transport import SILENCE_S, Channel, Transport

_HEARTBEAT_S = 1.0
_HELLO_S = 20.0
_ANSWER_S = 60.0
_MOST_AT_ONCE = 32
"""Hosts that are being connected to, or asked something, at the same time."""

T = TypeVar("T")


class Connection:
    """To the supervisor of `host`. `lost` says why it is gone, None while it is there."""

    def __init__(self, host: Host, channel: Channel) -> None:
        self.host = host
        self.python = ""
        """The version of its Python."""
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        """Messages that answer no request; thread-safe."""
        self._channel = channel
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._one_request = threading.Lock()
        self._sending = threading.Lock()
        self._heard = time.monotonic()
        self._ended: str | None = None
        self._reader = threading.Thread(target=self._read, name=f"reads {host.name}", daemon=True)
        self._reader.start()

    def greet(self) -> None:
        """Wait for the supervisor's first word; HostError where none comes."""
        try:
            hello = self._answers.get(timeout=_HELLO_S)
        except queue.Empty:
            raise HostError(f"no answer within {_HELLO_S:.0f} s of login", where=self.host.name) from None
        if hello is None:
            words = self._channel.last_words().strip().splitlines()
            raise HostError(words[-1] if words else "the login ended at once", where=self.host.name)
        self.python = hello["python"]

    @property
    def lost(self) -> str | None:
        if self._ended is None and time.monotonic() - self._heard > SILENCE_S:
            self._give_up(f"gave no sign of life for {SILENCE_S:.0f} s")
        return self._ended

    def request(self, do: str, *, within: float = _ANSWER_S, **arguments: Any) -> Any:
        """Have the supervisor do something; HostError if it can't, is gone, or takes more than `within` seconds."""
        with self._one_request:
            try:
                self._send(json.dumps({"do": do, **arguments}).encode() + b"\n")
            except OSError as error:
                raise HostError(self._ended or f"connection lost: {error}", where=self.host.name) from error
            answer = self._answer(within)
            if answer is None:  # a late answer would be taken for the next one's
                if self.lost is None:
                    self._give_up(f"no answer to {do} within {within:.0f} s")
                raise HostError(str(self._ended), where=self.host.name)
        if "error" in answer:
            raise HostError(answer["error"], where=self.host.name)
        return answer["answer"]

    def _answer(self, within: float) -> dict[str, Any] | None:
        """The next answer; None if the host is lost meanwhile, or takes too long."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            with suppress(queue.Empty):
                return self._answers.get(timeout=0.5)
            if self.lost is not None:
                break
        return None

    def capture(self, command: Sequence[str], *, within: float, text: str = "", opening: str = "") -> dict[str, Any]:
        """Run a command there to its end: its "code", "output" and "errors". `text` is what it reads.

        `opening` comes before it, unless the command stands by and has read one.
        """
        self.request("run", command=command, text=text, opening=opening)
        deadline = time.monotonic() + within
        while self.lost is None and time.monotonic() < deadline:
            with suppress(queue.Empty):
                event = self.events.get(timeout=0.2)
                if event["event"] == "ended":
                    return event
        raise HostError(self.lost or f"{command[2]} took more than {within:.0f} s", where=self.host.name)

    def beat(self) -> None:
        with suppress(OSError):
            self._send(b"\n")

    def close(self) -> None:
        """Close the lifeline; the supervisor ends what still runs."""
        if self._ended is None:
            self._ended = "closed"
            self._channel.close()
        else:
            self._channel.abort()

    def _give_up(self, why: str) -> None:
        self._ended = why
        self._channel.abort()

    def _send(self, data: bytes) -> None:
        with self._sending:
            self._channel.send(data)

    def _read(self) -> None:
        rest = b""
        with suppress(OSError):
            while data := self._channel.receive():
                self._heard = time.monotonic()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(line)
        self._ended = self._ended or "the connection was lost, or its supervisor killed"
        self._answers.put(None)

    def _take(self, line: bytes) -> None:
        """One message; what a login shell prints before the first one is none."""
        try:
            message = json.loads(line)
        except ValueError:
            return
        if isinstance(message, dict) and ("answer" in message or "error" in message or message.get("event") == "hello"):
            self._answers.put(message)
        elif isinstance(message, dict) and "event" in message:
            self.events.put(message)


def at_all(action: Callable[[T], Any], to: Sequence[T]) -> list[Any]:
    """Do something at all hosts, many at once: results in order, a ZinfError in the place of a result."""

    def attempt(one: T) -> Any:
        try:
            return action(one)
        except ZinfError as error:
            return error

    if len(to) < 2:
        return [attempt(one) for one in to]
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, len(to))) as pool:
        return list(pool.map(attempt, to))


class Lifelines:
    """Connections to the hosts of one launch: kept alive while this is open, all closed at its end."""

    def __init__(self, transport: Transport) -> None:
        self.launch_id = uuid.uuid4().hex
        self._transport = transport
        self._connections: list[Connection] = []
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeats", daemon=True)

    def __enter__(self) -> Lifelines:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._heart.join()
        at_all(Connection.close, self._connections)

    def connect(self, host: Host) -> Connection:
        """Start the supervisor of `host`; HostError says why that can't be. Hosts may be connected to at once."""
        connection = Connection(host, self._transport.open(host, self.launch_id))
        self._connections.append(connection)
        connection.greet()
        return connection

    def _beat(self) -> None:
        while not self._over.wait(_HEARTBEAT_S):
            for connection in tuple(self._connections):
                connection.beat()
