"""A launch on a hundred hosts, over a transport that plays them: preflight, fan-out, one host that fails."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zinf_cli.errors import PreflightError
from zinf_cli.launch.connection import Lifelines
from zinf_cli.launch.preflight import check_hosts
from zinf_cli.launch.runner import Agent, Outcome, Program, World, run_ranks
from zinf_cli.launch.transport import Channel
from zinf_cli.recipe.hosts import Host
from zinf_cli.version import code_digest

AGENT = Agent("ranks")
HOSTS = tuple(Host(f"node{number:03d}", tuple(range(8))) for number in range(100))
FACTS = {
    "code": code_digest(), "torch": "2.13.0", "accelerators": 8, "memory": 2**40,
    "drives": {}, "paths": {}, "memlock": -1,
}  # fmt: skip

Answer = Callable[[Host, dict[str, Any]], list[dict[str, Any]]]


def well(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
    """What the supervisor of a healthy host says to a request."""
    if request["do"] == "run":
        output = json.dumps({**FACTS, "time": time.time()}) if "zinf_cli.launch.facts" in request["command"] else ""
        return [{"answer": 1}, {"event": "ended", "code": 0, "output": output, "errors": ""}]
    if request["do"] == "listen":
        return [{"answer": {"address": "10.0.0.1", "port": 4000}}]
    return [{"answer": "eth0" if request["do"] == "reach" else None}]


class Simulated:
    """Plays every host by `answer`; counts how many are being connected to at once."""

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


class SimulatedChannel:
    silence_s = math.inf

    def __init__(self, transport: Simulated, host: Host) -> None:
        self._transport, self._host = transport, host
        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._say({"event": "hello", "python": "3.11.2"})

    def _say(self, message: dict[str, Any]) -> None:
        self._said.put(json.dumps(message).encode() + b"\n")

    def send(self, data: bytes) -> None:
        for line in filter(None, data.split(b"\n")):
            request = json.loads(line)
            self._transport.requests.append((self._host.name, request["do"]))
            for message in self._transport.answer(self._host, request):
                self._say(message)

    def receive(self) -> bytes:
        return self._said.get()

    def close(self) -> None:
        self._said.put(b"")

    abort = close

    def last_words(self) -> str:
        return ""


def launch(transport: Simulated, run_dir: Path) -> Outcome:
    program = Program(AGENT, "life", [], run_dir, {"recipe.yaml": "", "plan.json": ""}, [], False, {})
    with Lifelines(transport) as lifelines:
        preflight = check_hosts(HOSTS, lifelines)
        preflight.require_ready()
        world = World(lifelines, preflight.connections, preflight.rendezvous)
        return run_ranks(program, world, on_poll=lambda: None, notify=print)


def test_a_hundred_hosts_are_looked_at_and_started_many_at_once(tmp_path: Path) -> None:
    transport = Simulated()
    outcome = launch(transport, tmp_path)
    assert (outcome.exit_code, outcome.failure) == (0, None)
    assert 16 < transport.most_at_once <= 32
    started = [host for host, do in transport.requests if do == "run"]
    assert sorted(started) == sorted([host.name for host in HOSTS] * 2)  # the facts, then the agent
    # the first host gives the port back before any other looks for it there
    agents = started[len(HOSTS) :]
    assert agents[0] == "node000"


def test_the_one_host_that_is_not_ready_is_named() -> None:
    def full(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
        if host.name == "node057" and request["do"] == "reach":
            return [{"error": "can't reach 10.0.0.1 port 4000: No route to host"}]
        return well(host, request)

    with Lifelines(Simulated(full)) as lifelines:
        preflight = check_hosts(HOSTS, lifelines)
    (problem,) = preflight.problems
    assert problem.startswith("node057: can't reach 10.0.0.1 port 4000: No route to host")


def test_the_one_host_that_fails_is_named(tmp_path: Path) -> None:
    def failing(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
        if request["do"] == "run" and request["command"] == AGENT.start()["command"]:
            ended = {"event": "ended", "code": 1, "output": "", "errors": ""}
            return [{"answer": 1}, ended] if host.name == "node057" else [{"answer": 1}]
        if request["do"] == "kill":
            return [{"answer": None}, {"event": "ended", "code": -15, "output": "", "errors": ""}]
        return well(host, request)

    outcome = launch(Simulated(failing), tmp_path)
    assert outcome.exit_code == 1
    assert outcome.failure is not None
    assert (outcome.failure.host, outcome.failure.message) == ("node057", "torchrun itself: ended with exit code 1")
    assert outcome.others.startswith("ended on node000, node001")


def test_none_is_started_when_one_can_not_be(tmp_path: Path) -> None:
    def busy(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
        if host.name == "node057" and request["do"] == "open_folder":
            return [{"error": "/runs/a: another run is using this folder"}]
        return well(host, request)

    transport = Simulated(busy)
    with pytest.raises(PreflightError, match=r"^node057: /runs/a: another run is using this folder$"):
        launch(transport, tmp_path)
    assert [do for _, do in transport.requests].count("run") == len(HOSTS)  # the facts, and no agent


def test_the_launcher_stays_small(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import test_hundred_hosts as t\n"
        "from zinf_cli.commands import launch\nfrom zinf_cli.launch import ssh\n"
        "assert t.launch(t.Simulated(), Path(sys.argv[1])).exit_code == 0\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 300 * 10**6
