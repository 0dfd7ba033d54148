"""What goes wrong on hosts while they train, and how the launch comes home: cause named, exit code right, nothing left.

Each fault strikes at a seeded moment: some once in `make test`, after the first step; all at ten moments in
`make test-faults`, every other one while the ranks are still starting, half of them by fabric.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host_faults import FAULTS, MOMENTS, check_fault, crash_host, kill_rank, press_once
from lab import Lab, namespace_lab, wait_until
from programs import command
from workshop import ApartWorkshop, wait_for_steps


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[ApartWorkshop]:
    with namespace_lab(tmp_path, 2) as lab:
        yield ApartWorkshop(tmp_path, lab)


SHORT = ("rank killed", "launcher killed")


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", FAULTS if MOMENTS > 1 else SHORT)
def test_a_fault_is_named_and_nothing_is_left(
    apart: ApartWorkshop, name: str, moment: int, record_property: Callable[[str, object], None]
) -> None:
    by = "fabric" if moment % 4 >= 2 else "OpenSSH"
    if by == "fabric":
        apart.lab.without("ssh")
    record_property("fault", [by, name, *check_fault(apart, name, FAULTS[name], moment)])


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
