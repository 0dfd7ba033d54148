"""Where ranks meet: what nobody else reaches on one host, what a stranger can't tell apart on several."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from zinf_cli.engine import meeting
from zinf_cli.errors import HostError

SOON = timedelta(seconds=5)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINF_MEETING", "")  # so that what a test sets is undone
    monkeypatch.delenv("ZINF_MEETING")


def listeners() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections("inet")
    return {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_without_a_meeting_torchruns_variables_count() -> None:
    assert meeting.store(SOON) is None


def test_ranks_of_one_host_meet_where_nothing_listens() -> None:
    before = listeners()
    meeting.prepare_here()
    store = meeting.store(SOON)
    child = os.fork()
    if child == 0:
        try:
            meeting.store(SOON).set("said", "by the child")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert store.get("said") == b"by the child"
    assert listeners() == before


def test_two_runs_on_one_host_do_not_meet() -> None:
    meeting.prepare_here()
    first = meeting.store(SOON)
    meeting.prepare_here()
    first.set("said", "in the first")
    assert not meeting.store(SOON).check(["said"])


def test_a_store_for_several_hosts_listens_on_their_address_alone_and_keeps_its_keys_apart() -> None:
    before = listeners()
    told: dict[str, Any] = {"address": "127.0.0.3", "port": free_port("127.0.0.3"), "word": "3f1c"}
    server = meeting.prepare_across(told, serve=True)
    assert listeners() - before == {("127.0.0.3", told["port"])}
    assert meeting.prepare_across(told, serve=False) is None
    store = meeting.store(SOON)
    store.set("said", "by a rank")
    stranger = TCPStore("127.0.0.3", told["port"], is_master=False, timeout=SOON)
    stranger.set("said", "by a stranger")
    assert stranger.delete_key("said")
    assert store.get("said") == b"by a rank"
    del server


def test_what_is_no_client_does_not_end_the_store() -> None:
    told: dict[str, Any] = {"address": "127.0.0.1", "port": free_port("127.0.0.1"), "word": "3f1c"}
    server = meeting.prepare_across(told, serve=True)
    store = meeting.store(SOON)
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b""):
        with socket.create_connection(("127.0.0.1", told["port"])) as stranger:
            stranger.sendall(data)
    store.set("said", "by a rank")
    assert store.get("said") == b"by a rank"
    del server


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        told: dict[str, Any] = {"address": "127.0.0.1", "port": other.getsockname()[1], "word": "3f1c"}
        with pytest.raises(HostError, match=r"can't listen on 127\.0\.0\.1 port \d+, where the ranks meet: Address"):
            meeting.prepare_across(told, serve=True)
