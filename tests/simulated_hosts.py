"""A hundred hosts that a transport plays, and a launch on them."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from zinf_cli.launch.connection import Lifelines
from zinf_cli.launch.preflight import check_hosts
from zinf_cli.launch.program import Agent, Program
from zinf_cli.launch.relay import Relay
from zinf_cli.launch.runner import Outcome, World, run_ranks
from zinf_cli.launch.transport import MOST_RECEIVED, Channel
from zinf_cli.recipe.hosts import Host
from zinf_cli.version import code_digest

AGENT = Agent("ranks")
HOSTS = tuple(Host(f"node{number:03d}", tuple(range(8))) for number in range(100))
FACTS = {
    "code": code_digest(), "torch": "2.13.0", "accelerators": 8, "memory": 2**40,
    "drives": {}, "paths": {}, "memlock": -1, "huge_pages": "madvise", "cores": 64,
}  # fmt: skip

Answer = Callable[[Host, dict[str, Any]], Iterable[dict[str, Any]]]


def well(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
    """What the supervisor of a healthy host says to a request."""
    if request["do"] == "run":
        output = json.dumps({**FACTS, "time": time.time()}) if "zinf_cli.launch.facts" in request["command"] else ""
        return [{"answer": 1}, {"event": "ended", "code": 0, "output": output, "errors": ""}]
    if request["do"] == "listen":
        return [{"answer": {"address": "10.0.0.1", "port": 4000}}]
    return [{"answer": "eth0" if request["do"] == "reach" else None}]


def refused(message: str, where: str | None = None) -> dict[str, Any]:
    """What a supervisor answers that can't do what it is asked."""
    return {"error": {"message": message, "where": where}}


class Simulated:
    """Plays every host by `answer`; counts how many are being connected to at once."""

    name = "simulated"

    def __init__(self, answer: Answer = well) -> None:
        self.answer = answer
        self.requests: list[tuple[str, str]] = []
        self.most_at_once = 0
        self._opening = 0
        self._lock = threading.Lock()

    def open(self, host: Host, launch_id: str) -> Channel:
        with self._lock:
            self._opening += 1
            self.most_at_once = max(self.most_at_once, self._opening)
        time.sleep(0.05)  # a login
        with self._lock:
            self._opening -= 1
        return SimulatedChannel(self, host)

    def close(self) -> None:
        pass


class SimulatedChannel:
    silence_s = math.inf
    first = b""

    def __init__(self, transport: Simulated, host: Host) -> None:
        self._transport, self._host = transport, host
        self._here, self._there = socket.socketpair()
        self._saying = threading.Lock()
        self._say({"event": "hello", "python": "3.11.2", "visible": ""})

    def _say(self, message: dict[str, Any]) -> None:
        with self._saying:
            self._there.sendall(json.dumps(message).encode() + b"\n")

    def fileno(self) -> int:
        return self._here.fileno()

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        return self._here.recv(most)

    def has_room(self) -> bool:
        return True

    def send(self, data: bytes) -> None:
        for line in filter(None, data.split(b"\n")):
            request = json.loads(line)
            self._transport.requests.append((self._host.name, request["do"]))
            for message in self._transport.answer(self._host, request):
                self._say(message)

    def hang_up(self) -> None:
        self._there.close()

    abort = hang_up

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        self._here.close()


class SimulatedTree(Simulated):
    """Hosts that are played behind real relays, which run in threads here; with more than two of them."""

    most_direct = 2

    def __init__(self, answer: Answer = well) -> None:
        super().__init__(answer)
        self.relays: dict[str, RelayChannel] = {}
        self.channels: dict[str, SimulatedChannel] = {}

    def open(self, host: Host, launch_id: str) -> Channel:
        channel = super().open(host, launch_id)
        assert isinstance(channel, SimulatedChannel)
        self.channels[host.name] = channel
        return channel

    def open_relay(self, host: Host, launch_id: str) -> Channel:
        self.relays[host.name] = RelayChannel(self, launch_id)
        return self.relays[host.name]

    def talk_on(self, host: str, count: int, size: int) -> None:
        """Let a host say far more than anybody takes in."""

        def talk() -> None:
            with suppress(OSError):  # somebody has left it
                for number in range(count):
                    self.channels[host]._say({"event": "file", "number": number, "data": "x" * size})

        threading.Thread(target=talk, daemon=True).start()


class RelayChannel:
    """A link to a relay that reaches its hosts by `transport`."""

    silence_s = math.inf  # played hosts do not beat
    first = b""

    def __init__(self, transport: Simulated, launch_id: str, silence_s: float = 10.0) -> None:
        self.link, there = socket.socketpair()
        relay = Relay(there.fileno(), there.fileno(), launch_id, transport, transport, silence_s)

        def serve() -> None:
            with there:
                relay.serve()

        self._serves = threading.Thread(target=serve, daemon=True)
        self._serves.start()

    def fileno(self) -> int:
        return self.link.fileno()

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        return self.link.recv(most)

    def has_room(self) -> bool:
        return True

    def send(self, data: bytes) -> None:
        self.link.sendall(data)

    def hang_up(self) -> None:
        self.abort()
        self._serves.join()

    def abort(self) -> None:
        with suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        self.link.close()


def launch(transport: Simulated, run_dir: Path, hosts: Sequence[Host] = HOSTS) -> Outcome:
    program = Program(AGENT, "life", [], run_dir, {"recipe.yaml": "", "plan.json": ""}, [], False, {})
    with Lifelines(transport) as lifelines:
        preflight = check_hosts(hosts, lifelines)
        preflight.require_ready()
        world = World(lifelines, preflight.connections, preflight.rendezvous)
        return run_ranks(program, world, on_poll=lambda: None, notify=print)
