"""Finds the address and the network interface by which a host takes part in a run. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

_SIOCGIFADDR = 0x8915


def own_address(peer: str | None) -> str:
    """The address by which peers reach this host: where SSH reached it, or the one towards srun.

    If that is loopback, it is the address towards `peer`.
    """
    by_ssh, srun = os.environ.get("SSH_CONNECTION", "").split()[2:3], os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    reached = by_ssh[0] if by_ssh else _address_towards(srun) if srun else "127.0.0.1"
    if peer is None or not reached.startswith(("127.", "::1")):
        return reached
    return _address_towards(peer)


def _address_towards(peer: str) -> str:
    with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing: it asks the routing table
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface with this address; None where there is none."""
    if address.startswith("127."):
        return "lo"
    if ":" in address:
        return _interface_of_v6(address)
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _interface_of_v6(address: str) -> str | None:
    packed = socket.inet_pton(socket.AF_INET6, address.split("%")[0]).hex()
    with contextlib.suppress(OSError), Path("/proc/net/if_inet6").open() as table:
        for own, *_, name in map(str.split, table):
            if own == packed and address.partition("%")[2] in ("", name):
                return name
    return None
