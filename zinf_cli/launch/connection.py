"""The launcher's connection to a host: it sends requests, takes answers and events, and knows when the host is lost."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, TypeVar

from zinf_cli.errors import HostError, ZinfError, inside
from zinf_cli.launch.branches import Branches, Relay
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.pipes import Pipes
from zinf_cli.launch.ssh import Ssh
from zinf_cli.launch.switchboard import Switchboard
from zinf_cli.launch.transport import Channel, Gone, Transport, give_up
from zinf_cli.recipe.hosts import Host

_LOOK_S = 0.1
"""Seconds between two looks at what else there is to do while an answer is waited for."""
_FALTERS_S = 3.0
_HELLO_S = 20.0
_ANSWER_S = 60.0
_HOLD_S = 0.5
"""How long Ctrl-Z waits for a message that is being sent to a host: only then the host can be told."""
_MOST_AT_ONCE = 128
"""How many hosts are connected to, or asked something, at the same time."""
_MOST_UNTAKEN = 1 << 16
"""Bytes of a host's events that wait to be taken in. With more, the host has to wait."""
_MOST_UNTAKEN_OF_ALL = 1 << 26
"""The same of all hosts. Of more than a thousand, each has its share."""

T = TypeVar("T")


def transport_to(hosts: Sequence[Host]) -> Transport:
    """SSH to `hosts`, or srun to the nodes of a job; pipes to this machine if it is the only one."""
    if not hosts or is_this_node(hosts):
        return Pipes()
    if hosts[0].job is None:
        return find_ssh()
    from zinf_cli.launch.srun import Srun

    return Srun()


def is_this_node(hosts: Sequence[Host]) -> bool:
    """Whether `hosts` are one node of a Slurm job, and this process runs there."""
    return len(hosts) == 1 and hosts[0].job is not None and os.environ.get("SLURMD_NODENAME") == hosts[0].host


def find_ssh() -> Ssh:
    """The system's `ssh` where it is installed, fabric where it is not.

    fabric reads an ssh configuration otherwise than OpenSSH does, so it is for places where OpenSSH can't be had.
    """
    from zinf_cli.launch.openssh import OpenSsh, find_openssh  # a local run needs neither of the two

    if (found := find_openssh()) is not None:
        return OpenSsh(sys.executable, *found)
    from zinf_cli.launch.fabric_ssh import FabricSsh

    return FabricSsh(sys.executable)


class _Events:
    """Events of a host that nobody has taken yet. Threads may use it at once."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[dict[str, Any], int]] = queue.SimpleQueue()
        self._changing = threading.Lock()
        self.num_bytes = 0

    def put(self, event: dict[str, Any], num_bytes: int) -> None:
        with self._changing:
            self.num_bytes += num_bytes
        self._waiting.put((event, num_bytes))

    def get(self, timeout: float) -> dict[str, Any]:
        """The first one. queue.Empty if there is none in time."""
        event, num_bytes = self._waiting.get(timeout=timeout)
        with self._changing:
            self.num_bytes -= num_bytes
        return event


class Connection:
    """A connection to the supervisor of `host`. `lost` says why the host is gone; None while it is there."""

    def __init__(self, host: Host, channel: Channel, switchboard: Switchboard) -> None:
        self.host = host
        self.python = ""
        """The version of the host's Python."""
        self.visible: tuple[str, ...] = ()
        """The accelerators that its CUDA_VISIBLE_DEVICES names."""
        self._channel = channel
        self._switchboard = switchboard
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._events = _Events()
        self._one_request = threading.Lock()
        self._sending = threading.Lock()
        self._patience = Patience(channel.silence_s)
        self._parts: list[bytes] = []
        """Of a message whose end has not come yet."""
        self._paused = False
        self._ended: str | None = None
        self._take_in(channel.first)
        switchboard.join(self)

    def greet(self) -> None:
        """Wait for the supervisor's first message. HostError if none comes."""
        hello = self._next(self._answers.get, _HELLO_S if self._patience.has_end else math.inf)
        if hello is None and self.lost is None:
            raise HostError(f"no answer within {_HELLO_S:.0f} s of login", where=self.host.name)
        if hello is None:
            words = self._channel.last_words().strip().splitlines()
            raise HostError(words[-1] if words else "the login ended at once", where=self.host.name)
        self.python = hello["python"]
        self.visible = tuple(filter(None, hello["visible"].split(",")))

    @property
    def lost(self) -> str | None:
        return self._ended

    @property
    def falters(self) -> bool:
        """Whether the host is silent, and may be lost. `judge` decides that soon."""
        return self._ended is None and self._patience.has_end and self._patience.waited_s > _FALTERS_S

    def request(
        self, do: str, *, within: float = _ANSWER_S, meanwhile: Callable[[], None] = lambda: None, **arguments: Any
    ) -> Any:
        """Have the supervisor do something, and return its answer.

        An answer comes after the events before it, so if there may be many, `meanwhile` has to take them. HostError if
        it can't do that, is gone, or takes more than `within` seconds.
        """
        with self._one_request:
            try:
                self._send(json.dumps({"do": do, **arguments}).encode() + b"\n")
            except OSError as error:
                raise HostError(self._ended or f"connection lost: {error}", where=self.host.name) from error
            answer = self._next(self._answers.get, within, meanwhile)
            if answer is None:  # a late answer would be taken for the next one's
                if self.lost is None:
                    self._give_up(f"no answer to {do} within {within:.0f} s")
                raise HostError(str(self._ended), where=self.host.name)
        if "error" in answer:
            told = answer["error"]
            raise HostError(told["message"], where=inside(self.host.name, told["where"]))
        return answer["answer"]

    def hear_event(self, within: float) -> dict[str, Any] | None:
        """The next event. None if there is none within `within` seconds, or the host is lost and has left none."""
        return self._next(self._take_event, within)

    def event(self) -> dict[str, Any] | None:
        """The next event, if there is one by now."""
        with suppress(queue.Empty):
            return self._take_event(timeout=0.0)
        return None

    def _take_event(self, timeout: float) -> dict[str, Any]:
        try:
            return self._events.get(timeout)
        finally:
            if self._paused and not self._has_enough:
                self._paused = False
                self._patience.renew()
                self._switchboard.resume(self)

    @property
    def _has_enough(self) -> bool:
        share = _MOST_UNTAKEN_OF_ALL // max(1, len(self._switchboard))
        return self._events.num_bytes > min(_MOST_UNTAKEN, share)

    def _next(
        self,
        get: Callable[..., dict[str, Any] | None],
        within: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, Any] | None:
        patience = Patience(within)
        while True:
            over = self.lost is not None or patience.is_over  # and then a last look: it may have come by now
            with suppress(queue.Empty):
                message = get(timeout=0.0 if over else _LOOK_S)
                if message is not None:
                    return message
            if over:
                return None
            if meanwhile is not None:
                meanwhile()

    def capture(self, command: Sequence[str], *, within: float, text: str = "", opening: str = "") -> dict[str, Any]:
        """Run a command on the host to its end. Returns its "code", "output" and "errors".

        It reads `opening`, unless it stands by and has read its opening before, and then `text`.
        """
        self.request("run", command=command, text=text, opening=opening)
        while (event := self.hear_event(within)) is not None:
            if event["event"] == "ended":
                return event
        raise HostError(self.lost or f"{command[2]} took more than {within:.0f} s", where=self.host.name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Tell the supervisor of another machine that this process will be stopped. Inside, nothing else is sent."""
        with self._silent() as silent:
            if silent and self._patience.has_end and self.lost is None:
                with suppress(OSError):
                    self._channel.send(b'{"event": "stopping"}\n')
            yield

    @contextmanager
    def _silent(self) -> Iterator[bool]:
        """Let nothing be sent, by others, inside. False if something is being sent, and does not come to its end."""
        silent = self._sending.acquire(timeout=_HOLD_S)
        try:
            yield silent
        finally:
            if silent:
                self._sending.release()

    def close(self) -> None:
        """Close the lifeline. The supervisor then ends what still runs."""
        if self._ended is None:
            with self._silent():
                self._ended = "closed"
                self._switchboard.resume(self)  # what still comes is dropped
                self._channel.hang_up()
        else:
            self._channel.abort()
        self._switchboard.leave(self)
        self._channel.close()

    def _give_up(self, why: str) -> None:
        self._ended = why
        give_up(self._channel, self.host.name)

    def _send(self, data: bytes) -> None:
        with self._sending:
            self._channel.send(data)

    def fileno(self) -> int:
        return self._channel.fileno()

    def beat(self) -> None:
        """Send a heartbeat, unless something else is being sent."""
        if self._ended is None and self._sending.acquire(blocking=False):
            try:
                if self._channel.has_room():
                    self._channel.send(b"\n")
            except OSError:
                pass  # its end will be heard
            finally:
                self._sending.release()

    def judge(self) -> None:
        """Give the host up if it has been silent for too long."""
        if self._ended is None and not self._paused and self._patience.is_over:
            self._give_up(f"gave no sign of life for {self._channel.silence_s:.0f} s")

    def hear(self) -> bool:
        """Take in what has come. False if that was the end."""
        why = "the connection was lost, or its supervisor killed"
        try:
            data = self._channel.receive()
        except Gone as error:
            data, why = b"", str(error)
        except OSError:
            data = b""
        if not data:
            self._ended = self._ended or why
            self._answers.put(None)  # wakes whoever waits for an answer
            return False
        if self._ended != "closed":
            self._patience.renew()
            self._take_in(data)
        return True

    def _take_in(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._parts, lines[0]))
            self._parts = []
        if rest:
            self._parts.append(rest)
        for line in lines:
            self._take(line)
        if self._has_enough and not self._paused:
            self._paused = True
            self._switchboard.pause(self)

    def _take(self, line: bytes) -> None:
        """Take one message. What others on the host print in between is dropped."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(message, dict) and ("answer" in message or "error" in message or message.get("event") == "hello"):
            self._answers.put(message)
        elif isinstance(message, dict) and "event" in message:
            self._events.put(message, len(line))


def at_all(action: Callable[[T], Any], to: Sequence[T]) -> list[Any]:
    """Do something at all hosts, many at once. Results are in order; an error stands in the place of a result."""

    def attempt(one: T) -> Any:
        try:
            return action(one)
        except ZinfError as error:
            return error

    if len(to) < 2:
        return [attempt(one) for one in to]
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, len(to))) as pool:
        return list(pool.map(attempt, to))


class Lifelines:
    """The connections to the hosts of one launch. They are watched while this is open, and closed at its end."""

    def __init__(self, transport: Transport) -> None:
        self.launch_id = uuid.uuid4().hex
        self._transport = transport
        self._connections: list[Connection] = []
        self._obeys_terminal = False
        self._switchboard = Switchboard()
        self._branches = Branches(transport, self.launch_id, self._switchboard)

    def __enter__(self) -> Lifelines:
        self._switchboard.start()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._be_stopped)
            self._obeys_terminal = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._obeys_terminal:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        at_all(Connection.close, self._connections)
        at_all(Relay.close, self._branches.relays)
        self._switchboard.close()
        self._transport.close()

    def branch_out(self, hosts: Sequence[Host]) -> None:
        """Before `connect` to each: where this machine would have no room to connect to all, let relays do it."""
        at_all(self._branches.grow, self._branches.wanted(hosts))

    def way_to(self, host: Host) -> str:
        """By what a host is reached: the name of the transport, and of the relay if there is one."""
        return self._branches.way_to(host)

    def connect(self, host: Host) -> Connection:
        """Start the supervisor of `host`; HostError says why that is not possible. Threads may call it at once."""
        connection = Connection(host, self._branches.open(host), self._switchboard)
        self._connections.append(connection)
        connection.greet()
        return connection

    def _be_stopped(self, number: int, frame: FrameType | None) -> None:
        """Handle Ctrl-Z: tell the hosts, then stop. They go on without the launcher until it is continued."""
        with ExitStack() as held:
            for connection in tuple(self._connections):
                held.enter_context(connection.held())
            held.enter_context(self._branches.held())
            os.kill(os.getpid(), signal.SIGSTOP)
