"""Channels to other machines by fabric, for machines without OpenSSH; as strict about host keys as that.

Users, ports, keys, jump hosts and known_hosts files come from the user's ssh configuration; what fabric would not read
as OpenSSH does is refused (fabric_config.py). Nothing asks for a password or a passphrase.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import fabric
import paramiko
from fabric import Connection as FabricConnection
from paramiko.ssh_exception import (
    AuthenticationException,
    BadHostKeyException,
    ChannelException,
    IncompatiblePeer,
    NoValidConnectionsError,
    SSHException,
)

from zinf_cli.errors import HostError
from zinf_cli.launch.fabric_config import INSTALL, KnownHosts, refuse_misread
from zinf_cli.launch.refusal import Refusal, Shared, patiently
from zinf_cli.launch.ssh import Files
from zinf_cli.launch.transport import (
    MOST_RECEIVED,
    SILENCE_S,
    Channel,
    Greeting,
    remote_line,
    supervisor_command,
    supervisor_program,
)
from zinf_cli.recipe.hosts import Host

_CONNECT_S = 10
_KEEPALIVE_S = 5
_NO_SESSION = "No existing session"
_NO_ROOM = "sshd has no room for another login, or does not take any from here (its log says why)"
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else paramiko prints errors that are raised here


class FabricSsh:
    """Starts supervisors on other machines with the interpreter `python` (an absolute path) there."""

    name = f"fabric {fabric.__version__}"

    def __init__(self, python: str) -> None:
        self._python = python
        self._jump_hosts: Shared[Any] = Shared(lambda connection: not connection.is_connected)

    def open(self, host: Host, launch_id: str) -> Channel:
        connection = self._connect(host)
        try:
            return _start_supervisor(connection, self._python, launch_id)
        except Exception as error:
            connection.close()
            raise _at(host, _explained(error, connection)) from error

    def files(self, host: Host) -> Files:
        return _Files(self._connect(host))

    def close(self) -> None:
        for connection in self._jump_hosts.take_all():
            connection.close()

    def _connect(self, host: Host) -> Any:
        """An open connection of fabric to `host`, with every host key on the way checked. HostError says why not."""

        def attempt() -> Any:
            connection = _configured(host)
            self._pass_jump_host(connection)
            _open(connection)
            return connection

        try:
            return patiently(attempt)
        except HostError as error:
            raise _at(host, error) from error

    def _pass_jump_host(self, connection: Any) -> None:
        """Where the way leads through a jump host, have the connection to that, which all hosts behind it share."""
        hop = connection.gateway
        if not isinstance(hop, FabricConnection):
            return

        def attempt() -> Any:
            self._pass_jump_host(hop)
            try:
                _open(hop)
            except Refusal as error:
                raise error.of_hop(hop.original_host) from error
            return hop

        # by its name in the configuration: another one may have other keys and known_hosts, for the same address
        name = (hop.original_host, hop.host, hop.user, hop.port)
        connection.gateway = self._jump_hosts.get(name, lambda: patiently(attempt))


def _at(host: Host, error: HostError) -> HostError:
    return HostError(error.message, where=host.name, hint=error.hint)


def _configured(host: Host) -> Any:
    """A connection as the ssh configuration has it, which is not open yet."""
    refuse_misread(host.host)
    try:
        connection = FabricConnection(host.host, user=host.user, port=host.port)
    except RecursionError:
        raise HostError("its jump hosts lead in a circle", hint="see ProxyJump in your ssh configuration") from None
    except Exception as error:  # fabric parses the user's ssh configuration here, and may raise anything
        raise HostError(f"the ssh configuration for it: {error}") from error
    hop = connection.gateway
    while isinstance(hop, FabricConnection):
        refuse_misread(hop.original_host)
        hop = hop.gateway
    return connection


def _open(connection: Any) -> None:
    """Open a connection whose jump host, if it has one, is open. Refusal says why not."""
    if connection.connect_timeout is None:
        connection.connect_timeout = _CONNECT_S
    arguments = connection.connect_kwargs
    arguments.update(banner_timeout=connection.connect_timeout, auth_timeout=_CONNECT_S)
    if connection.ssh_config.get("identitiesonly", "no").lower() == "yes":
        arguments.update(allow_agent=False, look_for_keys=False)
    keys = arguments.get("key_filename") or []
    arguments["key_filename"] = [key for key in ([keys] if isinstance(keys, str) else keys) if Path(key).exists()]
    _be_strict(connection)
    started = time.monotonic()
    try:
        connection.open()
    except Exception as error:
        with suppress(Exception):
            connection.close()
        if "protocol banner" in str(error) and time.monotonic() - started >= connection.connect_timeout:
            error = TimeoutError()  # paramiko does not tell it from a connection that was closed
        raise _explained(error, connection) from error
    connection.transport.set_keepalive(_KEEPALIVE_S)
    with suppress(AttributeError, OSError):  # behind a jump host it is a channel, not a socket
        connection.transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_S * 1000))


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


def _start_supervisor(connection: Any, python: str, launch_id: str) -> Channel:
    session = connection.transport.open_session(timeout=_CONNECT_S)
    greeting = Greeting(launch_id)
    program = supervisor_program(launch_id, _SshChannel.silence_s, greeting)
    session.exec_command(remote_line(supervisor_command(python, program, launch_id)))
    channel = _SshChannel(session, connection, greeting)
    channel.send(program)
    return channel


class _SshChannel:
    """paramiko's channels can be polled only together with their stderr, so a thread passes on what comes."""

    silence_s = SILENCE_S
    first = b""

    def __init__(self, session: paramiko.Channel, connection: Any, greeting: Greeting) -> None:
        self._session = session
        self._connection = connection
        self._greeting = greeting
        self._out, self._passed_on = socket.socketpair()
        self._passes_on = threading.Thread(target=self._pass_on, name="passes on", daemon=True)
        self._passes_on.start()

    def _pass_on(self) -> None:
        greeted = False
        with self._passed_on, suppress(OSError):
            while data := bytes(self._session.recv(1 << 16)):
                if greeted:
                    self._passed_on.sendall(data)
                elif (rest := self._greeting.after(data)) is not None:
                    greeted = True
                    self._passed_on.sendall(rest)

    def fileno(self) -> int:
        return self._out.fileno()

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        return self._out.recv(most)

    def has_room(self) -> bool:
        return bool(self._session.send_ready())

    def send(self, data: bytes) -> None:
        try:
            self._session.sendall(data)
        except (SSHException, EOFError) as error:
            raise OSError(f"SSH: {error}") from error

    def hang_up(self) -> None:
        with suppress(Exception):
            self._session.shutdown_write()
        self._passes_on.join(SILENCE_S)  # the supervisor ends its descendants first, then itself
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

    def close(self) -> None:
        self._out.close()


class _UnknownHostKey(SSHException):  # type: ignore[misc]
    def __init__(self, name: str, key: paramiko.PKey) -> None:
        super().__init__(name)
        self.name = name
        self.key = key


class _Reject(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> NoReturn:
        raise _UnknownHostKey(hostname, key)


def _be_strict(connection: Any) -> None:
    """Have host keys checked: by default fabric takes any."""
    known_hosts = KnownHosts(connection)
    connection.client.set_missing_host_key_policy(_Reject())
    known = connection.client.get_host_keys()
    for entry in known_hosts.entries():
        for name in entry.hostnames:
            known.add(name, entry.key.get_name(), entry.key)


def _explained(error: Exception, connection: Any) -> Refusal:
    """What went wrong, and what to do about it."""
    address = f"{connection.host} port {connection.port}"
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (_UnknownHostKey, BadHostKeyException)):
        return _of_host_key(error, connection)
    if isinstance(error, AuthenticationException):
        absent = [key for key in connection.ssh_config.get("identityfile", []) if not Path(key).expanduser().exists()]
        why = f" (no such identity: {', '.join(absent)})" if absent else ""
        return Refusal(
            f"no key of yours is accepted for user {connection.user}{why}",
            "zinf asks for no password; add a key: ssh-copy-id, ssh-add, or IdentityFile in ~/.ssh/config",
        )
    if isinstance(error, (socket.gaierror, UnicodeError)):  # the latter: it can be no name
        return Refusal(f"no address is known for the name {connection.host}")
    if isinstance(error, NoValidConnectionsError):
        causes = {cause.strerror or str(cause) for cause in error.errors.values()}
        return Refusal(f"{address}: {', '.join(sorted(causes))}", "is sshd running there?")
    if isinstance(error, ChannelException):
        hop = connection.gateway.original_host
        return Refusal(f"{address}, from jump host {hop}: {error.text}", "is sshd running there?")
    if isinstance(error, IncompatiblePeer):
        return Refusal(f"{address}: {error}", INSTALL)
    if isinstance(error, TimeoutError) or (_NO_SESSION in str(error) and not _met(connection)):
        why = f"no answer within {connection.connect_timeout} s"
        return Refusal(f"{address}: {why}", "is the host overloaded, or a firewall between?")
    if isinstance(error, (EOFError, ConnectionResetError)) or "protocol banner" in str(error):
        return Refusal(f"{address}: the connection was closed before the login", _NO_ROOM, busy=True)
    if isinstance(error, OSError):
        return Refusal(f"{address}: {error.strerror or error}")
    if _NO_SESSION in str(error):
        return Refusal(
            f"too many keys were offered for user {connection.user}, and none of those was accepted",
            "name the right one: IdentityFile with IdentitiesOnly yes in ~/.ssh/config",
        )
    return Refusal(f"SSH: {error or type(error).__name__}")


def _met(connection: Any) -> bool:
    """Whether the two have agreed on keys. paramiko says the same of a server that never answers, and of one that hangs
    up because it was offered too many keys."""
    transport = connection.client.get_transport()
    return transport is not None and bool(transport.initial_kex_done)


def _of_host_key(error: _UnknownHostKey | BadHostKeyException, connection: Any) -> Refusal:
    key = f"{error.key.get_name()} {error.key.fingerprint}"
    known_hosts = KnownHosts(connection)
    if error.key.get_base64() in known_hosts.revoked:
        return Refusal(
            f"its host key is revoked: it shows {key}, marked @revoked",
            "another machine may be listening in; nothing was sent to it",
        )
    if isinstance(error, BadHostKeyException):
        name = error.hostname if connection.port == 22 else f"[{error.hostname}]:{connection.port}"
        return Refusal(
            f"its host key has changed: it shows {key}, known is "
            f"{error.expected_key.get_name()} {error.expected_key.fingerprint}",
            f"another machine may be listening in; if the host was set up anew: ssh-keygen -R '{name}', "
            f"then add this line: {name} {error.key.get_name()} {error.key.get_base64()}",
        )
    line = f"{error.name} {error.key.get_name()} {error.key.get_base64()}"
    more = f"for patterns and authorities in known_hosts, {INSTALL}; " if known_hosts.has_more_than_is_read else ""
    return Refusal(
        f"its host key {key} is not known",
        f"{more}if it is the right one, add this line to {known_hosts.files[0]}: {line}",
    )
