"""Channels to other machines by the system's `ssh`: what works for `ssh HOST` works here.

Nothing asks for a password or a passphrase, and no host key is added to a known_hosts file.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from zinf_cli.errors import HostError
from zinf_cli.launch.client_channel import ClientChannel, allow_files, end_group
from zinf_cli.launch.frames import language
from zinf_cli.launch.jump_hosts import JumpHosts
from zinf_cli.launch.openssh_errors import refusal
from zinf_cli.launch.openssh_route import Destination, Route, route
from zinf_cli.launch.refusal import Refusal, patiently
from zinf_cli.launch.said import Said
from zinf_cli.launch.ssh import Files
from zinf_cli.launch.transport import (
    SILENCE_S,
    Channel,
    Greeting,
    marked_command,
    remote_line,
    supervisor_command,
    supervisor_program,
)
from zinf_cli.recipe.hosts import Host
from zinf_cli.search_path import module_command

_LOGIN_S = 60.0
"""A login may take this long and a connection's time-out more: ssh's own limit holds for each address of a host."""
_SHELL_S = 20.0
"""Seconds from the login until the supervisor runs."""
_NO_WAY_IN = 255
"""ssh's exit code if it could not connect."""


def find_openssh() -> tuple[str, str] | None:
    """The path of the system's `ssh`, and "OpenSSH 9.2". None where there is none, or it is another program."""
    ssh = shutil.which("ssh")
    if ssh is None:
        return None
    said = subprocess.run([ssh, "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stderr
    version = re.match(r"OpenSSH_[^\d]*(\d+\.\d+)", said)
    return (ssh, f"OpenSSH {version[1]}") if version is not None else None


class OpenSsh:
    """Starts supervisors on other machines with the interpreter `python` (an absolute path), by the program `ssh`."""

    most_direct = 256
    """Each takes a program of 1.45 MiB and 70 ms of CPU here."""

    def __init__(self, python: str, ssh: str, name: str) -> None:
        self.name = name
        self._python = python
        self._ssh = ssh
        self._jump_hosts = JumpHosts(ssh)
        allow_files()

    def open(self, host: Host, launch_id: str) -> Channel:
        program = supervisor_program(launch_id, SILENCE_S, Greeting(launch_id))
        return self._start(host, supervisor_command(self._python, program, launch_id), program, launch_id)

    def open_relay(self, host: Host, launch_id: str) -> Channel:
        """Start a relay (relay.py) there, which has to have zinf in the same place."""
        command = marked_command(launch_id, module_command("zinf_cli.launch.relay", language(), "ssh"))
        return self._start(host, command, b"", launch_id)

    def _start(self, host: Host, command: Sequence[str], program: bytes, launch_id: str) -> Channel:
        """Run `command` there, send `program` to it and wait for its greeting."""
        line = remote_line(command)
        way = self._route(host)
        try:
            return patiently(lambda: _SshChannel(way, line, program, Greeting(launch_id)))
        except HostError as error:
            raise HostError(error.message, where=host.name, hint=error.hint) from error

    def files(self, host: Host) -> Files:
        return _Files(self._route(host))

    def close(self) -> None:
        self._jump_hosts.close()

    def _route(self, host: Host) -> Route:
        try:
            return route(self._ssh, Destination.of(host), self._jump_hosts.through)
        except HostError as error:
            raise HostError(error.message, where=host.name, hint=error.hint) from error


class _Files:
    def __init__(self, way: Route) -> None:
        self._way = way
        self.shell = [way.ssh, "-o", "LogLevel=ERROR", *way.options, *way.destination.words[:-2]]
        self._sftp: subprocess.Popen[bytes] | None = None

    def succeeds(self, line: str) -> bool:
        return patiently(lambda: self._run(line) == 0)

    def _run(self, line: str) -> int:
        with closing(Said()) as said:
            code = subprocess.run(
                [*self._way.command(), line],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said.file,
                start_new_session=True,
                check=False,
            ).returncode
            if code == _NO_WAY_IN and said.logged_in is None:
                raise refusal(said, self._way)
        return code

    def sftp(self) -> Any:
        from paramiko import SFTPClient  # which takes a while, and most launches don't need it

        ours, theirs = socket.socketpair()
        with theirs:
            self._sftp = subprocess.Popen(
                [*self._way.command("-s"), "sftp"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return SFTPClient(_Named(fileno=ours.detach()))

    def close(self) -> None:
        if self._sftp is not None:
            end_group(self._sftp)


class _Named(socket.socket):
    """A socket that paramiko can name in its log, as its own channels."""

    def get_name(self) -> str:
        return "ssh"


class _SshChannel(ClientChannel):
    def __init__(self, way: Route, line: str, program: bytes, greeting: Greeting) -> None:
        self._way = way
        allowed = way.settings.get("connecttimeout", "none")
        self._login_s = _LOGIN_S + (float(allowed) if allowed.isdigit() else 0.0)
        super().__init__([*way.command(), line], program, greeting)

    def _check_time(self, seconds: float) -> None:
        login = self._said.logged_in
        if login is not None and time.monotonic() - login > _SHELL_S:
            raise Refusal(f"no answer within {_SHELL_S:.0f} s of login")
        if login is None and seconds > self._login_s:
            raise Refusal("no login in time", "an agent may be waiting for an answer, or sshd be stuck")

    def _why_ended(self, code: int, greeting: Greeting) -> HostError:
        if code == _NO_WAY_IN and self._said.logged_in is None:
            return refusal(self._said, self._way)
        words = self._said.lines or greeting.dropped.decode(errors="replace").strip().splitlines()
        return HostError(words[-1] if words else "the login ended at once")
