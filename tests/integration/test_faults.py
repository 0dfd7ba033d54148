"""What goes wrong on hosts while they train, and how the launch comes home: cause named, exit code right, nothing left.

Each fault strikes at a seeded moment: some once in `make test`, after the first step; all at ten moments in
`make test-faults`, every other one while the ranks are still starting, half of them by fabric.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lab import IP, Lab, namespace_lab, wait_until
from programs import command
from workshop import ApartWorkshop, wait_for_steps

MOMENTS = int(os.environ.get("ZINF_FAULT_MOMENTS", "1"))


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[ApartWorkshop]:
    with namespace_lab(tmp_path, 2) as lab:
        yield ApartWorkshop(tmp_path, lab)


def of_module(lab: Lab, host: int, module: str) -> list[int]:
    """Processes on a host that run a module, the first to start first."""
    pids = lab.processes(lab.hosts[host])
    found = [pid for pid in pids if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(found, key=lambda pid: psutil.Process(pid).create_time())  # numbers of processes begin again


def kill_rank(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    wait_until(lambda: lab.named("zinf rank 1"), 10)
    os.kill(lab.named("zinf rank 1")[0], signal.SIGKILL)


def kill_agent(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    os.kill(of_module(lab, 1, "zinf_cli.train.agent")[0], signal.SIGKILL)


def kill_supervisor(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    os.kill(of_module(lab, 1, "sys.stdin.buffer.read")[0], signal.SIGKILL)


def kill_launcher(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    launcher.kill()


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


FAULTS = {
    "rank killed": Fault(kill_rank, 1, "node2:rank 1: killed by SIGKILL"),
    "agent killed": Fault(kill_agent, 1, "node2: torchrun itself: killed by SIGKILL"),
    "supervisor killed": Fault(kill_supervisor, 1, "node2: the connection was lost, or its supervisor killed"),
    "launcher killed": Fault(kill_launcher, -signal.SIGKILL, ""),
    "sshd killed": Fault(kill_sshd, 1, "node2: the connection was lost"),
    "host crashed": Fault(crash_host, 1, "node2: ", 30.0),
    "link cut": Fault(cut_link, 1, "node2: gave no sign of life for 10 s", 40.0),
    "Ctrl-C": Fault(press_once, 130, "interrupted after"),
    "Ctrl-C twice": Fault(press_twice, 130, "interrupted after"),
}


SHORT = ("rank killed", "launcher killed")


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", FAULTS if MOMENTS > 1 else SHORT)
def test_a_fault_is_named_and_nothing_is_left(apart: ApartWorkshop, name: str, moment: int) -> None:
    fault, lab = FAULTS[name], apart.lab
    if moment % 4 >= 2:  # by fabric
        lab.without("ssh")
    process = apart.start("--hosts", lab.hostfile(), "train.max_steps=100000")
    if moment % 2:
        wait_until(lambda: lab.named("zinf rank 1"), 40)
    else:
        wait_for_steps(apart.run_dir, 1)
    time.sleep(random.Random(f"{name} {moment}").uniform(0.0, 2.0))
    fault.strike(lab, process)
    struck = time.monotonic()
    ended = apart.end(process)
    assert time.monotonic() - struck < fault.within_s
    assert ended.code == fault.code, ended.err
    if fault.said:
        assert fault.said in ended.message
        assert "Traceback" not in ended.err
        assert ended.summary["status"] == ("interrupted" if fault.code == 130 else "failed")
    if name == "link cut":
        lab.hosts[1].link("up")
    # a launcher that is dead fetches nothing: what the ranks wrote stays where it is, and nothing else
    left = [line for line in lab.left_behind() if not (name in LOSES_FILES and "/run/" in line)]
    assert left == []
    assert no_listener(lab)
    wait_until(lambda: not lab.connections(), 20)


LOSES_FILES = ("launcher killed", "link cut", "host crashed")


def no_listener(lab: Lab) -> bool:
    """Whether no port but sshd's is open on any host."""
    for host in lab.hosts:
        if host.process is not None and host.process.poll() is None:
            command = [str(IP), "netns", "exec", str(host.namespace), "cat", "/proc/net/tcp"]
            table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
            ports = {int(line.split()[1].split(":")[1], 16) for line in table if line.split()[3] == "0A"}
            if ports - {22}:
                return False
    return True


def test_a_drive_that_is_too_small_is_named_before_anything_starts(apart: ApartWorkshop) -> None:
    on_host(apart.lab, 1, "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(apart.folder / "local"))
    ended = apart.launch("--hosts", apart.lab.hostfile())
    assert ended.code == 4, ended.err
    assert "nvme needs" in ended.message
    assert "node2 allows" in ended.message
    assert not apart.run_dir.exists()


def test_a_drive_that_fills_up_meanwhile_is_named(apart: ApartWorkshop) -> None:
    on_host(apart.lab, 1, "mkdir", str(apart.nvme))
    on_host(apart.lab, 1, "mount", "-t", "tmpfs", "-o", "size=32m", "none", str(apart.nvme))
    process = apart.start("--hosts", apart.lab.hostfile())
    wait_until((apart.run_dir / "plan.json").exists, 40)
    on_host(apart.lab, 1, "fallocate", "-l", "32M", str(apart.nvme / "someone-elses"))
    ended = apart.end(process)
    assert ended.code == 4, ended.err
    assert f"node2:rank 1: {apart.nvme}: rank 1 needs" in ended.message
    assert apart.left_behind() == []


def on_host(lab: Lab, number: int, *command: str) -> None:
    """Run a command among the files of a host."""
    process = lab.hosts[number].process
    assert process is not None
    (sshd,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["nsenter", "-t", sshd, "-m", *command], check=True)


@pytest.mark.skipif(MOMENTS == 1, reason="takes half a minute: make test-faults")
def test_a_run_starts_again_on_the_hosts_that_answer(apart: ApartWorkshop) -> None:
    restarts = ("launch.max_restarts=2", "launch.min_hosts=1")
    process = apart.start("--hosts", apart.lab.hostfile(), "train.max_steps=100000", *restarts)
    wait_for_steps(apart.run_dir, 1)
    kill_rank(apart.lab, process)
    wait_until(lambda: (apart.run_dir / "earlier" / "1").exists(), 30)
    wait_for_steps(apart.run_dir, 1)
    assert json.loads((apart.run_dir / "plan.json").read_text())["world_size"] == 2
    crash_host(apart.lab, process)
    wait_until(lambda: (apart.run_dir / "earlier" / "2").exists(), 40)
    wait_for_steps(apart.run_dir, 1)
    assert json.loads((apart.run_dir / "plan.json").read_text())["world_size"] == 1
    press_once(apart.lab, process)
    ended = apart.end(process)
    assert ended.code == 130, ended.err
    assert "node2:rank 1: killed by SIGKILL" in ended.err
    assert "restart 2 of 2" in ended.err
    assert "node2: left out: " in ended.err
    assert [line for line in apart.lab.left_behind() if "/node1/" in line] == []


@pytest.mark.skipif(MOMENTS == 1, reason="takes twenty seconds: make test-faults")
def test_a_launcher_killed_behind_a_cut_cable_leaves_no_connection(apart: ApartWorkshop) -> None:
    """No end of the lifeline hears of the other's: ssh ends by its own keep-alive, the supervisor by the silence."""
    lab = apart.lab
    jump = f"Host node2\n ProxyJump node1\n{(lab.home / '.ssh' / 'config').read_text()}"
    (lab.home / ".ssh" / "config").write_text(jump)
    launcher = subprocess.Popen(
        [*lab.launcher, *command("connects", lab.hostfile(hosts=lab.hosts[1:]), "wait")],
        env=lab.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    assert json.loads(launcher.stdout.readline()) == ["node2"]
    lab.hosts[0].link("down")
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not lab.connections(), 25)
    wait_until(lambda: not lab.processes(), 10)
