"""The program that looks after a run on one host, at the far end of a lifeline to the launcher.

    launcher ══ lifeline ══ supervisor ── torchrun's agent ── one guard per rank ── the rank ── whatever it starts

The launcher sends this program to a bare Python on the host (transport.py), so it needs only the standard library. On
the launcher's own machine the lifeline is a pair of pipes, elsewhere it is an SSH channel. On stdin come requests, one
JSON object a line, and empty lines, which are the launcher's heartbeats. On stdout go answers, events and the
supervisor's own heartbeats.

SIGTERM is the launcher's to obey: at the end of a Slurm job, or of a service, all processes get it, and the run has
some seconds for its step and a checkpoint. So the supervisor tells the launcher of it. Agent and ranks do nothing. The
same holds for SIGUSR1, by which Slurm warns (--signal=USR1@120): without a B: it comes to the steps, and not to zinf.

No process of the run outlives its supervisor or the launcher. When the lifeline closes or is silent for too long, when
another signal comes or the agent ends, the supervisor kills all its descendants until none is left. It is a sub-reaper,
so a walk down from here finds all of them. If the supervisor itself is killed, the kernel kills the agent
(PR_SET_PDEATHSIG), then the guards, and then their ranks. Other processes that these have started still have the
launch's id in their environment. By that the `sweep` of the next supervisor finds them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from zinf_cli.launch.addresses import interface_of, own_address
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.process_tree import (
    ENDING_SIGNALS,
    LAUNCH_ID,
    Child,
    Gauge,
    become_subreaper,
    end_descendants,
    end_marked,
    reap,
)
from zinf_cli.run_folder.mirror import RunFolder
from zinf_cli.search_path import leave_out_relative

_HEARTBEAT_S = 1.0
_POLL_S = 0.1
_MOST_OUTGOING_BYTES = 8 << 20
"""Bytes that may be queued for the launcher. With more, files have to wait."""


class _Signalled(Exception):  # noqa: N818
    """A signal that ends the supervisor."""


class Supervisor:
    """Serves one launcher until the lifeline closes, or is silent for `silence_s` seconds."""

    def __init__(self, launch_id: str, silence_s: float) -> None:
        self._launch_id = launch_id
        self._patience = Patience(silence_s)
        self._incoming = b""
        self._outgoing = b""
        self._spoken = time.monotonic()
        self._gauge = Gauge()
        self._folder: RunFolder | None = None
        self._child: Child | None = None
        self._standing_by: Child | None = None
        self._listener: socket.socket | None = None
        self._told_to_end = False

    def serve(self) -> None:
        """Serve until the lifeline closes or falls silent, or a signal comes. Then end everything."""
        become_subreaper()
        os.set_blocking(1, False)  # a launcher that does not read must not hold up the rest
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in ENDING_SIGNALS:
            signal.signal(number, _raise_signalled)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._be_told_to_end)
        try:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            self._send({"event": "hello", "python": sys.version.split()[0], "visible": visible})
            while True:
                ready, _, _ = select.select([0, wake], [1] if self._outgoing else [], [], _POLL_S)
                if wake in ready:
                    os.read(wake, 4096)
                if 0 in ready:
                    if not self._receive():
                        break
                elif self._patience.is_over:
                    break
                self._watch()
                if time.monotonic() - self._spoken >= _HEARTBEAT_S:
                    self._beat()
                self._flush()
        except (_Signalled, OSError):
            pass
        finally:
            for number in ENDING_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            end_descendants()
            if self._folder is not None:
                self._folder.leave()

    def _be_told_to_end(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = True

    def _beat(self) -> None:
        """Send a heartbeat."""
        self._spoken = time.monotonic()
        self._outgoing += b"\n"

    def _receive(self) -> bool:
        """Read what has come in, and do what it asks. False once the lifeline is closed."""
        data = os.read(0, 1 << 16)
        self._patience.renew()
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        for line in filter(None, lines):
            request = json.loads(line)
            if "event" in request:  # there is only one: the launcher will be stopped (Ctrl-Z)
                self._patience.hold()
                continue
            try:
                answer = getattr(self, "do_" + request.pop("do"))(**request)
                self._send({"answer": answer})
            except OSError as error:
                where = str(error.filename) if error.filename else None
                self._send({"error": {"message": error.strerror or str(error), "where": where}})
        return bool(data)

    def _send(self, message: Mapping[str, Any]) -> None:
        self._outgoing += json.dumps(message).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        """Write as much as the lifeline takes now."""
        with contextlib.suppress(BlockingIOError):
            while self._outgoing:
                self._outgoing = self._outgoing[os.write(1, self._outgoing[: 1 << 16]) :]

    def _watch(self) -> None:
        """Reap, send what the ranks wrote, and report the child's end when all of that is on its way."""
        for pid, code in reap():
            if self._standing_by is not None and pid == self._standing_by.pid:
                self._send_words()
                self._send({"event": "fell", "code": code, "errors": self._standing_by.errors()})
                self._standing_by.tell_no_more()
                self._standing_by = None
            if self._child is not None and pid == self._child.pid:
                self._child.code = code
                end_descendants(self._standing_by.pid if self._standing_by is not None else None)
        self._send_words()
        if self._told_to_end:
            self._told_to_end = False
            self._send({"event": "told to end"})
        if self._folder is not None and self._child is not None and (vitals := self._gauge.read()) is not None:
            self._send({"event": "vitals", **vitals})
        behind = False
        if self._folder is not None and self._folder.mirrored:
            behind = len(self._outgoing) > _MOST_OUTGOING_BYTES or self._send_news()
        if self._child is not None and self._child.code is not None and not behind:
            ended, self._child = self._child, None
            self._send({"event": "ended", "code": ended.code, "output": ended.output(), "errors": ended.errors()})

    def _send_words(self) -> None:
        """Send what the process that stands by has printed."""
        for line in self._standing_by.news() if self._standing_by is not None else ():
            self._send({"event": "said", "line": line})

    def _send_news(self) -> bool:
        """Send what was appended to the files of the run's folder. True if there is more."""
        assert self._folder is not None
        for path, offset, data in self._folder.news():
            text = base64.b64encode(data).decode()
            self._send({"event": "file", "path": path, "offset": offset, "data": text})
        return self._folder.behind

    def do_listen(self, peer: str | None) -> dict[str, Any]:
        """Open a port for other hosts to try, and keep it. Returns it, and the address by which `peer` reaches it."""
        address = own_address(peer)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=1024)
        return {"address": address, "port": self._listener.getsockname()[1]}

    def do_unlisten(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def do_own_address(self) -> str:
        return own_address(None)

    def do_reach(self, address: str, port: int, timeout_s: float) -> str | None:
        """Connect to another host's listener. Returns the network interface that leads there."""
        try:
            with socket.create_connection((address, port), timeout=timeout_s) as there:
                return interface_of(there.getsockname()[0])
        except OSError as error:
            raise OSError(0, f"can't reach {address} port {port}: {error.strerror or error}") from error

    def do_open_folder(self, path: str, nvme: Sequence[str], files: Mapping[str, str]) -> bool:
        """Take the run's folder, and write `files` into it: for each name the packed text (program.py).

        True if it is the launcher's own.
        """
        folder = RunFolder(path, nvme, self._launch_id)
        folder.open({name: zlib.decompress(base64.b64decode(packed)).decode() for name, packed in files.items()})
        self._folder = folder
        return not folder.mirrored

    def do_close_folder(self) -> None:
        """Send what the launcher does not have yet. Then give the folder up."""
        if self._folder is not None:
            while self._folder.mirrored and self._send_news():
                pass
            self._folder.remove()
            self._folder = None

    def do_stand_by(
        self, command: Sequence[str], environment: Mapping[str, str], defaults: Mapping[str, str], opening: str
    ) -> None:
        """Start a process before `do_run` asks for it, and let it read `opening`.

        Until `do_run`, each line that it prints is an event, and so is its end.
        """
        self._standing_by = self._start(command, environment, defaults)
        self._standing_by.tell(opening)

    def do_ask(self, text: str) -> None:
        """Let the process that stands by read `text` as well."""
        if self._standing_by is not None:  # else its end is an event
            with contextlib.suppress(BrokenPipeError):
                self._standing_by.tell(text)

    def do_run(
        self,
        command: Sequence[str],
        text: str = "",
        opening: str = "",
        environment: Mapping[str, str] | None = None,
        defaults: Mapping[str, str] | None = None,
    ) -> int:
        """Start a process and let it read `opening`, unless it stands by and has. Then it reads `text`, to its end.

        The end of the process is an event, with its output. Returns its pid.
        """
        self.do_unlisten()
        if self._standing_by is not None and self._standing_by.command == list(command):
            self._child, self._standing_by = self._standing_by, None
        else:
            self._child = self._start(command, environment or {}, defaults or {})
            text = opening + text
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its exit code says more
            self._child.tell(text)
        self._child.tell_no_more()
        return self._child.pid

    def _start(self, command: Sequence[str], environment: Mapping[str, str], defaults: Mapping[str, str]) -> Child:
        """Start a process, with `defaults` for variables that this host does not set.

        It imports nothing from its working directory.
        """
        variables = {**defaults, **os.environ, **environment, LAUNCH_ID: self._launch_id}
        leave_out_relative(variables)
        return Child(command, variables)

    def do_stop(self) -> None:
        """Ask the ranks to stop at the end of their step."""
        if self._child is not None:
            self._child.ask_to_stop()

    def do_kill(self) -> None:
        end_descendants()

    def do_sweep(self) -> int:
        """End an earlier supervisor of this launch, and what it has left. Returns the number of processes."""
        return end_marked(self._launch_id)


def _raise_signalled(number: int, frame: FrameType | None) -> NoReturn:
    raise _Signalled


def main(launch_id: str, silence_s: float) -> None:
    """Serve. transport.py calls this on the host."""
    with contextlib.suppress(OSError):
        os.setsid()
    Supervisor(launch_id, silence_s).serve()
