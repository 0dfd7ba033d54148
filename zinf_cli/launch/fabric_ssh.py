"""Channels to other machines over SSH, as strict about host keys as OpenSSH's client.

Users, ports, keys, jump hosts and known_hosts files come from the user's ssh configuration, which fabric reads. The
agent and the default keys are tried as well. Nothing asks for a password or a passphrase.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import fabric
import paramiko
from fabric import Connection as FabricConnection
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey
from paramiko.ssh_exception import AuthenticationException, BadHostKeyException, NoValidConnectionsError, SSHException

from zinf_cli.errors import HostError
from zinf_cli.launch.ssh import Files
from zinf_cli.launch.transport import SILENCE_S, Channel, Greeting, remote_line, supervisor_command, supervisor_program
from zinf_cli.recipe.hosts import Host

_CONNECT_S = 10
_KEEPALIVE_S = 5
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else paramiko prints errors that are raised here
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
_SYSTEM_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")


class FabricSsh:
    """Starts supervisors on other machines with the interpreter `python` (an absolute path) there."""

    name = f"fabric {fabric.__version__}"

    def __init__(self, python: str) -> None:
        self._python = python

    def open(self, host: Host, launch_id: str) -> Channel:
        connection = connect(host)
        try:
            return _start_supervisor(connection, self._python, launch_id)
        except Exception as error:
            connection.close()
            raise _explained(error, host, connection) from error

    def files(self, host: Host) -> Files:
        return _Files(connect(host))

    def close(self) -> None:
        pass


class _Files:
    shell = None

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def succeeds(self, line: str) -> bool:
        return bool(self._connection.run(line, hide=True, warn=True, in_stream=False).ok)

    def sftp(self) -> Any:
        return self._connection.sftp()

    def close(self) -> None:
        self._connection.close()


def connect(host: Host) -> Any:
    """An open connection of fabric to `host`, with every host key on the way checked. HostError says why not."""
    try:
        connection = FabricConnection(host.host, user=host.user, port=host.port)
    except Exception as error:  # fabric parses the user's ssh configuration here, and may raise anything
        raise HostError(f"the ssh configuration for it: {error}", where=host.name) from error
    try:
        for hop in _route(connection):
            hop.connect_timeout = _CONNECT_S
            hop.connect_kwargs.update(banner_timeout=_CONNECT_S, auth_timeout=_CONNECT_S)
            _be_strict(hop)
        connection.open()
    except Exception as error:
        with suppress(Exception):
            connection.close()
        raise _explained(error, host, connection) from error
    connection.transport.set_keepalive(_KEEPALIVE_S)
    with suppress(AttributeError, OSError):  # behind a jump host it is a channel, not a socket
        connection.transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_S * 1000))
    return connection


def _start_supervisor(connection: Any, python: str, launch_id: str) -> Channel:
    session = connection.transport.open_session(timeout=_CONNECT_S)
    greeting = Greeting(launch_id)
    program = supervisor_program(launch_id, _SshChannel.silence_s, greeting)
    session.exec_command(remote_line(supervisor_command(python, program)))
    channel = _SshChannel(session, connection, greeting)
    channel.send(program)
    return channel


class _SshChannel:
    silence_s = SILENCE_S

    def __init__(self, session: paramiko.Channel, connection: Any, greeting: Greeting) -> None:
        self._session = session
        self._connection = connection
        self._greeting = greeting
        self._greeted = False

    def send(self, data: bytes) -> None:
        self._session.sendall(data)

    def receive(self) -> bytes:
        while data := bytes(self._session.recv(1 << 16)):
            if self._greeted:
                return data
            if (rest := self._greeting.after(data)) is not None:
                self._greeted = True
                return rest or b"\n"
        return b""

    def close(self) -> None:
        with suppress(Exception):
            self._session.shutdown_write()
            self._session.settimeout(SILENCE_S)
            while self._session.recv(1 << 16):  # the supervisor ends its descendants first, then itself
                pass
        self.abort()

    def abort(self) -> None:
        with suppress(Exception):
            self._connection.close()

    def last_words(self) -> str:
        with suppress(Exception):
            self._session.settimeout(1.0)
            words = b""
            while data := self._session.recv_stderr(1 << 16):
                words += data
            return (words if words.strip() else self._greeting.dropped).decode(errors="replace")
        return ""


def _route(connection: Any) -> Iterator[Any]:
    """A connection, and those to its jump hosts."""
    while isinstance(connection, FabricConnection):
        yield connection
        connection = connection.gateway


class _UnknownHostKey(SSHException):  # type: ignore[misc]
    def __init__(self, name: str, key: paramiko.PKey, revoked: bool) -> None:
        super().__init__(name)
        self.name = name
        self.key = key
        self.revoked = revoked


class _Reject(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    def __init__(self, revoked: Set[str]) -> None:
        self._revoked = revoked

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> NoReturn:
        raise _UnknownHostKey(hostname, key, key.get_base64() in self._revoked)


def _be_strict(connection: Any) -> None:
    """Have host keys checked: by default fabric takes any."""
    lines = _known_hosts_lines(connection)
    revoked = {line[3] for line in lines if line[:1] == ["@revoked"] and len(line) > 3}
    connection.client.set_missing_host_key_policy(_Reject(revoked))
    known = connection.client.get_host_keys()
    for entry in _known_hosts(lines, revoked):
        for name in entry.hostnames:
            known.add(name, entry.key.get_name(), entry.key)


def _known_hosts_files(connection: Any) -> list[Path]:
    """The known_hosts files of the user, as the ssh configuration names them, and those of the system."""
    user = connection.ssh_config.get("userknownhostsfile", " ".join(_KNOWN_HOSTS)).split()
    system = connection.ssh_config.get("globalknownhostsfile", " ".join(_SYSTEM_KNOWN_HOSTS)).split()
    return [Path(name).expanduser() for name in (*user, *system)]


def _known_hosts_lines(connection: Any) -> list[list[str]]:
    """The words of each line of the known_hosts files that exist."""
    files = [file for file in _known_hosts_files(connection) if file.is_file()]
    return [line.split() for file in files for line in file.read_text(errors="replace").splitlines()]


def _known_hosts(lines: Sequence[Sequence[str]], revoked: Set[str]) -> Iterator[HostKeyEntry]:
    """The entries without keys that a @revoked line names, for whatever host.

    Lines of certificate authorities are skipped, since paramiko checks no host certificates.
    """
    for line in lines:
        if len(line) >= 3 and not line[0].startswith(("@", "#")) and line[2] not in revoked:
            with suppress(InvalidHostKey, SSHException, ValueError):
                entry = HostKeyEntry.from_line(" ".join(line))
                if entry is not None and entry.key is not None:
                    yield entry


def _explained(error: Exception, host: Host, connection: Any) -> HostError:
    """What went wrong, and what to do about it."""
    where, address = host.name, f"{connection.host} port {connection.port}"
    if isinstance(error, _UnknownHostKey) and error.revoked:
        return HostError(
            f"its host key is revoked: it shows {error.key.get_name()} {error.key.fingerprint}, marked @revoked",
            where=where,
            hint="another machine may be listening in; nothing was sent to it",
        )
    if isinstance(error, _UnknownHostKey):
        known_hosts = _known_hosts_files(connection)[0]
        line = f"{error.name} {error.key.get_name()} {error.key.get_base64()}"
        return HostError(
            f"its host key {error.key.get_name()} {error.key.fingerprint} is not known",
            where=where,
            hint=f"if it is the right one, add this line to {known_hosts}: {line}",
        )
    if isinstance(error, BadHostKeyException):
        port = next((hop.port for hop in _route(connection) if hop.host == error.hostname), 22)
        name = error.hostname if port == 22 else f"[{error.hostname}]:{port}"
        return HostError(
            f"its host key has changed: it shows {error.key.get_name()} {error.key.fingerprint}, known is "
            f"{error.expected_key.get_name()} {error.expected_key.fingerprint}",
            where=where,
            hint=f"another machine may be listening in; if the host was set up anew: ssh-keygen -R '{name}', "
            f"then add this line: {name} {error.key.get_name()} {error.key.get_base64()}",
        )
    if isinstance(error, AuthenticationException):
        return HostError(
            f"no key of yours is accepted for user {connection.user}",
            where=where,
            hint="zinf asks for no password; add a key: ssh-copy-id, ssh-add, or IdentityFile in ~/.ssh/config",
        )
    if isinstance(error, socket.gaierror):
        return HostError(f"no address is known for the name {connection.host}", where=where)
    if isinstance(error, NoValidConnectionsError):
        causes = {cause.strerror or str(cause) for cause in error.errors.values()}
        return HostError(f"{address}: {', '.join(sorted(causes))}", where=where, hint="is sshd running there?")
    if isinstance(error, TimeoutError):
        return HostError(f"{address}: no answer within {_CONNECT_S} s", where=where)
    if isinstance(error, OSError):
        return HostError(f"{address}: {error.strerror or error}", where=where)
    if isinstance(error, HostError):
        return error
    return HostError(f"SSH: {error or type(error).__name__}", where=where)
