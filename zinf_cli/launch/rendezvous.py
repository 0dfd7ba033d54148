"""Finds a place for the ranks of several hosts to meet: a port of the first host that all others reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zinf_cli.errors import HostError
from zinf_cli.launch.connection import Connection, at_all

_REACH_S = 5.0


@dataclass(frozen=True)
class Rendezvous:
    """An address and a port. The first host's supervisor holds the port until the ranks start."""

    address: str
    port: int
    ways: tuple[str | HostError | None, ...]
    """For each host: the network interface that leads there, None if unknown, or why it can't reach the address."""


def find_rendezvous(connections: Sequence[Connection]) -> Rendezvous:
    """Open a port on the first host, and have every host try it. HostError if the first host can't open one."""
    peers = at_all(lambda connection: connection.request("own_address"), connections[1:2])
    peer = None if not peers or isinstance(peers[0], HostError) else peers[0]
    port = connections[0].request("listen", peer=peer)

    def reach(connection: Connection) -> Any:
        return connection.request("reach", address=port["address"], port=port["port"], timeout_s=_REACH_S)

    return Rendezvous(port["address"], port["port"], tuple(at_all(reach, connections)))
