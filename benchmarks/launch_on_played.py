"""`python -m benchmarks.launch_on_played SOCKET RECIPE HOSTS`: a launch on hosts that benchmarks.played_hosts plays.

All of it is `zinf launch --hosts`, but for the transport. As with ssh, more than 256 hosts are behind relays, which
benchmarks.played_relays starts.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

from rich.console import Console

import zinf_cli.commands.launch
from benchmarks.played_hosts import LOGIN_S, RANKS
from zinf_cli.errors import HostError, ZinfError
from zinf_cli.launch.client_channel import allow_files
from zinf_cli.launch.openssh import OpenSsh
from zinf_cli.launch.transport import MOST_RECEIVED, SILENCE_S, Channel
from zinf_cli.recipe.hosts import Host


class Played:
    """The transport: a socket to each host."""

    name = "played"
    most_direct = OpenSsh.most_direct

    def __init__(self, path: str) -> None:
        self._path = path
        allow_files()

    def open(self, host: Host, launch_id: str) -> Channel:
        channel = self._connected(host, self._path)
        channel.send(int(host.host.removeprefix("node")).to_bytes(4, "big"))
        return channel

    def open_relay(self, host: Host, launch_id: str) -> Channel:
        time.sleep(LOGIN_S)
        return self._connected(host, f"{self._path}-relays")

    def _connected(self, host: Host, path: str) -> Channel:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(path)
        except OSError as error:
            raise HostError(f"the player is gone: {error.strerror}", where=host.name) from error
        return _PlayedChannel(link)

    def close(self) -> None:
        pass


class _PlayedChannel:
    silence_s = SILENCE_S
    first = b""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def fileno(self) -> int:
        return self._link.fileno()

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        return self._link.recv(most)

    def has_room(self) -> bool:
        return True

    def send(self, data: bytes) -> None:
        self._link.sendall(data)

    def hang_up(self) -> None:
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)

    abort = hang_up

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        self._link.close()


def main() -> None:
    path, recipe, count = sys.argv[1:]
    hosts = [Host(f"node{number}", tuple(range(RANKS))) for number in range(int(count))]
    request = zinf_cli.commands.launch.Request(Path(recipe), hosts=hosts)
    with mock.patch.object(zinf_cli.commands.launch, "transport_to", return_value=Played(path)):
        try:
            zinf_cli.commands.launch.launch(request, Console(stderr=True, width=140))
        except ZinfError as error:
            sys.exit(f"error: {error.line()}")


if __name__ == "__main__":
    main()
