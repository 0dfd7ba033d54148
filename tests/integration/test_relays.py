"""Four real hosts over SSH. A launch connects to two, and relays on these to all, as it does with hundreds."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from host_faults import FAULTS, MOMENTS, Fault, check_fault, of_module, press_once
from lab import Lab, namespace_lab, wait_until
from programs import command
from workshop import ApartWorkshop, wait_for_steps

LONG = pytest.mark.skipif(MOMENTS == 1, reason="takes minutes: make test-faults")
RELAY = "zinf_cli.launch.relay"


class Workshop(ApartWorkshop):
    """The second and the fourth host are behind relays on the first and the third."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        super().__init__(folder, lab)
        self.content["train"]["global_batch_size"] = 8

    def command(self, *arguments: str) -> list[str]:
        words = super().command(*arguments)
        zinf = words.index("zinf_cli.cli")
        return [*words[: zinf - 2], *command("zinf_by_relays"), *words[zinf + 1 :]]

    def train(self) -> subprocess.Popen[str]:
        """Start a run; it is at its first step."""
        process = self.start("--hosts", self.lab.hostfile(), "train.max_steps=100000")
        wait_for_steps(self.run_dir, 1)
        return process


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Workshop]:
    with namespace_lab(tmp_path, 4) as lab:
        yield Workshop(tmp_path, lab)


def on_which_hosts(lab: Lab) -> list[int]:
    """How many relays each host has."""
    return [len(of_module(lab, host, RELAY)) for host in range(4)]


def kill_relay(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    (relay,) = of_module(lab, 2, RELAY)
    os.kill(relay, signal.SIGKILL)


def test_a_relay_that_is_killed_is_named_and_nothing_is_left(apart: Workshop) -> None:
    process = apart.train()
    assert len(apart.lab.named("zinf rank 3")) == 1
    assert on_which_hosts(apart.lab) == [1, 0, 1, 0]
    from_here = [line for line in apart.lab.connections() if "launch.relay" in line]
    assert len(from_here) == 2
    kill_relay(apart.lab, process)
    ended = apart.end(process)
    assert ended.code == 1, ended.err
    assert "node3: the connection was lost, or the relay killed" in ended.message
    assert apart.left_behind() == []
    assert apart.lab.connections() == []


RELAY_FAULTS = {
    **{name: fault for name, fault in FAULTS.items() if name != "link cut"},
    "link cut": replace(FAULTS["link cut"], said="node2: gave no sign of life for 13 s", within_s=45.0),
    "relay killed": Fault(kill_relay, 1, "node3: the connection was lost, or the relay killed"),
}


@LONG
@pytest.mark.parametrize("moment", range(min(MOMENTS, 2)))
@pytest.mark.parametrize("name", RELAY_FAULTS)
def test_a_fault_is_named_and_nothing_is_left(
    apart: Workshop, name: str, moment: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("fault", ["relays", name, *check_fault(apart, name, RELAY_FAULTS[name], moment)])


@LONG
def test_a_relay_behind_a_cut_cable_is_named_and_leaves_nothing(apart: Workshop) -> None:
    process = apart.train()
    apart.lab.hosts[2].link("down")
    ended = apart.end(process)
    assert ended.code == 1, ended.err
    assert "node3: gave no sign of life for 10 s" in ended.message
    assert "node4 lost as well" in ended.err
    wait_until(lambda: not apart.lab.processes(), 40)


@LONG
def test_a_relay_that_hangs_is_named_and_ended(apart: Workshop) -> None:
    process = apart.train()
    (relay,) = of_module(apart.lab, 2, RELAY)
    os.kill(relay, signal.SIGSTOP)
    ended = apart.end(process)
    assert ended.code == 1, ended.err
    assert "node3: gave no sign of life for 10 s" in ended.message
    assert apart.left_behind() == []
    assert apart.lab.connections() == []


@LONG
def test_a_relay_that_is_killed_while_hosts_start_leaves_nothing(apart: Workshop) -> None:
    """Its hosts may be reached without it, or be lost."""
    process = apart.start("--hosts", apart.lab.hostfile(), "train.max_steps=100000")
    wait_until(lambda: of_module(apart.lab, 2, RELAY), 20)
    kill_relay(apart.lab, process)
    wait_until(lambda: process.poll() is not None or (apart.run_dir / "metrics.jsonl").exists(), 60)
    if process.poll() is None:
        press_once(apart.lab, process)
    ended = apart.end(process)
    assert ended.code in (1, 3, 130), ended.err
    assert "Traceback" not in ended.err
    assert apart.left_behind() == []
    assert apart.lab.connections() == []


@LONG
def test_hosts_behind_relays_go_on_while_the_launcher_is_stopped_by_ctrl_z(apart: Workshop) -> None:
    process = apart.train()
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, 10)
    time.sleep(13)  # the silence that would end a host is shorter
    process.send_signal(signal.SIGCONT)
    here = len((apart.run_dir / "metrics.jsonl").read_text().splitlines())
    wait_for_steps(apart.run_dir, here + 2)
    press_once(apart.lab, process)
    ended = apart.end(process)
    assert ended.code == 130, ended.err
    assert apart.left_behind() == []
