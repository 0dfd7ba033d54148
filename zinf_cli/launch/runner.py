"""Runs ranks under torchrun, with an agent on each host: starts, watches and stops them, and reports how they ended.

torchrun's agent starts the ranks of a host and, when one fails, sends SIGTERM to the others. The launcher and the
supervisor of each host do the rest: they handle Ctrl-C, ranks that hang and lost hosts, name the first
failure, and make sure that nothing is left running.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from zinf_cli.errors import HostError, Interrupted, PreflightError
from zinf_cli.launch.connection import Connection, Lifelines, at_all
from zinf_cli.launch.failure import Ending, Failure, first_failure, report_in
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.rendezvous import Rendezvous
from zinf_cli.launch.stop_signals import StopSignals
from zinf_cli.launch.vitals import Vitals
from zinf_cli.run_folder.error_records import any_recorded, forget_errors
from zinf_cli.run_folder.names import LOGS
from zinf_cli.search_path import module_command

_POLL_S = 0.1

_MOST_LATE = 64 << 20
"""Most bytes of a host's files that wait in memory for room on the launcher's drive."""

_MOST_EVENTS = 32
"""Messages of a host that one poll takes in."""

_TEARDOWN_S = 4.0
"""Seconds from the first sign of a failure until all that still runs is killed. torchrun alone would wait for 30 s."""

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""For ranks of a single host, whatever the host has set: no other machine may reach what they listen on."""

_KILL_S = 12.0
"""Seconds that a host has to end its processes and to report that, before it counts as lost."""


@dataclass(frozen=True)
class World:
    """The hosts of a run, connected. Several hosts need a rendezvous."""

    lifelines: Lifelines
    connections: Sequence[Connection]
    rendezvous: Rendezvous | None = None


@dataclass(frozen=True)
class Agent:
    """The agent that runs on each host (train/agent.py). It imports `module`, which has the function that ranks run.

    An agent may stand by before it gets its order (supervisor.py). This is all that has to be known by then.
    """

    module: str
    environment: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Variables that count only where the host's own environment does not set them."""

    def start(self, question: str = "null\n") -> dict[str, Any]:
        """The arguments of a supervisor's request to start the agent, which answers `question` first (question.py)."""
        return {
            "command": module_command("zinf_cli.train.agent", self.module),
            "environment": dict(self.environment),
            "defaults": dict(self.defaults),
            "opening": question,
        }


@dataclass(frozen=True)
class Program:
    """What every rank runs: `function(run_dir, *arguments)` of the agent's module, which returns an exit code."""

    agent: Agent
    function: str
    arguments: Sequence[str]
    run_dir: Path
    """The run's folder, which has the same path on every host."""
    files: Mapping[str, str]
    """The files that ranks need in it: text by name."""
    nvme_folders: Sequence[str]
    writes_checkpoints: bool
    """Whether it writes or reads a checkpoint. Then every host has to see the launcher's own run_dir."""
    environment: Mapping[str, str]
    """Variables beside those of the agent."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code 0, the failure's, or 130 after Ctrl-C."""

    exit_code: int
    failure: Failure | None
    interrupted: bool
    """Whether the user has asked the run to stop."""
    others: str = ""
    """What became of the other hosts, if one failed."""
    host_cpu_bytes: int = 0
    """Peak of the CPU memory of the run's processes, on the host that took the most."""

    @property
    def ended_as_asked(self) -> bool:
        """Whether the user ended the run and no rank has raised an error on the way, such as a last checkpoint that
        could not be written."""
        return self.interrupted and (self.failure is None or not self.failure.raised)


def run_ranks(
    program: Program,
    world: World,
    *,
    on_poll: Callable[[], None],
    notify: Callable[[str], None],
    on_vitals: Callable[[Vitals], None] = lambda vitals: None,
) -> Outcome:
    """Run `program` as a rank for every slot of `world` until they end, one fails, or the user stops them.

    `on_poll` is called about every 0.1 s, and once after the end. `notify` gets a line for the user when Ctrl-C is
    first pressed or a host is lost. `on_vitals` gets what a host's processes take, about every second. The first
    SIGINT, SIGTERM, SIGUSR1 or SIGHUP (stop_signals.py) asks the ranks to stop after their step; the second kills them.
    Has to be called from the main thread, since it sets signal handlers; it puts them back at the end. PreflightError
    if a host can't start; then no host has.
    """
    logs = program.run_dir / LOGS
    mark = program.run_dir / f".{world.lifelines.launch_id}"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        forget_errors(program.run_dir)
        mark.touch()
    except OSError as error:
        raise PreflightError(f"can't be written: {error.strerror}", where=str(error.filename)) from error
    firsts = accumulate((len(connection.host.slots) for connection in world.connections), initial=0)
    parts = [
        _Part(connection, first, logs / f"torchrun-{number:05d}.log", program, on_vitals)
        for number, (connection, first) in enumerate(zip(world.connections, firsts, strict=False))
    ]
    with StopSignals() as stop_signals, _marked(mark):
        try:
            _start(parts, world.rendezvous)
            outcome = _watch(parts, stop_signals, program.run_dir, on_poll, notify)
            return replace(outcome, host_cpu_bytes=max(part.peak_memory for part in parts))
        finally:
            _end(parts, world.lifelines)
            on_poll()


class _Part:
    """One host's part of the run."""

    def __init__(
        self,
        connection: Connection,
        first_rank: int,
        log: Path,
        program: Program,
        on_vitals: Callable[[Vitals], None],
    ) -> None:
        self.connection = connection
        self.host = connection.host
        self._first_rank = first_rank
        self._log = log
        self._program = program
        self._on_vitals = on_vitals
        self._started = False
        self.code: int | None = None
        self.lost: str | None = None
        """Why the host is gone, if it is gone and has not said how its part ended."""
        self._report: dict[str, Any] = {}
        self.told_to_end = False
        """Whether the processes there have got a SIGTERM."""
        self.peak_memory = 0
        self._late: list[tuple[str, int, bytes]] = []
        """Parts of mirrored files that the launcher's drive has not taken yet."""

    @property
    def over(self) -> bool:
        return self.code is not None or self.lost is not None

    @property
    def in_trouble(self) -> bool:
        return self.lost is not None or bool(self.code)

    def prepare(self) -> None:
        """Open the run's folder on the host."""
        program = self._program
        shared = self.connection.request(
            "open_folder", path=str(program.run_dir), nvme=program.nvme_folders, files=program.files
        )
        if program.writes_checkpoints and not shared:
            raise HostError(
                f"{program.run_dir} is not the launcher's there, and a checkpoint is written by all hosts together",
                where=self.host.name,
                hint="set output_dir to a folder that all hosts share, or checkpoint.interval=null",
            )

    def start(self, number: int, num_hosts: int, meeting: Mapping[str, Any] | None, way: str | None) -> None:
        """Start torchrun's agent on the host. `way` is the network interface that leads to the other hosts."""
        interface = {"GLOO_SOCKET_IFNAME": way, "NCCL_SOCKET_IFNAME": way} if way is not None else {}
        own = _LOOPBACK if meeting is None else {}
        order = {
            "part": {"ranks": len(self.host.slots), "number": number, "hosts": num_hosts, "meeting": meeting},
            "function": self._program.function,
            "run_dir": str(self._program.run_dir),
            "arguments": list(self._program.arguments),
            "environment": {**visible_accelerators(self.connection), **own, **self._program.environment},
            "defaults": interface,
            "log": str(self._log),
        }
        self.connection.request("run", **self._program.agent.start(), text=json.dumps(order) + "\n")
        self._started = True

    def listen(self) -> None:
        """Take in what the host has said. Then look whether it is gone."""
        lost = self.connection.lost
        self._take_in(most=_MOST_EVENTS if lost is None else None)
        self.lost = lost if self.code is None else None

    def _take_in(self, most: int | None) -> None:
        """Take in messages: bytes of mirrored files, what the processes take, the end of the agent.

        It takes no more than `most`, so that hosts with many messages don't make the launcher deaf to its user.
        """
        with suppress(queue.Empty):
            for _ in count() if most is None else range(most):
                event = self.connection.events.get_nowait()
                if event["event"] == "ended":
                    self.code = event["code"]
                    self._report = report_in(event["output"])
                    with suppress(OSError):
                        if not self._log.exists():  # the agent did not come to know its log
                            self._log.write_text(event["errors"])
                elif event["event"] == "told to end":
                    self.told_to_end = True
                elif event["event"] == "vitals":
                    self.peak_memory = max(self.peak_memory, event["memory"])
                    self._on_vitals(Vitals(self.host.name, event["memory"], event["read"], event["written"]))
                elif event["event"] == "file":
                    self._late.append((event["path"], event["offset"], base64.b64decode(event["data"])))
                    self._write_late()

    def _write_late(self) -> None:
        """Write as much as the launcher's drive takes, and keep the rest for later. A full drive here ends no run."""
        with suppress(OSError):
            while self._late:
                self._write(*self._late[0])
                del self._late[0]
        while sum(len(data) for _, _, data in self._late) > _MOST_LATE:
            del self._late[0]

    def _write(self, name: str, offset: int, data: bytes) -> None:
        path = (self._program.run_dir / name).resolve()
        if not path.is_relative_to(self._program.run_dir.resolve()):
            return  # no host may write outside of the run's folder
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if offset == 0 else 0), 0o644)
        try:
            while data:  # a drive that is nearly full takes a part
                taken = os.pwrite(descriptor, data, offset)
                data, offset = data[taken:], offset + taken
        finally:
            os.close(descriptor)

    def ask_to_stop(self) -> None:
        self.connection.request("stop")

    def ending(self) -> Ending:
        return Ending(self.host, self._first_rank, self._log, self.code, self.lost, self._report)

    def kill(self) -> None:
        """End what still runs on the host, and wait for its last messages."""
        if self._started and not self.over:
            self.connection.request("kill")
            patience = Patience(_KILL_S)
            while not self.over and not patience.is_over:
                time.sleep(0.02)
                self.listen()

    def leave(self, lifelines: Lifelines) -> None:
        """Give the folder up. If the host was lost, try a new connection and clean up by that."""
        if self.connection.lost is not None:
            self.connection = lifelines.connect(self.host)
            self.connection.request("sweep")
            self.prepare()
        self.connection.request("close_folder")
        self._take_in(most=None)


def visible_accelerators(connection: Connection) -> dict[str, str]:
    """The variable that chooses the accelerators of a filter's slots. Without a filter the host's own choice stays.

    In a Slurm job that choice has the job's accelerators, and slots are positions in it.
    """
    host, own = connection.host, connection.visible
    if host.slots == tuple(range(len(host.slots))):
        return {}
    names = own if 0 < host.gpus == len(own) else [str(slot) for slot in range(host.slots[-1] + 1)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot] for slot in host.slots)}


def _start(parts: Sequence[_Part], rendezvous: Rendezvous | None) -> None:
    """Start all parts, or none."""
    _all_or_none(at_all(_Part.prepare, parts))
    if rendezvous is None:
        (part,) = parts
        part.start(0, 1, None, None)
        return
    ways = [way if isinstance(way, str) else None for way in rendezvous.ways]
    meeting = {"address": rendezvous.address, "port": rendezvous.port, "word": secrets.token_hex(16)}

    def start(number: int) -> None:
        parts[number].start(number, len(parts), meeting, ways[number])

    start(0)  # the first supervisor frees the port of the rendezvous, and its agent takes it
    _all_or_none(at_all(start, range(1, len(parts))))


def _all_or_none(results: Sequence[Any]) -> None:
    problems = [result.line() for result in results if isinstance(result, HostError)]
    if problems:
        raise PreflightError("; ".join(problems))


def _watch(
    parts: Sequence[_Part],
    stop_signals: StopSignals,
    run_dir: Path,
    on_poll: Callable[[], None],
    notify: Callable[[str], None],
) -> Outcome:
    asked_to_stop = False
    teardown_due: float | None = None
    while not all(part.over for part in parts):
        time.sleep(_POLL_S)
        for part in parts:
            part.listen()
        on_poll()
        if any(part.told_to_end for part in parts):
            stop_signals.told_elsewhere()
        if stop_signals.received >= 2:
            return Outcome(Interrupted.exit_code, None, interrupted=True)
        if stop_signals.received and not asked_to_stop:
            asked_to_stop = True
            # not waited for: a second Ctrl-C has to be heard, even if a host does not answer
            threading.Thread(target=at_all, args=(_Part.ask_to_stop, parts), daemon=True).start()
            notify("stopping after this step; press Ctrl-C again to kill the ranks now")
        if teardown_due is None and (any_recorded(run_dir) or any(part.in_trouble for part in parts)):
            teardown_due = time.monotonic() + _TEARDOWN_S
            for part in parts:
                if part.lost is not None:
                    notify(f"{part.host.name}: {part.lost}; ending the run")
        falters = any(part.connection.falters for part in parts)  # what others tell may be the loss of this one
        if teardown_due is not None and time.monotonic() > teardown_due and not falters:
            break
    failure = first_failure(run_dir, [part.ending() for part in parts])
    if failure is not None:
        return Outcome(failure.error.exit_code, failure, asked_to_stop, _fate_of_others(parts, failure))
    return Outcome(Interrupted.exit_code if asked_to_stop else 0, None, interrupted=asked_to_stop)


def _fate_of_others(parts: Sequence[_Part], failure: Failure) -> str:
    """What became of the other hosts. Those to look at come first."""
    others = [part for part in parts if part.host.name != failure.host]
    lost = [part.host.name for part in others if part.lost is not None]
    ended = [part.host.name for part in others if part.lost is None]
    words = [f"{', '.join(lost)} lost as well"] if lost else []
    words += [f"ended on {', '.join(ended[:8])}{', ...' if len(ended) > 8 else ''}"] if ended else []
    return "; ".join(words)


def _end(parts: Sequence[_Part], lifelines: Lifelines) -> None:
    """Leave nothing of the run on any host that answers, and fetch what the ranks wrote."""
    at_all(_Part.kill, parts)
    at_all(lambda part: part.leave(lifelines), parts)


@contextmanager
def _marked(mark: Path) -> Iterator[None]:
    """Remove `mark` at the end. While it is in the run's folder, a host that sees it has the launcher's own folder."""
    try:
        yield
    finally:
        with suppress(OSError):  # the next launch removes it; an error here would hide the one that ended this launch
            mark.unlink()
