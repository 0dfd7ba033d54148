"""Which interface an address belongs to."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from zinf_cli.launch.addresses import interface_of


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9"])
def test_loopback(address: str) -> None:
    assert interface_of(address) == "lo"


@pytest.mark.parametrize("address", ["192.0.2.77", "2001:db8::77", "fe80::77%lo"])
def test_an_address_of_nobody(address: str) -> None:
    assert interface_of(address) is None


def test_every_address_of_the_new_protocol_has_an_interface() -> None:
    table = Path("/proc/net/if_inet6")
    for packed, *_, name in map(str.split, table.read_text().splitlines() if table.exists() else ()):
        address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed))
        assert interface_of(f"{address}%{name}") == name
        assert interface_of(f"{address}%another") is None
