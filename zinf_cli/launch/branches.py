"""The tree of a launch on very many hosts: relays on some of them connect to the others (relay.py).

For the code above, a host behind a relay has a Channel like any other. A relay that is lost is the cause that all its
hosts name. A host that its relay does not reach is tried from here: a cluster whose hosts may not log in to each other
takes the room that it takes without relays.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count, pairwise
from typing import Protocol, runtime_checkable

from zinf_cli.errors import HostError
from zinf_cli.launch.frames import WINDOW, Frames, Kind, frame, frames_of, taken
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.sender import Sender
from zinf_cli.launch.switchboard import Switchboard
from zinf_cli.launch.transport import MOST_RECEIVED, SILENCE_S, Channel, Gone, Transport, give_up
from zinf_cli.recipe.hosts import Host

_TRIES = 3
"""How many hosts of a group are tried, until a relay runs on one."""
_HOLD_S = 0.5
"""How long Ctrl-Z, or the end, waits for what is still being sent to relays."""
_LATER_S = 3.0
"""A host behind a relay may be silent for so much longer than the relay: if that is lost, it is the cause."""


@runtime_checkable
class Branching(Transport, Protocol):
    """A transport that starts relays, too."""

    most_direct: int
    """To so many hosts it connects from here. With more, relays do."""

    def open_relay(self, host: Host, launch_id: str) -> Channel:
        """Start a relay on `host`. HostError says why that is not possible."""


def groups_of(hosts: Sequence[Host]) -> list[Sequence[Host]]:
    """About √N groups of about √N hosts, in order."""
    groups = math.isqrt(max(0, len(hosts) - 1)) + 1
    bounds = [len(hosts) * number // groups for number in range(groups + 1)]
    return [hosts[first:last] for first, last in pairwise(bounds)]


class Branches:
    """Opens channels to hosts: through a relay where one has been started for them, else from here."""

    def __init__(self, transport: Transport, launch_id: str, switchboard: Switchboard) -> None:
        self._transport = transport
        self._launch_id = launch_id
        self._switchboard = switchboard
        self.relays: list[Relay] = []
        self._by_host: dict[Host, Relay] = {}

    def wanted(self, hosts: Sequence[Host]) -> list[Sequence[Host]]:
        """The groups of hosts that get a relay each: none, while this machine can connect to all."""
        if isinstance(self._transport, Branching) and len(hosts) > self._transport.most_direct:
            return groups_of(hosts)
        return []

    def grow(self, group: Sequence[Host]) -> None:
        """Start a relay for a group, on the first of its hosts where that is possible."""
        assert isinstance(self._transport, Branching)
        for number, host in enumerate(group[:_TRIES]):
            with suppress(HostError, OSError):  # if it can't be reached at all, `open` says why
                channel = self._transport.open_relay(host, self._launch_id)
                relay = Relay(host, channel, self._switchboard)
                self.relays.append(relay)
                self._by_host.update(dict.fromkeys(group[number:], relay))
                return

    def open(self, host: Host) -> Channel:
        """A channel to the supervisor of `host`, which is started. HostError says why that is not possible."""
        try:
            return self._open(host)
        except OSError as error:  # no program, no descriptor
            why, hint = f"this machine can't connect to it: {error.strerror}", "see ulimit -n and ulimit -u"
            raise HostError(why, where=host.name, hint=hint) from error

    def _open(self, host: Host) -> Channel:
        relay = self._by_host.get(host)
        if relay is None or relay.lost is not None:
            return self._transport.open(host, self._launch_id)
        try:
            return relay.open(host)
        except HostError as refused:
            self._by_host.pop(host, None)
            try:
                return self._transport.open(host, self._launch_id)
            except HostError as error:
                message = f"{error.message}; from {relay.host.name}: {refused.message}"
                raise HostError(message, where=host.name, hint=error.hint) from error

    def way_to(self, host: Host) -> str:
        """By what the host is reached."""
        relay = self._by_host.get(host)
        through = "" if relay is None or relay.lost is not None else f", {relay.host.name}"
        return self._transport.name + through

    @contextmanager
    def held(self) -> Iterator[None]:
        """Tell all relays that this process will be stopped, behind what hosts are told. Inside, nothing else is sent.

        As a handler of signals calls it, it takes no lock that the main thread may hold.
        """
        holds = [relay.sender.hold(frame(Kind.STOPPING)) for relay in tuple(self.relays)]
        until = time.monotonic() + _HOLD_S
        try:
            for hold in holds:
                hold.reached.wait(max(0.0, until - time.monotonic()))
            yield
        finally:
            for hold in holds:
                hold.released.set()


class Relay:
    """The launcher's end of the link to a relay: a Line of the switchboard. `lost` says why the relay is gone.

    Nothing that is sent waits for the relay: `sender` does.
    """

    def __init__(self, host: Host, channel: Channel, switchboard: Switchboard) -> None:
        self.host = host
        self.lost: str | None = None
        self.silence_s = channel.silence_s
        self.sender = Sender(channel.send, f"sends to relay {host.name}")
        self._channel = channel
        self._switchboard = switchboard
        self._patience = Patience(channel.silence_s)
        self._frames = Frames()
        self._hosts: dict[int, RelayedChannel] = {}
        self._numbers = count(1)
        self._changing = threading.Lock()
        self._take_in(channel.first)
        switchboard.join(self)

    def open(self, host: Host) -> Channel:
        """A channel through the relay. HostError says why there is none."""
        own = host == self.host
        number = next(self._numbers)
        there = RelayedChannel(self, number, "" if own else f"its relay {self.host.name} is lost: ")
        with self._changing:
            self._hosts[number] = there
            lost = self.lost
        if lost is not None:
            there.end(lost)
        asked = {name: getattr(host, name) for name in ("host", "user", "port", "job", "gpus")} | {"own": own}
        self.sender.say(frame(Kind.OPEN, number, json.dumps(asked).encode()))
        try:
            there.opened.result()
        except HostError:
            there.close()
            raise
        return there

    def forget(self, number: int) -> None:
        with self._changing:
            self._hosts.pop(number, None)

    def fileno(self) -> int:
        return self._channel.fileno()

    def hear(self) -> bool:
        try:
            data = self._channel.receive()
        except OSError:
            data = b""
        if not data:
            self._lose("the connection was lost, or the relay killed")
            return False
        self._patience.renew()
        if self.lost is None:  # else its hosts have been told
            self._take_in(data)
        return True

    def _take_in(self, data: bytes) -> None:
        try:
            for kind, number, content in self._frames.after(data):
                with self._changing:
                    there = self._hosts.get(number)
                if there is not None:
                    there.take(kind, content)
        except ValueError:
            self._give_up("what came from it is not what a relay says: something else prints there")

    def beat(self) -> None:
        if self.lost is None and self.sender.has_room:
            self.sender.say(frame(Kind.BEAT))

    def judge(self) -> None:
        if self.lost is None and self._patience.is_over:
            self._give_up(f"gave no sign of life for {self._channel.silence_s:.0f} s")

    def _give_up(self, why: str) -> None:
        self._lose(why)
        give_up(self._channel, self.host.name)

    def _lose(self, why: str) -> None:
        with self._changing:
            if self.lost is not None:
                return
            self.lost = why
            hosts = list(self._hosts.values())
        for there in hosts:
            there.end(why)

    def close(self) -> None:
        """End the relay. All channels through it are closed by then."""
        self.sender.close(_HOLD_S)
        if self.lost is None:
            self._channel.hang_up()
        else:
            self._channel.abort()
        self._switchboard.leave(self)
        self._channel.close()


class RelayedChannel:
    """A Channel (transport.py) through a relay. Its descriptor is a counter in the kernel: what comes waits here.

    `take`, `receive` and, but for a channel that is not open yet, `end` are called by the switchboard's thread.
    """

    first = b""

    def __init__(self, relay: Relay, number: int, cause: str) -> None:
        self.silence_s = relay.silence_s + _LATER_S
        self._relay, self._number, self._cause = relay, number, cause
        self.opened: Future[None] = Future()
        self._ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._changing = threading.Lock()
        self._come = bytearray()
        self._untold = 0
        """Bytes that were taken in, of which the relay has not been told."""
        self._lost: str | None = None
        self._words = ""
        self._over = threading.Event()
        self._closed = False

    def take(self, kind: Kind, content: bytes) -> None:
        """Take in a frame of the relay's."""
        if kind is Kind.OPENED:
            self.opened.set_result(None)
        elif kind is Kind.REFUSED:
            self.opened.set_exception(HostError(**json.loads(content)))
        elif kind is Kind.END:
            self._words = content.decode(errors="replace")
            self._tell_end()
        elif kind is Kind.DATA:
            with self._changing:
                self._come += content
                self._signal()

    def end(self, why: str) -> None:
        """The relay is gone."""
        self._lost = self._cause + why
        if not self.opened.done():
            self.opened.set_exception(HostError(why))
        self._tell_end()

    def _tell_end(self) -> None:
        with self._changing:
            self._over.set()
            self._signal()

    def _signal(self) -> None:
        if not self._closed:
            os.eventfd_write(self._ready, 1)

    def fileno(self) -> int:
        return self._ready

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        with self._changing:
            data = bytes(self._come[:most])
            del self._come[:most]
            over = self._over.is_set()
            if not over and not self._come:  # once it is over, it can be read for ever: the last that comes is the end
                with suppress(BlockingIOError):
                    os.eventfd_read(self._ready)
        self._untold += len(data)
        if self._untold >= WINDOW // 2:
            self._relay.sender.say(taken(self._number, self._untold))
            self._untold = 0
        if not data and over and self._lost is not None:
            raise Gone(self._lost)
        return data if data or over else b"\n"  # called in vain; b"" would be the end

    def has_room(self) -> bool:
        return self._relay.sender.has_room

    def send(self, data: bytes) -> None:
        if self._over.is_set():
            raise BrokenPipeError(self._lost or "the connection was lost")
        self._relay.sender.say(*frames_of(self._number, data))

    def hang_up(self) -> None:
        self._relay.sender.say(frame(Kind.HANG_UP, self._number))
        self._over.wait(SILENCE_S)  # the supervisor ends its descendants first, then itself

    def abort(self) -> None:
        self._relay.sender.say(frame(Kind.ABORT, self._number))

    def last_words(self) -> str:
        return self._words

    def close(self) -> None:
        self._relay.forget(self._number)
        self.abort()  # unless it was hung up on
        with self._changing:
            if not self._closed:
                self._closed = True
                os.close(self._ready)
