"""Channels to other machines by the system's `ssh`: what works for `ssh HOST` works here.

Nothing asks for a password or a passphrase, and no host key is added to a known_hosts file.
"""

from __future__ import annotations

import os
import re
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from typing import Any

from zinf_cli.errors import HostError
from zinf_cli.launch.jump_hosts import JumpHosts
from zinf_cli.launch.openssh_errors import Said, refusal
from zinf_cli.launch.openssh_route import Destination, Route, route
from zinf_cli.launch.pipes import write_all
from zinf_cli.launch.refusal import Refusal, patiently
from zinf_cli.launch.ssh import Files
from zinf_cli.launch.transport import SILENCE_S, Channel, Greeting, remote_line, supervisor_command, supervisor_program
from zinf_cli.recipe.hosts import Host

_LOGIN_S = 60.0
"""A login may take this long and a connection's time-out more: ssh's own limit holds for each address of a host."""
_MOST_FILES = 1 << 16
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

    def __init__(self, python: str, ssh: str, name: str) -> None:
        self.name = name
        self._python = python
        self._ssh = ssh
        self._jump_hosts = JumpHosts(ssh)
        _allow_files()

    def open(self, host: Host, launch_id: str) -> Channel:
        greeting = Greeting(launch_id)
        program = supervisor_program(launch_id, SILENCE_S, greeting)
        line = remote_line(supervisor_command(self._python, program))
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


def _allow_files() -> None:
    """Raise the limit of open files, which is 1024 in many places: each host takes three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Files:
    def __init__(self, way: Route) -> None:
        self._way = way
        self.shell = [way.ssh, "-o", "LogLevel=ERROR", *way.options, *way.destination.words[:-2]]
        self._sftp: subprocess.Popen[bytes] | None = None

    def succeeds(self, line: str) -> bool:
        return patiently(lambda: self._run(line) == 0)

    def _run(self, line: str) -> int:
        process = subprocess.Popen(
            [*self._way.command(), line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        said = Said(process.stderr)
        code = process.wait()
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
            _end(self._sftp)


class _Named(socket.socket):
    """A socket that paramiko can name in its log, as its own channels."""

    def get_name(self) -> str:
        return "ssh"


class _SshChannel:
    silence_s = SILENCE_S

    def __init__(self, way: Route, line: str, program: bytes, greeting: Greeting) -> None:
        """Start the supervisor and wait for its greeting. HostError if none comes."""
        self._process = subprocess.Popen(
            [*way.command(), line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that the terminal's Ctrl-C reaches the launcher alone, and ssh asks no one
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._said = Said(self._process.stderr)
        self._ending = threading.Lock()
        try:
            self._first = self._greeted(program, greeting, way)  # may be empty
        except BaseException:
            self.abort()
            raise

    def _greeted(self, program: bytes, greeting: Greeting, way: Route) -> bytes:
        """Send the program; return what follows the greeting."""
        allowed = way.settings.get("connecttimeout", "none")
        until = time.monotonic() + _LOGIN_S + (float(allowed) if allowed.isdigit() else 0.0)
        os.set_blocking(self._in.fileno(), False)
        with selectors.DefaultSelector() as ready:
            ready.register(self._out, selectors.EVENT_READ)
            ready.register(self._in, selectors.EVENT_WRITE)
            while True:
                for key, _ in ready.select(0.2):
                    if key.fileobj is self._in:
                        with suppress(BlockingIOError, BrokenPipeError):
                            program = program[os.write(self._in.fileno(), program) :]
                        if not program:
                            ready.unregister(self._in)
                            os.set_blocking(self._in.fileno(), True)
                        continue
                    data = os.read(self._out.fileno(), 1 << 16)
                    if not data:
                        raise self._why_ended(greeting, way)
                    if (rest := greeting.after(data)) is not None:
                        return rest
                login = self._said.logged_in
                if login is not None and time.monotonic() - login > _SHELL_S:
                    raise Refusal(f"no answer within {_SHELL_S:.0f} s of login")
                if login is None and time.monotonic() > until:
                    raise Refusal("no login in time", "an agent may be waiting for an answer, or sshd be stuck")

    def _why_ended(self, greeting: Greeting, way: Route) -> HostError:
        _is_over(self._process, _SHELL_S)
        self.abort()
        if self._process.returncode == _NO_WAY_IN and self._said.logged_in is None:
            return refusal(self._said, way)
        words = self._said.lines or greeting.dropped.decode(errors="replace").strip().splitlines()
        return HostError(words[-1] if words else "the login ended at once")

    def send(self, data: bytes) -> None:
        write_all(self._in, data)

    def receive(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        return os.read(self._out.fileno(), 1 << 16)

    def close(self) -> None:
        with suppress(OSError):
            self._in.close()
        _is_over(self._process, SILENCE_S)  # the supervisor ends its descendants first, then itself
        self.abort()

    def abort(self) -> None:
        with self._ending:
            _end(self._process)
        with suppress(OSError):
            self._in.close()

    def last_words(self) -> str:
        return "\n".join(self._said.lines)


def _is_over(process: subprocess.Popen[bytes], within: float) -> bool:
    """Whether a process ends within so many seconds. It is not reaped, so its number stays its own."""
    until = time.monotonic() + within
    while process.returncode is None:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.01)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End an ssh, and what it has started: a ProxyCommand. One thread at a time."""
    if process.returncode is not None:  # reaped: by now its number may be another's
        return
    os.killpg(process.pid, signal.SIGTERM)
    _is_over(process, 1.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
