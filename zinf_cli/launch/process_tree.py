"""Starts, finds and ends the processes of a run on one host. They end together, and with the supervisor.

Standard library only: the supervisor brings this file to hosts of which nothing is known yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

LAUNCH_ID = "ZINF_LAUNCH_ID"
"""Variable in every process of a launch: the id of the launch."""
STOP = "ZINF_STOP"
"""Variable in every rank: the descriptor of a nameless file, which is empty until the run has to stop."""
AGENT_PID = "ZINF_AGENT_PID"
"""Variable in every rank: the pid of the agent, with which the rank dies."""

_KILL_TIMEOUT_S = 5.0
"""A process that lives on so long after SIGKILL waits in the kernel (for a drive or a GPU) and can't be ended."""

_MOST_TEXT = 1 << 20
"""Bytes that a child can be told before it reads any."""

_MOST_VITALS = 4096
_MOST_DESCRIPTORS = 1024
_LOOK_S = 1.0
_MOST_KEPT = 64 << 20
"""Bytes of a child's output that are returned: the last of all that it printed."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None).prctl

ENDING_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""Signals that end a supervisor. SIGTERM does not (supervisor.py)."""


def become_subreaper() -> None:
    """From now on, a descendant whose parent dies becomes a child of this process, and not of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Child:
    """A process in a session of its own, which dies with this one. `code` is None while it runs.

    Its output is kept. This process must have no threads, since the fork goes on in Python.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command = list(command)
        self.code: int | None = None
        self._kept: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._said = 0
        self._wish = os.fdopen(os.memfd_create("zinf-stop", 0), "wb", buffering=0)  # inherited, and in memory
        environment = {**environment, STOP: str(self._wish.fileno())}
        stdin, self._stdin = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._stdin, fcntl.F_SETPIPE_SZ, _MOST_TEXT)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(command, environment, [stdin, *(file.fileno() for file in self._kept)], parent)
        os.close(stdin)

    def tell(self, text: str) -> None:
        """Write `text` to its stdin. OSError if it has ended."""
        data = memoryview(text.encode())
        while data:
            data = data[os.write(self._stdin, data) :]

    def ask_to_stop(self) -> None:
        """Ask it to stop. Its ranks look for that at the end of a step (train/rank_process.py)."""
        self._wish.write(b"1")

    def tell_no_more(self) -> None:
        os.close(self._stdin)

    def news(self) -> list[str]:
        """The lines that it has printed since the last call."""
        descriptor = self._kept[0].fileno()
        *lines, _ = os.pread(descriptor, os.fstat(descriptor).st_size - self._said, self._said).split(b"\n")
        self._said += sum(len(line) + 1 for line in lines)
        return [line.decode(errors="replace") for line in lines]

    def output(self) -> str:
        return self._text(0)

    def errors(self) -> str:
        return self._text(1)

    def _text(self, number: int) -> str:
        """What it has printed; only the end, if that is long."""
        descriptor = self._kept[number].fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, _MOST_KEPT, max(0, size - _MOST_KEPT)).decode(errors="replace")


def _become(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], parent: int
) -> NoReturn:
    """In the child after a fork: let it die with `parent`, then exec."""
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            signal.set_wakeup_fd(-1)
            for number in (*ENDING_SIGNALS, signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
            os.execve(command[0], list(command), {**environment, AGENT_PID: str(os.getpid())})
    finally:
        os.write(2, f"can't start {command[0]}\n".encode())
        os._exit(127)


def reap() -> Iterator[tuple[int, int]]:
    """(pid, exit code) of every child that has ended. The code is negative for a signal."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def end_descendants(but: int | None = None) -> None:
    """Send SIGKILL to all descendants until none is left: one may fork while the others die.

    The child `but` and its descendants live on.
    """
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (left := _descendants(but)) and time.monotonic() < deadline:
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.02)


def end_marked(launch_id: str) -> int:
    """Kill every other process of a launch, whatever its parent is by now. Returns how many there were.

    What has started this one lives on: the host's relay (relay.py).
    """
    found: set[int] = set()
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (left := list(_marked(launch_id))) and time.monotonic() < deadline:
        found.update(left)
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.02)
    return len(found)


class Gauge:
    """Measures this process and its descendants once a second.

    A process of its own does that: the kernel takes 16 s for 1 TiB of small pages. After a long measurement it rests
    nine times as long.
    """

    def __init__(self) -> None:
        self._pipe: int | None = None
        self._started = self._due = time.monotonic()

    def read(self) -> dict[str, int] | None:
        """The last measurement, once. None if there is nothing new."""
        found = None
        if self._pipe is not None and select.select([self._pipe], [], [], 0)[0]:
            said = os.read(self._pipe, _MOST_VITALS)  # empty, if the process was ended with all others
            os.close(self._pipe)
            self._pipe = None
            now = time.monotonic()
            self._due = max(self._started + _LOOK_S, now + 9 * (now - self._started))
            found = json.loads(said) if said else None
        if self._pipe is None and time.monotonic() >= self._due:
            self._look()
        return found

    def _look(self) -> None:
        self._started = time.monotonic()
        self._pipe, end = os.pipe2(os.O_CLOEXEC)
        measured = os.getpid()
        if os.fork() == 0:
            try:
                _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                signal.set_wakeup_fd(-1)
                for number in ENDING_SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                os.closerange(0, end)  # it must not hold the lifeline open, or the folder's lock
                os.closerange(end + 1, _MOST_DESCRIPTORS)
                os.write(end, json.dumps(_vitals_of(measured)).encode())
            finally:
                os._exit(0)
        os.close(end)


def _vitals_of(root: int) -> dict[str, int]:
    """Bytes of a process and its descendants, without this process: "memory", where shared pages count once, and what
    they have "read" and "written" on drives so far."""
    vitals = {"memory": 0, "read": 0, "written": 0}
    for pid in (root, *_descendants(root=root)):
        with contextlib.suppress(OSError):
            vitals["memory"] += 1024 * _number(f"/proc/{pid}/smaps_rollup", "Pss:")
            vitals["read"] += _number(f"/proc/{pid}/io", "read_bytes:")
            vitals["written"] += _number(f"/proc/{pid}/io", "write_bytes:")
    return vitals


def _number(file: str, name: str) -> int:
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)


def _descendants(but: int | None = None, root: int | None = None) -> list[int]:
    """Living descendants of `root` (by default this process), without the child `but` and its descendants.

    Parents come before children: so a guard is killed before its rank, and does not report that as a failure.
    """
    children: dict[int, list[int]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX" and pid != but:
                children.setdefault(int(parent), []).append(pid)
    found = [root or os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def _marked(launch_id: str) -> Iterator[int]:
    mark = f"{LAUNCH_ID}={launch_id}".encode()
    above = set(_ancestors())
    for pid in _pids():
        with contextlib.suppress(OSError):
            if pid not in above and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                yield pid


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    with contextlib.suppress(OSError):  # above 0, which may be the parent in another namespace, there is none
        while True:
            yield pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _pids() -> list[int]:
    """All processes but this one. os.listdir is used since a Path for each of thousands takes too long."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]  # noqa: PTH208


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
