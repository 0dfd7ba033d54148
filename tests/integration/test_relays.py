"""Four real hosts over SSH. A launch connects to two, and relays on these to all, as it does with hundreds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_faults import MOMENTS, of_module
from lab import namespace_lab, wait_until
from programs import command
from workshop import ApartWorkshop, wait_for_steps


class Workshop(ApartWorkshop):
    def command(self, *arguments: str) -> list[str]:
        words = super().command(*arguments)
        return [*self.lab.launcher, *command("zinf_by_relays"), *words[words.index("launch") :]]


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Workshop]:
    with namespace_lab(tmp_path, 4) as lab:
        yield Workshop(tmp_path, lab)


def test_a_relay_that_is_killed_is_named_and_nothing_is_left(apart: Workshop) -> None:
    apart.content["train"]["global_batch_size"] = 8
    process = apart.start("--hosts", apart.lab.hostfile(), "train.max_steps=100000")
    wait_for_steps(apart.run_dir, 1)
    assert len(apart.lab.named("zinf rank 3")) == 1
    assert [len(of_module(apart.lab, host, "zinf_cli.launch.relay")) for host in range(4)] == [1, 0, 1, 0]
    from_here = [line for line in apart.lab.connections() if "launch.relay" in line]
    assert len(from_here) == 2
    (relay,) = of_module(apart.lab, 2, "zinf_cli.launch.relay")
    os.kill(relay, signal.SIGKILL)
    ended = apart.end(process)
    assert ended.code == 1, ended.err
    assert "node3: the connection was lost, or the relay killed" in ended.message
    assert apart.left_behind() == []
    assert apart.lab.connections() == []


@pytest.mark.skipif(MOMENTS == 1, reason="takes half a minute: make test-faults")
def test_a_relay_behind_a_cut_cable_is_named_and_leaves_nothing(apart: Workshop) -> None:
    apart.content["train"]["global_batch_size"] = 8
    process = apart.start("--hosts", apart.lab.hostfile(), "train.max_steps=100000")
    wait_for_steps(apart.run_dir, 1)
    apart.lab.hosts[2].link("down")
    ended = apart.end(process)
    assert ended.code == 1, ended.err
    assert "node3: gave no sign of life for 10 s" in ended.message
    assert "node4 lost as well" in ended.err
    wait_until(lambda: not apart.lab.processes(), 40)
