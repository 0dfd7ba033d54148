"""Launches through relays: for whoever asks a host, it is as if there were none."""

from __future__ import annotations

import base64
import errno
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count as count_on
from pathlib import Path
from typing import Any

import pytest

from simulated_hosts import AGENT, HOSTS, SimulatedTree, launch, well
from zinf_cli.errors import HostError
from zinf_cli.launch.branches import groups_of
from zinf_cli.launch.connection import Connection, Lifelines, at_all
from zinf_cli.launch.frames import WINDOW
from zinf_cli.launch.preflight import check_hosts
from zinf_cli.launch.transport import Channel
from zinf_cli.recipe.hosts import Host

FOUR = HOSTS[:4]


def connected(lifelines: Lifelines, hosts: tuple[Host, ...] = FOUR) -> list[Connection]:
    lifelines.branch_out(hosts)
    return at_all(lifelines.connect, hosts)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 10, 257, 1024, 4096])
def test_groups_are_about_the_root_of_all_in_number_and_size(count: int) -> None:
    hosts = [Host(f"node{number}", (0,)) for number in range(count)]
    groups = groups_of(hosts)
    assert [host for group in groups for host in group] == hosts
    root = math.ceil(math.sqrt(count))
    assert len(groups) == root
    assert max(len(group) for group in groups) <= root


def test_a_hundred_hosts_are_started_through_ten_relays(tmp_path: Path) -> None:
    transport = SimulatedTree()
    outcome = launch(transport, tmp_path)
    assert (outcome.exit_code, outcome.failure) == (0, None)
    assert sorted(transport.relays) == [f"node{number:03d}" for number in range(0, 100, 10)]
    started = [host for host, do in transport.requests if do == "run"]
    assert sorted(started) == sorted([host.name for host in HOSTS] * 2)
    assert started[len(HOSTS)] == "node000"


def never_ends(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The agent runs until it is killed."""
    if request["do"] == "run" and request["command"] == AGENT.start()["command"]:
        return [{"answer": 1}]
    if request["do"] == "kill":
        return [{"answer": None}, {"event": "ended", "code": -15, "output": "", "errors": ""}]
    return well(host, request)


def test_a_relay_that_is_lost_is_the_cause_of_its_group(tmp_path: Path) -> None:
    def cut(host: Host, request: dict[str, Any]) -> list[dict[str, Any]]:
        said = never_ends(host, request)
        if said == [{"answer": 1}]:
            started.append(host.name)
            if len(started) == len(HOSTS):
                transport.relays["node050"].abort()
        return said

    started: list[str] = []
    transport = SimulatedTree(cut)
    outcome = launch(transport, tmp_path)
    assert outcome.failure is not None
    assert outcome.failure.host == "node050"
    assert outcome.failure.error.message == "the connection was lost, or the relay killed"
    assert outcome.others.startswith("node051, node052")
    assert "lost as well; ended on node000" in outcome.others
    swept = sorted(host for host, do in transport.requests if do == "sweep")
    assert swept == [f"node{number:03d}" for number in range(50, 60)]


def test_files_that_a_lost_relay_has_cut_off_are_whole_in_the_end(tmp_path: Path) -> None:
    """What ranks write is on its way, more than anybody takes in at a time, when the relay is killed."""
    part, count = b"0123456789" * 1000, 8
    name = "logs/rank-00024.log"

    def file(number: int) -> dict[str, Any]:
        data = base64.b64encode(part).decode()
        return {"event": "file", "path": name, "offset": number * len(part), "data": data}

    def talk() -> None:
        channel = transport.channels["node003"]
        with suppress(OSError):
            for number in count_on():
                channel._say(file(number))

    def cut() -> None:
        while not (tmp_path / name).exists():
            time.sleep(0.01)
        transport.relays["node002"].abort()

    def writes(host: Host, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        said = never_ends(host, request)
        if host.name == "node003" and request["do"] == "close_folder":
            yield from map(file, range(count))
        yield from said
        if host.name == "node003" and said == [{"answer": 1}]:
            for action in (talk, cut):
                threading.Thread(target=action, daemon=True).start()

    transport = SimulatedTree(writes)
    outcome = launch(transport, tmp_path, FOUR)
    assert outcome.failure is not None
    assert outcome.failure.host == "node002"
    assert (tmp_path / name).read_bytes() == part * count


def test_hosts_of_a_lost_relay_say_so() -> None:
    transport = SimulatedTree()
    with Lifelines(transport) as lifelines:
        first, second, third, fourth = connected(lifelines)
        transport.relays["node002"].abort()
        for lost in (third, fourth):
            assert lost.hear_event(20) is None
        assert third.lost == "the connection was lost, or the relay killed"
        assert fourth.lost == "its relay node002 is lost: the connection was lost, or the relay killed"
        assert first.request("reach") == second.request("reach") == "eth0"


def test_a_host_that_is_lost_behind_a_relay_is_lost_alone() -> None:
    transport = SimulatedTree()
    with Lifelines(transport) as lifelines:
        *others, fourth = connected(lifelines)
        transport.channels["node003"].hang_up()
        assert fourth.hear_event(20) is None
        assert fourth.lost == "the connection was lost, or its supervisor killed"
        assert [other.request("reach") for other in others] == ["eth0"] * 3


class Unwilling(SimulatedTree):
    """`refuses` has a host once for each login that it refuses; on hosts of `without` there is no zinf."""

    def __init__(self, refuses: list[str], without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._refuses, self._without = refuses, without

    def open(self, host: Host, launch_id: str) -> Channel:
        if host.name in self._refuses:
            self._refuses.remove(host.name)
            raise HostError(f"no key is accepted, {len(self._refuses)} left", where=host.name, hint="add a key")
        return super().open(host, launch_id)

    def open_relay(self, host: Host, launch_id: str) -> Channel:
        if host.name in self._without:
            raise HostError("no zinf there", where=host.name)
        return super().open_relay(host, launch_id)


def test_a_host_that_only_the_launcher_reaches_is_reached_from_there() -> None:
    with Lifelines(Unwilling(["node001"])) as lifelines:
        rows = check_hosts(FOUR, lifelines).rows
        by = ["simulated, node000", "simulated", "simulated, node002", "simulated, node002"]
        assert [row.cells["by"] for row in rows] == by


def test_a_host_that_nobody_reaches_has_both_reasons() -> None:
    with Lifelines(Unwilling(["node001", "node001"])) as lifelines:
        (problem,) = check_hosts(FOUR, lifelines).problems
    assert problem == "node001: no key is accepted, 0 left; from node000: no key is accepted, 1 left (add a key)"


def test_the_next_host_is_the_relay_where_the_first_can_not_be() -> None:
    with Lifelines(Unwilling([], ("node000",))) as lifelines:
        connected(lifelines)
        ways = ["simulated", "simulated, node001", "simulated, node002", "simulated, node002"]
        assert [lifelines.way_to(host) for host in FOUR] == ways


def test_few_hosts_get_no_relay() -> None:
    transport = SimulatedTree()
    with Lifelines(transport) as lifelines:
        connected(lifelines, FOUR[:2])
    assert transport.relays == {}


def test_a_host_that_talks_a_lot_waits_and_holds_up_no_other() -> None:
    """Its events are not taken. Then they are, and none is missing."""
    count, size = 4000, 1000
    transport = SimulatedTree()
    with Lifelines(transport) as lifelines:
        *_, third, fourth = connected(lifelines)
        transport.talk_on("node003", count, size)
        waiting: Any = fourth._channel
        most = 0
        for _ in range(50):
            assert third.request("reach") == "eth0"
            most = max(most, len(waiting._come))
        numbers = []
        for _ in range(count):
            event = fourth.hear_event(20)
            assert event is not None
            numbers.append(event["number"])
            most = max(most, len(waiting._come))
        assert numbers == list(range(count))
        assert most <= WINDOW < count * size


def test_a_login_that_fails_in_a_way_of_its_own_is_refused_all_the_same() -> None:
    class Odd(Unwilling):
        def open(self, host: Host, launch_id: str) -> Channel:
            if host.name == "node001" and threading.current_thread().name.startswith("serves host"):
                raise RuntimeError("no such cipher")
            return super().open(host, launch_id)

    with Lifelines(Odd([])) as lifelines:
        connected(lifelines)
        assert lifelines.way_to(FOUR[1]) == "simulated"


def test_a_machine_without_room_for_a_relay_does_without() -> None:
    class Full(SimulatedTree):
        def open_relay(self, host: Host, launch_id: str) -> Channel:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with Lifelines(Full()) as lifelines:
        assert [row.cells["by"] for row in check_hosts(FOUR, lifelines).rows] == ["simulated"] * 4


def test_a_machine_without_room_for_another_thread_gives_hosts_up_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the thread that hears all hosts end."""

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("gives up"):
            raise RuntimeError("can't start new thread")
        start_any(thread)

    start_any = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with Lifelines(SimulatedTree()) as lifelines:
        first, second, third, fourth = connected(lifelines)
        relay = lifelines._branches._by_host[FOUR[2]]
        for patience in (relay._patience, second._patience):
            patience._until = patience._seconds = 0.0  # it is over
        assert third.hear_event(20) is None
        assert fourth.hear_event(20) is None
        assert second.hear_event(20) is None
        assert first.request("reach") == "eth0"


def test_a_machine_without_room_for_another_connection_says_so() -> None:
    class Full(SimulatedTree):
        def open(self, host: Host, launch_id: str) -> Channel:
            if host.name == "node001":
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().open(host, launch_id)

    with Lifelines(Full()) as lifelines:
        (problem,) = check_hosts(FOUR[:2], lifelines).problems
    assert problem == "node001: this machine can't connect to it: Too many open files (see ulimit -n and ulimit -u)"
