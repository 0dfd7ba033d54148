"""Runs on real hosts, reached over SSH: what they compute, what they leave, what is said when one is not ready."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_launch import Ended, Workshop

from lab import Lab, loopback_lab, namespace_lab


class FarWorkshop(Workshop):
    """A workshop whose recipe is launched on the hosts of a lab."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        super().__init__(folder)
        self.lab = lab

    def command(self, *arguments: str) -> list[str]:
        self.write()
        return self.lab.zinf("launch", str(self.recipe), f"output_dir={self.run_dir}", *arguments)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def environment(self) -> dict[str, str]:
        return self.lab.environment

    def alone(self, *arguments: str) -> Ended:
        """The same recipe as one rank, without hosts; its folder is set aside by the next launch."""
        return self.launch(*arguments)

    def left_behind(self) -> list[str]:
        return self.lab.left_behind()


class ApartWorkshop(FarWorkshop):
    """The hosts share nothing: the run's folder and the drives are each one's own."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        super().__init__(folder, lab)
        self.nvme = folder / "local" / "nvme"
        self.content["offload"]["nvme_path"] = str(self.nvme)

    @property
    def run_dir(self) -> Path:
        return self.folder / "local" / "run"

    def end(self, process: subprocess.Popen[str]) -> Ended:
        ended = super().end(process)
        return Ended(ended.code, ended.out, ended.err, self.run_dir)


@pytest.fixture
def near(tmp_path: Path) -> Iterator[FarWorkshop]:
    with loopback_lab(tmp_path, 2) as lab:
        yield FarWorkshop(tmp_path, lab)


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[ApartWorkshop]:
    with namespace_lab(tmp_path, 4) as lab:
        yield ApartWorkshop(tmp_path, lab)


def test_two_hosts_train_as_one_rank_does(near: FarWorkshop) -> None:
    alone = near.launch("--slots", "1")
    two = near.launch("--hosts", near.lab.hostfile(), "--json")
    assert (alone.code, two.code) == (0, 0), two.err
    first = Ended(0, "", "", near.run_dir / "earlier" / "1")
    assert two.losses == pytest.approx(first.losses, rel=1e-5)
    assert json.loads(two.out) == two.summary
    assert {path.name for path in (near.run_dir / "logs").iterdir()} == {
        "rank-00000.log", "rank-00001.log", "torchrun-00000.log", "torchrun-00001.log",
    }  # fmt: skip
    assert near.left_behind() == []


def test_four_hosts_that_share_nothing_train_as_one_rank_does(apart: ApartWorkshop) -> None:
    apart.content["train"]["gradient_accumulation_steps"] = 4
    alone = apart.launch("--slots", "1")
    four = apart.launch("--hosts", apart.lab.hostfile())
    assert (alone.code, four.code) == (0, 0), four.err
    first = Ended(0, "", "", apart.run_dir / "earlier" / "1")
    assert four.losses == pytest.approx(first.losses, rel=1e-5)
    plan = json.loads((apart.run_dir / "plan.json").read_text())
    assert [host["host"] for host in plan["hosts"]] == ["node1", "node2", "node3", "node4"]
    for rank in range(4):
        assert f"rank {rank} on node{rank + 1}" in (apart.run_dir / "logs" / f"rank-{rank:05d}.log").read_text()
    assert apart.left_behind() == []
