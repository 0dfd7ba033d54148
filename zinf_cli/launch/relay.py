"""The program that connects a launcher to a group of hosts, from the first host of that group: `python -m` it.

    launcher ══ ssh ══ relay ══ ssh ══ supervisor      (and one by pipes, on the relay's own host)

The launcher starts it where it would have to start too many programs itself (branches.py). It knows nothing of what
launcher and supervisors say: it opens channels, and passes bytes on in frames. Heartbeats between a supervisor and the
launcher are such bytes, so a host counts as lost when it would without a relay. When the launcher is gone or silent,
the relay hangs up on all its hosts, and their supervisors end what runs there.

SIGTERM is the launcher's to obey, as for a supervisor. It needs zinf itself on its host, as ranks do.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from zinf_cli.errors import HostError
from zinf_cli.launch.connection import find_ssh
from zinf_cli.launch.frames import Frames, Kind, frame, frames_of
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.pipes import Pipes
from zinf_cli.launch.switchboard import Switchboard
from zinf_cli.launch.transport import SILENCE_S, Channel, Greeting, Transport
from zinf_cli.recipe.hosts import Host

_HEARTBEAT_S = 1.0
_LOOK_S = 0.2
_END_S = SILENCE_S + 2.0
"""Seconds that all hosts together have to end. They have been told at once."""

_GIVE_UP_S = 2.0


class Relay:
    """Serves one launcher, by the descriptors `heard` and `told`, until it is gone or silent for `silence_s` seconds.

    `own` starts the supervisor of the relay's own host, `others` those of the other hosts.
    """

    def __init__(
        self, heard: int, told: int, launch_id: str, own: Transport, others: Transport, silence_s: float = SILENCE_S
    ) -> None:
        self._heard, self._told = heard, told
        self._launch_id = launch_id
        self._own, self._others = own, others
        self._patience = Patience(silence_s)
        self._saying = threading.Lock()
        self._hosts: dict[int, _Relayed] = {}
        self._switchboard = Switchboard()

    def serve(self) -> None:
        """Pass on what comes, until the end. Then hang up on all hosts."""
        frames = Frames()
        self._switchboard.start()
        due = time.monotonic()
        try:
            while True:
                if select.select([self._heard], [], [], _LOOK_S)[0]:
                    data = os.read(self._heard, 1 << 16)
                    if not data:
                        break
                    self._patience.renew()
                    for kind, number, content in frames.after(data):
                        self._do(kind, number, content)
                elif self._patience.is_over:
                    break
                if time.monotonic() >= due:
                    due = time.monotonic() + _HEARTBEAT_S
                    self._beat()
        finally:
            self._end()

    def say(self, *frames: bytes) -> None:
        """Tell the launcher. While it takes nothing more, this waits: so a host has to wait whom nobody reads."""
        with self._saying, contextlib.suppress(OSError):  # a launcher that is gone is noticed by its silence
            for one in frames:
                left = memoryview(one)
                while left:
                    left = left[os.write(self._told, left) :]

    def _beat(self) -> None:
        """Send a heartbeat, unless something else is being sent."""
        if self._saying.acquire(blocking=False):
            try:
                room = select.poll()
                room.register(self._told, select.POLLOUT)
                if room.poll(0):
                    os.write(self._told, frame(Kind.BEAT))
            except OSError:
                pass  # its end will be heard
            finally:
                self._saying.release()

    def _do(self, kind: Kind, number: int, content: bytes) -> None:
        """Do what a frame asks, without waiting for any host."""
        if kind is Kind.STOPPING:
            self._patience.hold()
        elif kind is Kind.OPEN:
            asked = json.loads(content)
            transport = self._own if asked.pop("own") else self._others
            opening = partial(transport.open, Host(slots=(), **asked), self._launch_id)
            self._hosts[number] = _Relayed(number, opening, self.say, self._switchboard)
        elif (host_there := self._hosts.get(number)) is None:
            return
        elif kind is Kind.DATA:
            host_there.pass_on(content)
        elif kind in (Kind.PAUSE, Kind.RESUME):
            host_there.listen(kind is Kind.RESUME)
        elif kind in (Kind.HANG_UP, Kind.ABORT):
            del self._hosts[number]
            host_there.leave(at_once=kind is Kind.ABORT)

    def _end(self) -> None:
        hosts = list(self._hosts.values())
        for host in hosts:
            host.leave()
        until = time.monotonic() + _END_S
        stuck = [host for host in hosts if not host.is_left(max(0.0, until - time.monotonic()))]
        for host in stuck:
            host.leave(at_once=True)
        for host in stuck:
            host.is_left(_GIVE_UP_S)
        closing = threading.Thread(target=self._switchboard.close, daemon=True)  # it may wait for the launcher
        closing.start()
        closing.join(_GIVE_UP_S)
        self._others.close()


class _Relayed:
    """A host of the relay's group: a Line of its switchboard, and a thread that may wait for the host."""

    def __init__(
        self, number: int, opening: Callable[[], Channel], say: Callable[..., None], switchboard: Switchboard
    ) -> None:
        self._number = number
        self._opening = opening
        self._say = say
        self._switchboard = switchboard
        self._channel: Channel | None = None
        self._ended = threading.Event()
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._serves = threading.Thread(target=self._serve, name=f"serves host {number}", daemon=True)
        self._serves.start()

    def pass_on(self, data: bytes) -> None:
        self._waiting.put(data)

    def leave(self, *, at_once: bool = False) -> None:
        """Hang up when all is passed on, or give the host up at once. Its thread does the rest."""
        self._waiting.put(None)
        if at_once and self._channel is not None:
            threading.Thread(target=self._channel.abort, name=f"gives up host {self._number}", daemon=True).start()

    def is_left(self, within: float) -> bool:
        self._serves.join(within)
        return not self._serves.is_alive()

    def _serve(self) -> None:
        try:
            channel = self._channel = self._opening()
        except (HostError, OSError) as error:
            told: dict[str, str | None] = {"message": str(error)}
            if isinstance(error, HostError):
                told = {"message": error.message, "hint": error.hint}
            self._say(frame(Kind.REFUSED, self._number, json.dumps(told).encode()))
            return
        self._say(frame(Kind.OPENED, self._number), *frames_of(self._number, channel.first))
        self._switchboard.join(self)
        while (data := self._waiting.get()) is not None:
            with contextlib.suppress(OSError):  # its end is heard
                channel.send(data)
        channel.hang_up()
        if not self._ended.wait(_GIVE_UP_S):
            self._say(frame(Kind.END, self._number))
        self._switchboard.leave(self)
        channel.close()

    def listen(self, on: bool) -> None:
        """Go on to hear the host, or stop it."""
        with contextlib.suppress(OSError, ValueError):  # it is gone
            (self._switchboard.resume if on else self._switchboard.pause)(self)

    def fileno(self) -> int:
        assert self._channel is not None
        return self._channel.fileno()

    def hear(self) -> bool:
        assert self._channel is not None
        try:
            data = self._channel.receive()
        except OSError:
            data = b""
        if data:
            self._say(*frames_of(self._number, data))
        else:
            self._say(frame(Kind.END, self._number, self._channel.last_words().encode()))
            self._ended.set()
        return bool(data)

    def beat(self) -> None:
        """The launcher's own heartbeats reach the host."""

    def judge(self) -> None:
        """The launcher judges it."""


def main() -> None:
    """Greet with the mark of the launch, whose id is the first line of stdin. Then serve."""
    launch_id = b""
    while not launch_id.endswith(b"\n") and (byte := os.read(0, 1)):
        launch_id += byte
    with contextlib.suppress(OSError):
        os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    own = launch_id.decode().strip()
    relay = Relay(0, 1, own, Pipes(), find_ssh())
    os.write(1, Greeting(own).words)
    with contextlib.suppress(KeyboardInterrupt):
        relay.serve()
    sys.stderr.flush()
    os._exit(0)  # a thread may still wait for a host


if __name__ == "__main__":
    main()
