"""The processes of a run on one host: started tethered, found wherever they hang, ended together.

Standard library only: a supervisor takes this file along to hosts of which nothing is known yet.
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
"""In the environment of every process of a launch."""
STOP = "ZINF_STOP"
"""In the environment of every rank: a descriptor, of a file without a name that is empty until the run is to stop."""
AGENT_PID = "ZINF_AGENT_PID"
"""In the environment of every rank: the process a rank is tethered to."""

_GRACE_S = 1.0
"""From SIGTERM to SIGKILL."""
_KILL_TIMEOUT_S = 5.0
"""A process that outlives SIGKILL this long sits in the kernel (a hung drive or GPU) and can't be ended."""

_MOST_TEXT = 1 << 20
"""Bytes a child may be told before it reads."""

_MOST_VITALS = 4096
_MOST_DESCRIPTORS = 1024
_LOOK_S = 1.0
_MOST_KEPT = 64 << 20
"""Bytes of a child's output that are given, of as many as it printed."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None).prctl

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def become_subreaper() -> None:
    """From now on a process below whose parent dies becomes a child of this one, not of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Child:
    """A process in a session of its own that dies with this one; `code` is None while it runs.

    Its output is kept. This process must have no threads, since what follows the fork is Python.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command = list(command)
        self.code: int | None = None
        self._kept: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._said = 0
        self._wish = os.fdopen(os.memfd_create("zinf-stop", 0), "wb", buffering=0)  # inherited, and on no drive
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
        """What it reads on its stdin; OSError where it has ended already."""
        data = memoryview(text.encode())
        while data:
            data = data[os.write(self._stdin, data) :]

    def ask_to_stop(self) -> None:
        """Its ranks see it at the end of their step (train/rank_process.py)."""
        self._wish.write(b"1")

    def tell_no_more(self) -> None:
        os.close(self._stdin)

    def news(self) -> list[str]:
        """The lines on its output since it was last asked."""
        *lines, _ = os.pread(self._kept[0].fileno(), _MOST_TEXT, self._said).split(b"\n")
        self._said += sum(len(line) + 1 for line in lines)
        return [line.decode(errors="replace") for line in lines]

    def output(self) -> str:
        return self._text(0)

    def errors(self) -> str:
        return self._text(1)

    def _text(self, number: int) -> str:
        """The end of it, where it is long."""
        descriptor = self._kept[number].fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, _MOST_KEPT, max(0, size - _MOST_KEPT)).decode(errors="replace")


def _become(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], parent: int
) -> NoReturn:
    """The child's side of a fork: tether it, then exec."""
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            signal.set_wakeup_fd(-1)
            for number in (*ENDING_SIGNALS, signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
            os.execve(command[0], list(command), {**environment, AGENT_PID: str(os.getpid())})
    finally:
        os.write(2, f"can't start {command[0]}\n".encode())
        os._exit(127)


def reap() -> Iterator[tuple[int, int]]:
    """(pid, exit code as subprocess gives it) of every child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def end_descendants(but: int | None = None) -> None:
    """SIGTERM to all of it, then SIGKILL, again until nothing is left: a process may fork while the others die.

    `but` is a child that is to live on, with what is below it.
    """
    _signal_all(_descendants(but), signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while _descendants(but) and time.monotonic() < deadline:
        time.sleep(0.02)
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (left := _descendants(but)) and time.monotonic() < deadline:
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.02)


def end_marked(launch_id: str) -> int:
    """SIGKILL to every process of a launch, wherever it hangs by now; how many there were."""
    found = list(_marked(launch_id))
    _signal_all(found, signal.SIGKILL)
    return len(found)


class Gauge:
    """Measures this process and all below it in a process of its own: for 1 TiB of small pages the kernel takes 16 s.

    A look a second; after one that took long, nine times as long without one.
    """

    def __init__(self) -> None:
        self._pipe: int | None = None
        self._started = self._due = time.monotonic()

    def read(self) -> dict[str, int] | None:
        """What the last look has found, once; None while there is nothing new."""
        found = None
        if self._pipe is not None and select.select([self._pipe], [], [], 0)[0]:
            said = os.read(self._pipe, _MOST_VITALS)  # nothing, if it was ended with all the rest
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
                os.closerange(0, end)  # neither the lifeline nor the lock of the run's folder is to hang on it
                os.closerange(end + 1, _MOST_DESCRIPTORS)
                os.write(end, json.dumps(_vitals_of(measured)).encode())
            finally:
                os._exit(0)
        os.close(end)


def _vitals_of(root: int) -> dict[str, int]:
    """Of a process and all below it but this one: "memory" with what they share counted once, and bytes "read" and
    "written" from and to drives so far."""
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
    """Living processes below `root` (this one), parents before children: a guard told before its rank dies knows why.

    Without the child `but`, and what is below it.
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
    for pid in _pids():
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                yield pid


def _pids() -> list[int]:
    """All but this one; os.listdir, since a Path for each of thousands of processes takes too long."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]  # noqa: PTH208


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
