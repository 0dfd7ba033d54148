"""The program that connects a launcher to a group of hosts, from the first host of that group: `python -m` it.

    launcher ══ ssh ══ relay ══ ssh ══ supervisor      (and one by pipes, on the relay's own host)

The launcher starts it where it would have to start too many programs itself (branches.py). It knows nothing of what
launcher and supervisors say: it opens channels, and passes bytes on in frames. Heartbeats between a supervisor and the
launcher are such bytes, so a host counts as lost when it would without a relay. When the launcher is gone or silent,
the relay hangs up on all its hosts, and their supervisors end what runs there.

The thread that hears the launcher and the one that hears hosts never wait for anybody: what a host is told, and what
the launcher is, is sent by threads of their own. How much of a host waits here is limited by what the launcher has
taken in of it (frames.WINDOW).

SIGTERM and SIGUSR1 are the launcher's to obey, as for a supervisor. It needs zinf itself on its host, as ranks do.
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
from zinf_cli.launch.frames import MOST_BYTES, WINDOW, Frames, Kind, bytes_taken, frame, frames_of, language
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.pipes import Pipes
from zinf_cli.launch.process_tree import LAUNCH_ID, become_subreaper, end_descendants
from zinf_cli.launch.sender import Sender
from zinf_cli.launch.srun import Srun
from zinf_cli.launch.switchboard import Switchboard
from zinf_cli.launch.transport import SILENCE_S, Channel, Greeting, Transport, give_up
from zinf_cli.recipe.hosts import Host

_HEARTBEAT_S = 1.0
_LOOK_S = 0.2
_END_S = SILENCE_S + 2.0
"""Seconds that all hosts together have to end. They have been told at once."""

_GIVE_UP_S = 2.0
_LEAST_BYTES = 1 << 12
"""A host with room for less has to wait. That it is gone the kernel tells all the same, and then this much is read."""


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
        self._sender = Sender(self._write, "sends to the launcher")
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
                    data = self._read()
                    if not data:
                        break
                    self._patience.renew()
                    for kind, number, content in frames.after(data):
                        self._do(kind, number, content)
                elif self._patience.is_over:
                    break
                if time.monotonic() >= due:
                    due = time.monotonic() + _HEARTBEAT_S
                    if self._sender.has_room:
                        self._sender.say(frame(Kind.BEAT))
        finally:
            self._end()

    def _read(self) -> bytes:
        with contextlib.suppress(OSError):
            return os.read(self._heard, 1 << 16)
        return b""

    def _write(self, message: bytes) -> None:
        left = memoryview(message)
        while left:
            left = left[os.write(self._told, left) :]

    def _do(self, kind: Kind, number: int, content: bytes) -> None:
        """Do what a frame asks."""
        if kind is Kind.STOPPING:
            self._patience.hold()
        elif kind is Kind.OPEN:
            asked = json.loads(content)
            transport = self._own if asked.pop("own") else self._others
            opening = partial(transport.open, Host(slots=(), **asked), self._launch_id)
            self._hosts[number] = _Relayed(number, opening, self._sender.say, self._switchboard)
        elif (host_there := self._hosts.get(number)) is None:
            return
        elif kind is Kind.DATA:
            host_there.pass_on(content)
        elif kind is Kind.TAKEN:
            host_there.go_on(bytes_taken(content))
        elif kind in (Kind.HANG_UP, Kind.ABORT):
            del self._hosts[number]
            host_there.leave(at_once=kind is Kind.ABORT)

    def _end(self) -> None:
        hosts = [host for host in self._hosts.values() if host.is_open]  # where a login goes on, nothing runs yet
        for host in hosts:
            host.leave()
        stuck = _wait_for(hosts, _END_S)
        for host in stuck:
            host.leave(at_once=True)
        _wait_for(stuck, _GIVE_UP_S)
        self._sender.close(_GIVE_UP_S)  # the launcher may take nothing more
        self._switchboard.close()
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
        self._room = WINDOW
        self._changing_room = threading.Lock()
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
            give_up(self._channel, f"host {self._number}")

    @property
    def is_open(self) -> bool:
        return self._channel is not None

    def is_left(self, within: float) -> bool:
        self._serves.join(within)
        return not self._serves.is_alive()

    def _serve(self) -> None:
        try:
            channel = self._channel = self._opening()
        except Exception as error:  # whatever it is, the launcher waits for an answer
            told: dict[str, str | None] = {"message": f"{type(error).__name__}: {error}"}
            if isinstance(error, HostError):
                told = {"message": error.message, "hint": error.hint}
            self._say(frame(Kind.REFUSED, self._number, json.dumps(told).encode()))
            return
        self._say(frame(Kind.OPENED, self._number))
        self._tell(channel.first)
        self._switchboard.join(self)
        while (data := self._waiting.get()) is not None:
            with contextlib.suppress(OSError):  # its end is heard
                channel.send(data)
        channel.hang_up()
        if not self._ended.wait(_GIVE_UP_S):
            self._say(frame(Kind.END, self._number))
        self._switchboard.leave(self)
        channel.close()

    def go_on(self, num_bytes: int) -> None:
        """Count what the launcher has taken in. Hear the host again if it had to wait for that."""
        with self._changing_room:
            waits = self._room < _LEAST_BYTES
            self._room += num_bytes
            goes_on = waits and self._room >= _LEAST_BYTES
        if goes_on:
            self._switchboard.resume(self)

    def _tell(self, data: bytes) -> bool:
        """Pass on what the host says. Whether the launcher takes more."""
        self._say(*frames_of(self._number, data))
        with self._changing_room:
            self._room -= len(data)
            return self._room >= _LEAST_BYTES

    def fileno(self) -> int:
        assert self._channel is not None
        return self._channel.fileno()

    def hear(self) -> bool:
        assert self._channel is not None
        try:
            data = self._channel.receive(max(self._room, _LEAST_BYTES))
        except OSError:
            data = b""
        if not data:
            words = self._channel.last_words().encode()[-MOST_BYTES:]
            self._say(frame(Kind.END, self._number, words))
            self._ended.set()
        elif not self._tell(data):
            self._switchboard.pause(self)
        return bool(data)

    def beat(self) -> None:
        """The launcher's own heartbeats reach the host."""

    def judge(self) -> None:
        """The launcher judges it."""


def _wait_for(hosts: list[_Relayed], seconds: float) -> list[_Relayed]:
    """The hosts that are not left within so many seconds."""
    until = time.monotonic() + seconds
    return [host for host in hosts if not host.is_left(max(0.0, until - time.monotonic()))]


def main() -> None:
    """Greet with the mark of the launch, whose id is in its environment. Then serve.

    The first argument is the launcher's frames.language(); the second by what to reach hosts, "ssh" or "srun".
    """
    spoken, by = sys.argv[1:]
    if spoken != language():
        sys.exit("its zinf is not the launcher's")
    heard, told = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nothing else here may take, or add, a byte of the link
    os.dup2(2, 1)
    launch_id = os.environ.pop(LAUNCH_ID)  # not for each ssh: a sweep of this host would end it
    with contextlib.suppress(OSError):
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: None)  # ignored, they would be so by each ssh as well
    become_subreaper()
    relay = Relay(heard, told, launch_id, Pipes(SILENCE_S), Srun() if by == "srun" else find_ssh())
    os.write(told, Greeting(launch_id).words)
    with contextlib.suppress(KeyboardInterrupt):
        relay.serve()
    end_descendants()  # what is still logging in, or does not hear of the end
    sys.stderr.flush()
    os._exit(0)  # a thread may still wait for a host


if __name__ == "__main__":
    main()
