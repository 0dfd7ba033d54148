"""A host's part of a run: it is prepared, started, listened to, ended and left."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from zinf_cli.errors import HostError
from zinf_cli.launch.connection import Connection, Lifelines
from zinf_cli.launch.failure import Ending, report_in
from zinf_cli.launch.mirrored_files import MirroredFiles
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.program import Program
from zinf_cli.launch.vitals import Vitals

_MOST_EVENTS = 32
"""Messages of a host that one poll takes in."""

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""For ranks of a single host, whatever the host has set: no other machine may reach what they listen on."""

_KILL_S = 12.0
"""Seconds that a host has to end its processes and to report that, before it counts as lost."""


class Part:
    """One host's part of the run."""

    def __init__(
        self,
        connection: Connection,
        first_rank: int,
        log: Path,
        program: Program,
        on_vitals: Callable[[Vitals], None],
        most_late: int,
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
        self._mirrored = MirroredFiles(program.run_dir, most_late)

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
            "open_folder", path=str(program.run_dir), nvme=program.nvme_folders, files=program.packed_files
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
        self._take_in(_MOST_EVENTS if lost is None else None)
        self.lost = lost if self.code is None else None

    def _take_in(self, most: int | None = None) -> None:
        """Take in messages: bytes of mirrored files, what the processes take, the end of the agent.

        It takes no more than `most`, so that hosts with many messages don't make the launcher deaf to its user.
        """
        for _ in count() if most is None else range(most):
            event = self.connection.event()
            if event is None:
                return
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
                self._mirrored.write(event["path"], event["offset"], base64.b64decode(event["data"]))

    def ask_to_stop(self) -> None:
        self.connection.request("stop")

    def ending(self) -> Ending:
        return Ending(self.host, self._first_rank, self._log, self.code, self.lost, self._report)

    def kill(self) -> None:
        """End what still runs on the host, and wait for its last messages."""
        if self._started and not self.over:
            self.connection.request("kill", meanwhile=self.listen)
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
        self.connection.request("close_folder", meanwhile=self._take_in)
        self._take_in()


def visible_accelerators(connection: Connection) -> dict[str, str]:
    """The variable that chooses the accelerators of a filter's slots. Without a filter the host's own choice stays.

    In a Slurm job that choice has the job's accelerators, and slots are positions in it.
    """
    host, own = connection.host, connection.visible
    if host.slots == tuple(range(len(host.slots))):
        return {}
    names = own if 0 < host.gpus == len(own) else [str(slot) for slot in range(host.slots[-1] + 1)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot] for slot in host.slots)}
