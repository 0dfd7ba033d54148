"""A launch on a hundred hosts, over a transport that plays them: preflight, fan-out, one host that fails."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from programs import command, environment
from simulated_hosts import AGENT, HOSTS, Simulated, launch, refused, well
from zinf_cli.errors import PreflightError
from zinf_cli.launch.connection import Lifelines
from zinf_cli.launch.preflight import check_hosts
from zinf_cli.recipe.hosts import Host


def test_a_hundred_hosts_are_looked_at_and_started_many_at_once(tmp_path: Path) -> None:
    transport = Simulated()
    outcome = launch(transport, tmp_path)
    assert (outcome.exit_code, outcome.failure) == (0, None)
    assert 16 < transport.most_at_once <= 128
    started = [host for host, do in transport.requests if do == "run"]
    assert sorted(started) == sorted([host.name for host in HOSTS] * 2)  # the facts, then the agent
    # the first host gives the port back before any other looks for it there
    agents = started[len(HOSTS) :]
    assert agents[0] == "node000"


def test_the_one_host_that_is_not_ready_is_named() -> None:
    def full(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
        if host.name == "node057" and request["do"] == "reach":
            return [refused("can't reach 10.0.0.1 port 4000: No route to host")]
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
    said = outcome.failure.error.message
    assert (outcome.failure.host, said) == ("node057", "torchrun itself: ended with exit code 1")
    assert outcome.others.startswith("ended on node000, node001")


def test_none_is_started_when_one_can_not_be(tmp_path: Path) -> None:
    def busy(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
        if host.name == "node057" and request["do"] == "open_folder":
            return [refused("another run is using this folder", "/runs/a")]
        return well(host, request)

    transport = Simulated(busy)
    with pytest.raises(PreflightError, match=r"^node057: /runs/a: another run is using this folder$"):
        launch(transport, tmp_path)
    assert [do for _, do in transport.requests].count("run") == len(HOSTS)  # the facts, and no agent


def test_the_launcher_stays_small(tmp_path: Path) -> None:
    words = command("launch_on_a_hundred", tmp_path)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 300 * 10**6
