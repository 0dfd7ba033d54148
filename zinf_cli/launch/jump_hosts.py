"""Connections of the system's `ssh` to jump hosts. All hosts behind one share its connection (hop_keeper.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing

from zinf_cli.launch import hop_keeper
from zinf_cli.launch.openssh_errors import refusal
from zinf_cli.launch.openssh_route import Destination, Route, has_own_master, proxy_command, route
from zinf_cli.launch.refusal import Shared, patiently
from zinf_cli.launch.said import Said


class JumpHosts:
    """Connects to jump hosts when a route first leads through them, and keeps the connections until `close`."""

    def __init__(self, ssh: str) -> None:
        self._ssh = ssh
        self._passages: Shared[_Passage] = Shared(lambda passage: passage.is_over)

    def through(self, jumps: Sequence[Destination]) -> tuple[str, Route]:
        """The ProxyCommand through `jumps`, and the way to the last. HostError names one that lets none pass."""
        passage = self._passages.get(tuple(jumps), lambda: self._connect(jumps))
        return passage.proxy_command, passage.way

    def _connect(self, jumps: Sequence[Destination]) -> _Passage:
        *earlier, hop = jumps
        way = route(self._ssh, hop, self.through, earlier or None)
        if has_own_master(way):
            return _Passage(way, None, proxy_command(way.command()))
        return patiently(lambda: _keep(way))

    def close(self) -> None:
        """End the connections."""
        for passage in self._passages.take_all():
            passage.close()


class _Passage:
    """A connection to a jump host, looked after by a keeper; or a user's own, which is left alone."""

    def __init__(self, way: Route, keeper: subprocess.Popen[bytes] | None, proxy_command: str) -> None:
        self.way = way
        self._keeper = keeper
        self.proxy_command = proxy_command

    @property
    def is_over(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is not None

    def close(self) -> None:
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait()


def _keep(way: Route) -> _Passage:
    """Connect to a jump host. Refusal says why not."""
    command = way.command("-o", "ControlMaster=yes", "-S", hop_keeper.SOCKET, "-N")
    with closing(Said()) as said:
        keeper = subprocess.Popen(
            [sys.executable, "-I", str(hop_keeper.__file__), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said.file,
            start_new_session=True,  # as for ssh itself (openssh.py)
        )
        assert keeper.stdout is not None
        socket = keeper.stdout.readline().decode().strip()
        if not keeper.stdout.readline():
            keeper.wait()
            raise refusal(said, way).of_hop(way.destination)
    # Without the socket it must not connect by itself: it would do so by the configuration, and to another name.
    words = [way.ssh, "-F", "none", "-S", socket, "-o", "ProxyCommand=false", "-o", "BatchMode=yes"]
    return _Passage(way, keeper, proxy_command([*words, "--", way.destination.host]))
