"""The way to a host for the system's `ssh`: its settings, and the connections to the jump hosts that it leads through.

What a user's ssh configuration means only ssh itself knows, so it is asked (`ssh -G`). Jump hosts are connected to from
here, hop after hop, for three reasons: all hosts behind one share its connection; an error says which hop it is from;
and ssh does not pass its strictness about host keys on to jump hosts.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from zinf_cli.errors import HostError
from zinf_cli.recipe.hosts import Host

PASSAGE = ("-W", "[%h]:%p")
"""Options with which ssh is a ProxyCommand."""

_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "UpdateHostKeys": "no",  # this and the next one would add keys
    "CheckHostIP": "no",
    "ControlMaster": "no",  # a master of the user's is used, but none is made, which would stay
    "ClearAllForwardings": "yes",  # the ports may be taken by a session of the user's
    "LogLevel": "VERBOSE",  # says when the login is done
}
_CONNECT_S = 10
_ALIVE_S = 5
_JUMP = re.compile(r"(?:ssh://)?(?:(?P<user>.*)@)?(?:\[(?P<v6>[^\]]*)\]|(?P<name>[^:@]*))(?::(?P<port>\d+))?/?")


@dataclass(frozen=True)
class Destination:
    """A host or a jump host, as the user names it. What is None the configuration says."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def of(cls, host: Host) -> Destination:
        return cls(host.host, host.user, host.port)

    @property
    def words(self) -> list[str]:
        """The last arguments of ssh before what it runs there."""
        user = ["-l", self.user] if self.user is not None else []
        port = ["-p", str(self.port)] if self.port is not None else []
        return [*user, *port, "--", self.host]

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host and self.port is not None else self.host
        return host if self.port is None else f"{host}:{self.port}"


@dataclass(frozen=True)
class Route:
    """How `ssh` reaches a destination: what stands between its name and the arguments of the destination."""

    ssh: str
    options: tuple[str, ...]
    destination: Destination
    settings: Mapping[str, str]
    """As `ssh -G` tells them; names in lower case."""
    hop: Route | None = None
    """The way to the last jump host."""

    def command(self, *first: str) -> list[str]:
        """The command line; what is to run there has to follow. Of options, those that come first count."""
        return [self.ssh, *first, *self.options, *self.destination.words]


Pass = Callable[[Sequence[Destination]], tuple[str, Route]]
"""For jump hosts: the ProxyCommand that leads through them, and the way to the last one."""


def route(ssh: str, destination: Destination, through: Pass, jumps: Sequence[Destination] | None = None) -> Route:
    """The way to a destination: by `jumps`, or by the jump hosts that its configuration names.

    `through` passes jump hosts. HostError names the one that can't be passed.
    """
    settings = _settings(ssh, destination)
    if jumps is None:
        jumps = _jumps(settings)
        _refuse_circle(ssh, destination, jumps)
    options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
    if settings.get("connecttimeout", "none") == "none":
        options += ["-o", f"ConnectTimeout={_CONNECT_S}"]
    if settings.get("remotecommand", "none") != "none":
        options += ["-o", "RemoteCommand=none"]
    if settings.get("serveraliveinterval", "0") == "0":
        options += ["-o", f"ServerAliveInterval={_ALIVE_S}"]
    way = Route(ssh, ("-T", *options), destination, settings)
    if not jumps:
        return way
    if has_own_master(way):
        passage, hop = "false", None  # if that ends meanwhile, ssh must not go through the jump hosts by itself
    else:
        passage, hop = through(jumps)
    return replace(way, options=(*way.options, "-o", f"ProxyCommand={passage}"), hop=hop)


def _refuse_circle(ssh: str, destination: Destination, jumps: Sequence[Destination]) -> None:
    """HostError if jump hosts need each other. Of a chain, the configuration of the first says how that is reached."""
    way = [destination]
    while jumps:
        way.append(jumps[0])
        if jumps[0] in way[:-1]:
            circle = " → ".join(map(str, way))
            raise HostError(
                f"its jump hosts lead in a circle: {circle}", hint="see ProxyJump in your ssh configuration"
            )
        jumps = _jumps(_settings(ssh, jumps[0]))


def has_own_master(way: Route) -> bool:
    """Whether the user has logged in there with ControlMaster. It may be the only way in (a second factor)."""
    if way.settings.get("controlpath", "none") == "none":
        return False
    check = subprocess.run(way.command("-O", "check"), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return check.returncode == 0


def proxy_command(words: Sequence[str]) -> str:
    """A command of ssh as a ProxyCommand: where ssh writes %h and %p, those of the host behind it."""
    ssh, *rest = (word.replace("%", "%%") for word in words)
    return shlex.join([ssh, *PASSAGE, *rest])


def _settings(ssh: str, destination: Destination) -> dict[str, str]:
    command = [ssh, "-G", "-T", *destination.words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HostError(f"the ssh configuration for {destination}: {said[0]}")
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return {name.lower(): value for name, _, value in reversed(lines)}  # of several, the first


def _jumps(settings: Mapping[str, str]) -> list[Destination]:
    """The jump hosts that settings name, the first to pass first."""
    return [_jump(text) for text in settings.get("proxyjump", "none").split(",") if text != "none"]


def _jump(text: str) -> Destination:
    match = _JUMP.fullmatch(text.strip())
    if match is None:
        raise HostError(f"its ProxyJump has {text!r}, which is no host")
    return Destination(match["v6"] or match["name"], match["user"], int(match["port"]) if match["port"] else None)
