"""What goes wrong on hosts while they train: the faults, what a launch ends with, and that it leaves nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from lab import IP, Lab, wait_until
from workshop import ApartWorkshop, Ended, wait_for_steps

MOMENTS = int(os.environ.get("ZINF_FAULT_MOMENTS", "1"))
"""At how many moments each fault strikes: at one in `make test`, at ten in `make test-faults`."""

_MOST_S = 90.0


def of_module(lab: Lab, host: int, module: str) -> list[int]:
    """Processes on a host that run a module, the first to start first."""
    started = {}
    for pid in lab.processes(lab.hosts[host]):
        with suppress(OSError, psutil.NoSuchProcess):  # it has ended by now
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                started[pid] = psutil.Process(pid).create_time()
    return sorted(started, key=started.__getitem__)  # numbers of processes begin again


def kill_rank(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    wait_until(lambda: lab.named("zinf rank 1"), 10)
    os.kill(lab.named("zinf rank 1")[0], signal.SIGKILL)


def kill_agent(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    os.kill(of_module(lab, 1, "zinf_cli.train.agent")[0], signal.SIGKILL)


def kill_supervisor(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    os.kill(of_module(lab, 1, "sys.stdin.buffer.read")[0], signal.SIGKILL)


def kill_launcher(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    os.kill(lab.launcher_of(launcher), signal.SIGKILL)


def kill_sshd(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    """The process that serves the connection, as a restart of sshd or the kernel might."""
    supervisor = of_module(lab, 1, "sys.stdin.buffer.read")[0]
    parent = int(Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)


def crash_host(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    lab.hosts[1].crash()


def cut_link(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    lab.hosts[1].link("down")


def press_once(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    os.killpg(launcher.pid, signal.SIGINT)


def press_twice(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    os.killpg(launcher.pid, signal.SIGINT)
    time.sleep(0.3)
    os.killpg(launcher.pid, signal.SIGINT)


@dataclass(frozen=True)
class Fault:
    """What strikes, what the launch ends with, what its message says, and how soon it is over."""

    strike: Callable[[Lab, subprocess.Popen[str]], None]
    code: int
    said: str
    within_s: float = 12.0
    loses_files: bool = False
    """Whether the launcher can't fetch and remove what the ranks of node2 have written."""


FAULTS = {
    "rank killed": Fault(kill_rank, 1, "node2:rank 1: killed by SIGKILL"),
    "agent killed": Fault(kill_agent, 1, "node2: torchrun itself: killed by SIGKILL"),
    "supervisor killed": Fault(kill_supervisor, 1, "node2: the connection was lost, or its supervisor killed"),
    "launcher killed": Fault(kill_launcher, -signal.SIGKILL, "", loses_files=True),
    "sshd killed": Fault(kill_sshd, 1, "node2: the connection was lost"),
    "host crashed": Fault(crash_host, 1, "node2: ", 30.0, loses_files=True),
    "link cut": Fault(cut_link, 1, "node2: gave no sign of life for 10 s", 40.0, loses_files=True),
    "Ctrl-C": Fault(press_once, 130, "interrupted after"),
    "Ctrl-C twice": Fault(press_twice, 130, "interrupted after"),
}


class Seen(NamedTuple):
    """Seconds from a fault until the launcher told of it, until it ended, and until nothing of the run was left."""

    told_s: float | None
    ended_s: float
    gone_s: float


def check_fault(apart: ApartWorkshop, name: str, fault: Fault, moment: int) -> Seen:
    """Let a fault strike a run at a seeded moment; its cause has to be named, and nothing may be left anywhere."""
    lab = apart.lab
    process = apart.start("--hosts", lab.hostfile(), "train.max_steps=100000")
    listener = _Listener(process)
    if moment % 2:
        wait_until(lambda: lab.named("zinf rank 1"), 40)
    else:
        wait_for_steps(apart.run_dir, 1)
    time.sleep(random.Random(f"{name} {moment}").uniform(0.0, 2.0))
    struck = time.monotonic()
    fault.strike(lab, process)
    process.wait(_MOST_S)
    over = time.monotonic()
    wait_until(lambda: not (lab.processes() or lab.connections()), _MOST_S)
    gone = time.monotonic()
    seen = Seen(listener.first_word(struck), over - struck, gone - struck)
    ended = Ended(process.returncode, "", listener.text(), apart.run_dir)
    assert seen.ended_s < fault.within_s
    assert ended.code == fault.code, ended.err
    if fault.said:
        assert fault.said in ended.message
        assert "Traceback" not in ended.err
        assert ended.summary["status"] == ("interrupted" if fault.code == 130 else "failed")
    if fault.strike is cut_link:
        lab.hosts[1].link("up")
    # where it can't fetch what the ranks wrote, that stays where it is, and nothing else
    left = [line for line in lab.left_behind() if not (fault.loses_files and "/run/" in line)]
    assert left == []
    wait_until(lambda: no_listener(lab), 5)  # a process that dies loses its memory first, and then its sockets
    return seen


class _Listener:
    """Takes the time of every line that a launch prints to stderr."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append((time.monotonic(), line))

    def text(self) -> str:
        """All of it. To be asked once the launch is over."""
        self._thread.join()
        self._process.communicate()  # which closes its streams
        return "".join(line for _, line in self._lines)

    def first_word(self, since: float) -> float | None:
        """Seconds from `since` to the first line that does not show progress. None where there is none."""
        told = (at - since for at, line in self._lines if at > since and not line.startswith(("step ", "before ")))
        return next(told, None)


def no_listener(lab: Lab) -> bool:
    """Whether no port is open on any host but those of sshd and of Slurm."""
    for host in lab.hosts:
        if host.process is not None and host.process.poll() is None:
            command = [str(IP), "netns", "exec", str(host.namespace), "cat", "/proc/net/tcp"]
            table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
            ports = {int(line.split()[1].split(":")[1], 16) for line in table if line.split()[3] == "0A"}
            if ports - {22, 6818}:
                return False
    return True
