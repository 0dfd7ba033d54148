"""One thread for all hosts: no more of them than that, and no more of what a host says than somebody takes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from simulated_hosts import HOSTS, Simulated, SimulatedChannel
from zinf_cli.launch import connection as of_connections
from zinf_cli.launch.connection import Lifelines, at_all
from zinf_cli.launch.transport import Channel
from zinf_cli.recipe.hosts import Host

EVENTS = 4000
SIZE = 1000


class TalkativeChannel(SimulatedChannel):
    """Its host talks all the time, as fast as it is heard. Whoever asks it does not wait until it can answer."""

    def __init__(self, transport: Simulated, host: Host) -> None:
        super().__init__(transport, host)
        self._beside(self._talk)

    def send(self, data: bytes) -> None:
        self._beside(partial(super().send, data))

    def _talk(self) -> None:
        for number in range(EVENTS):
            self._say({"event": "file", "number": number, "data": "x" * SIZE})

    @staticmethod
    def _beside(work: Callable[[], None]) -> None:
        def run() -> None:
            with suppress(OSError):  # somebody has left it
                work()

        threading.Thread(target=run, daemon=True).start()


class Talkative(Simulated):
    def open(self, host: Host, launch_id: str) -> Channel:
        return TalkativeChannel(self, host)


@pytest.mark.parametrize(("of_one", "of_all"), [(1 << 16, 1 << 26), (1 << 21, 1 << 16)])
def test_a_host_waits_until_what_it_has_said_is_taken(
    of_one: int, of_all: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_connections, "_MOST_UNTAKEN", of_one)
    monkeypatch.setattr(of_connections, "_MOST_UNTAKEN_OF_ALL", of_all)
    with Lifelines(Talkative()) as lifelines:
        connection = lifelines.connect(HOSTS[0])
        while not connection._paused:
            time.sleep(0.01)
        numbers = []
        for _ in range(EVENTS):
            assert connection._events.num_bytes < (1 << 16) + (1 << 17)  # and what one look reads
            event = connection.hear_event(20)
            assert event is not None
            numbers.append(event["number"])
        assert numbers == list(range(EVENTS))


def test_an_answer_comes_through_behind_many_events() -> None:
    heard: list[dict[str, Any]] = []
    with Lifelines(Talkative()) as lifelines:
        connection = lifelines.connect(HOSTS[0])

        def take() -> None:
            while (event := connection.event()) is not None:
                heard.append(event)

        connection.request("own_address", meanwhile=take)
        while len(heard) < EVENTS:
            take()


def test_a_host_that_nobody_listens_to_can_be_left() -> None:
    with Lifelines(Talkative()) as lifelines:
        lifelines.connect(HOSTS[0])


def test_a_hundred_hosts_take_one_thread() -> None:
    before = threading.active_count()
    with Lifelines(Simulated()) as lifelines:
        at_all(lifelines.connect, HOSTS)
        assert threading.active_count() == before + 1


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_message_may_come_in_pieces(pieces: int) -> None:
    with Lifelines(Simulated()) as lifelines:
        connection = lifelines.connect(HOSTS[0])
        line = json.dumps({"event": "file", "data": "é" * 50_000}).encode() + b"\n"
        channel = connection._channel
        assert isinstance(channel, SimulatedChannel)
        for start in range(0, len(line), -(-len(line) // pieces)):
            channel._there.sendall(line[start : start + -(-len(line) // pieces)])
        event = connection.hear_event(20)
        assert event is not None
        assert len(event["data"]) == 50_000
