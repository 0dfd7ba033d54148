"""Runs on real hosts, reached over SSH: what they compute, what they leave, what is said when one is not ready."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked_ranks import ForkedRanks
from lab import IP, ROOT, loopback_lab, namespace_lab
from programs import command
from workshop import ApartWorkshop, FarWorkshop, wait_for_steps


@pytest.fixture
def near(tmp_path: Path) -> Iterator[FarWorkshop]:
    with loopback_lab(tmp_path, 2) as lab:
        yield FarWorkshop(tmp_path, lab)


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[ApartWorkshop]:
    with namespace_lab(tmp_path, 3) as lab:
        yield ApartWorkshop(tmp_path, lab)


def test_two_hosts_train_as_one_rank_does(near: FarWorkshop, forked: ForkedRanks) -> None:
    alone = near.fork(forked, "alone")
    two = near.launch("--hosts", near.lab.hostfile(), "--json")
    assert two.code == 0, two.err
    assert two.losses == pytest.approx(alone.losses, rel=1e-5)
    assert json.loads(two.out) == two.summary
    assert {path.name for path in (near.run_dir / "logs").iterdir()} == {
        "rank-00000.log", "rank-00001.log", "start.json", "torchrun-00000.log", "torchrun-00001.log",
    }  # fmt: skip
    assert near.left_behind() == []


def test_three_hosts_that_share_nothing_train_as_one_rank_does(apart: ApartWorkshop, forked: ForkedRanks) -> None:
    own = apart.lab.hosts[1].local / "run" / "metrics.jsonl"
    own.parent.mkdir()
    own.write_text("of a run that this host did by itself\n")
    alone = apart.fork(forked, "alone")
    three = apart.launch("--hosts", apart.lab.hostfile())
    assert three.code == 0, three.err
    assert three.losses == pytest.approx(alone.losses, rel=1e-5)
    plan = json.loads((apart.run_dir / "plan.json").read_text())
    assert [host["host"] for host in plan["hosts"]] == ["node1", "node2", "node3"]
    for rank in range(3):
        assert f"rank {rank} on node{rank + 1}" in (apart.run_dir / "logs" / f"rank-{rank:05d}.log").read_text()
    assert apart.left_behind() == [str(own.parent / "earlier" / "1" / "metrics.jsonl")]


def test_zinf_itself_is_brought_to_hosts_that_have_another(tmp_path: Path) -> None:
    own = tmp_path / "local" / "zinf"
    with namespace_lab(tmp_path, 2, zinf=own) as lab:
        apart = ApartWorkshop(tmp_path, lab)
        lab.launcher += ["env", "-C", str(tmp_path)]  # python -m looks for zinf in the current folder first
        shutil.copytree(ROOT / "zinf_cli", own / "zinf_cli", ignore=shutil.ignore_patterns("__pycache__"))
        with (own / "zinf_cli" / "errors.py").open("a") as file:
            file.write("# another version\n")
        there = lab.hosts[1].local / "zinf" / "zinf_cli"  # the first has none
        shutil.copytree(ROOT / "zinf_cli", there, ignore=shutil.ignore_patterns("__pycache__"))
        arguments = ("--hosts", lab.hostfile())
        refused = apart.launch(*arguments)
        assert refused.code == 3, refused.err
        said = " ".join(refused.err.split())
        assert "is not the launcher's zinf: no " in said
        assert re.search(r"zinf [0-9a-f. ()]+ is not the launcher's", said), said
        brought = apart.launch(*arguments, "--sync", str(apart.recipe))
        assert brought.code == 0, brought.err
        for host in lab.hosts:
            there = host.local / "zinf" / "zinf_cli" / "errors.py"
            assert there.read_text().endswith("# another version\n")


def test_checkpoints_are_refused_where_hosts_share_no_folder_for_them(apart: ApartWorkshop) -> None:
    refused = apart.launch("--hosts", apart.lab.hostfile(hosts=apart.lab.hosts[:2]), "checkpoint.interval=1")
    assert refused.code == 3, refused.err
    assert f"node2: {apart.run_dir} is not the launcher's there" in refused.message
    assert "output_dir to a folder that all hosts share" in refused.message
    assert apart.left_behind() == []


def test_two_launches_on_one_host_end_only_their_own(near: FarWorkshop) -> None:
    hostfile = near.lab.hostfile(hosts=near.lab.hosts[:1])
    first = near.start("--hosts", hostfile, "train.max_steps=100000")
    second = subprocess.Popen(
        [*near.command("--hosts", hostfile, "train.max_steps=100000"), f"output_dir={near.folder / 'other'}"],
        env=near.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_steps(near.run_dir, 1)
    wait_for_steps(near.folder / "other", 1)
    os.killpg(first.pid, signal.SIGINT)
    assert near.end(first).code == 130
    here = len((near.folder / "other" / "metrics.jsonl").read_text().splitlines())
    wait_for_steps(near.folder / "other", here + 2)
    second.kill()
    second.communicate()
    assert near.left_behind() == []


def test_a_run_folder_in_use_on_a_host_is_left_alone(apart: ApartWorkshop) -> None:
    """Another launcher has it: this one's folder of the same name is free."""
    first = apart.start("--hosts", apart.lab.hostfile(hosts=apart.lab.hosts[:1]), "train.max_steps=100000")
    wait_for_steps(apart.run_dir, 1)
    (rank,) = apart.lab.named("zinf rank 0")
    os.kill(rank, signal.SIGSTOP)  # it would only take time from the other
    apart.run_dir.rename(apart.folder / "elsewhere")
    second = apart.launch("--hosts", apart.lab.hostfile(hosts=apart.lab.hosts[:2]))
    assert second.code == 3, second.err
    assert f"node1: {apart.run_dir}: another run is using this folder" in second.message
    assert not apart.lab.processes(apart.lab.hosts[1])
    os.kill(rank, signal.SIGCONT)
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode == 130
    assert apart.left_behind() == []


def test_variables_reach_the_ranks_and_are_never_printed_and_ranks_listen_on_the_address_of_their_host_alone(
    apart: ApartWorkshop,
) -> None:
    secret = "s3cret value; $(touch /tmp/no) 'quoted' \"twice\""
    hosts = apart.lab.hosts[:2]
    told = ("--env", "HF_TOKEN", "--env", "LAB=a b")
    process = subprocess.Popen(
        apart.command("--hosts", apart.lab.hostfile(hosts=hosts), *told, "train.max_steps=100000"),
        env={**apart.environment(), "HF_TOKEN": secret, "NCCL_DEBUG": "WARN"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_steps(apart.run_dir, 1)
    for rank in ("0", "1"):
        assert apart.lab.named(f"zinf rank {rank}", HF_TOKEN=secret, LAB="a b", NCCL_DEBUG="WARN")
    for pid in apart.lab.processes():
        assert "s3cret" not in Path(f"/proc/{pid}/cmdline").read_text()
    for number, host in enumerate(hosts, 1):
        inside = [str(IP), "netns", "exec", str(host.namespace), *command("listeners")]
        found = subprocess.run(inside, capture_output=True, text=True, check=True).stdout
        assert found.split() == [f"10.77.0.{number}"]
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "s3cret" not in said
    assert apart.left_behind() == []


@pytest.mark.parametrize(
    ("variable", "said"), [("NO_SUCH_THING", "not set here"), ("not a name=1", "no name of a variable")]
)
def test_variables_that_make_no_sense(near: FarWorkshop, variable: str, said: str) -> None:
    ended = near.launch("--hosts", near.lab.hostfile(), "--env", variable)
    assert ended.code == 2
    assert said in ended.message
