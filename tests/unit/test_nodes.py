"""Nodes of memory and cores, from trees as /sys has them. No machine with several was at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zinf_cli.launch.preflight import Row, _judge_drive
from zinf_cli.machine.hardware import memory_of_accelerators
from zinf_cli.machine.nodes import cores_near, cores_near_drives, nodes_of_accelerators, nodes_of_drive
from zinf_cli.recipe.hosts import Host
from zinf_cli.train.near import near_enough


def make_node(root: Path, number: int, cores: str, free_kb: int) -> None:
    node = root / f"sys/devices/system/node/node{number}"
    node.mkdir(parents=True)
    (node / "cpulist").write_text(f"{cores}\n")
    (node / "meminfo").write_text(
        f"Node {number} MemTotal:       {free_kb + 1000} kB\nNode {number} MemFree:        {free_kb} kB\n"
    )


def make_device(root: Path, address: str, node: int) -> None:
    device = root / f"sys/bus/pci/devices/{address}"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")


def test_the_cores_near_a_device(tmp_path: Path) -> None:
    make_node(tmp_path, 0, "0-1,4-5", 1000)
    make_node(tmp_path, 1, "2-3,6-7", 1000)
    make_device(tmp_path, "0000:3b:00.0", 0)
    make_device(tmp_path, "0000:d8:00.0", 1)
    make_device(tmp_path, "0000:01:00.0", -1)  # as a virtual machine says it
    assert cores_near("0000:3b:00.0", tmp_path) == {0, 1, 4, 5}
    assert cores_near("0000:d8:00.0", tmp_path) == {2, 3, 6, 7}
    for unknown in ("0000:01:00.0", "0000:99:00.0", ""):
        assert cores_near(unknown, tmp_path) == set()


def make_drive(root: Path, name: str, node: int) -> Path:
    """A partition of a drive, as the kernel has it: its own folder says nothing of a node, the controller's does."""
    controller = root / f"sys/devices/pci0000:00/0000:{name}:00.0"
    partition = controller / f"nvme/nvme{name}/nvme{name}n1/nvme{name}n1p1"
    partition.mkdir(parents=True)
    (controller / "numa_node").write_text(f"{node}\n")
    return partition


def put_on(root: Path, folder: Path, block: Path) -> None:
    """Let the file system of a folder be that of a block device."""
    device = folder.stat().st_dev
    link = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(block, link.parent))


def test_the_cores_near_a_drive(tmp_path: Path) -> None:
    make_node(tmp_path, 0, "0-1", 1000)
    make_node(tmp_path, 1, "2-3", 1000)
    left, right, virtual = (make_drive(tmp_path, name, node) for name, node in (("01", 0), ("02", 1), ("03", -1)))
    absent = tmp_path / "not" / "there"
    assert cores_near_drives([tmp_path], tmp_path) == set()  # of a file system without a drive of its own
    put_on(tmp_path, tmp_path, right)
    assert cores_near_drives([tmp_path, absent], tmp_path) == {2, 3}
    put_on(tmp_path, tmp_path, virtual)
    assert cores_near_drives([absent], tmp_path) == set()
    for name, parts, nodes in (("md0", [left, right], {0, 1}), ("dm-0", [left], {0})):
        raid = tmp_path / f"sys/devices/virtual/block/{name}"
        (raid / "slaves").mkdir(parents=True)
        for part in parts:
            (raid / "slaves" / part.name).symlink_to(part)
        put_on(tmp_path, tmp_path, raid)
        assert nodes_of_drive(tmp_path, tmp_path) == nodes
    assert cores_near_drives([tmp_path], tmp_path) == {0, 1}
    assert cores_near_drives([], tmp_path) == set()


def test_the_node_of_a_partition_of_a_raid(tmp_path: Path) -> None:
    """The kernel has the drives of a RAID in its folder, and not in those of its partitions."""
    partition = tmp_path / "sys/devices/virtual/block/md0/md0p1"
    (partition.parent / "slaves").mkdir(parents=True)
    partition.mkdir()
    drive = make_drive(tmp_path, "01", 1)
    (partition.parent / "slaves" / drive.name).symlink_to(drive)
    put_on(tmp_path, tmp_path, partition)
    assert nodes_of_drive(tmp_path, tmp_path) == {1}


def test_the_node_of_a_drive_with_several_ports(tmp_path: Path) -> None:
    """The kernel has it beside links to the controllers that lead to it, since one port may take another's place."""
    subsystem = tmp_path / "sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    partition = subsystem / "nvme0n1/nvme0n1p1"
    partition.mkdir(parents=True)
    for name, node in (("01", 0), ("02", 1)):
        namespace = make_drive(tmp_path, name, node).parent
        (subsystem / f"nvme{int(name) - 1}").symlink_to(namespace.parent)
    put_on(tmp_path, tmp_path, partition)
    assert nodes_of_drive(tmp_path, tmp_path) == {0, 1}


@pytest.mark.parametrize(
    ("drives", "said"), [([1], "9.90 GiB, node 1 (accelerators: 0)"), ([0], "9.90 GiB"), ([], "9.90 GiB")]
)
def test_preflight_says_that_drives_are_far_from_accelerators(tmp_path: Path, drives: list[int], said: str) -> None:
    make_device(tmp_path, "0000:3b:00.0", 0)
    (tmp_path / "proc/driver/nvidia/gpus/0000:3B:00.0").mkdir(parents=True)
    nodes = {"accelerators": sorted(nodes_of_accelerators(tmp_path)), "drives": drives}
    drive = {
        "folder": "/nvme", "device": "1", "free_bytes": 10 * 2**30, "direct": True, "in_memory": False, "problem": None,
    }  # fmt: skip
    row = Row(Host("node1", (0,)), facts={"drives": {"/nvme": drive}, "nodes": nodes})
    _judge_drive(row, drive)
    assert (row.cells, row.problems) == ({"nvme": said}, {})


LEFT, RIGHT = set(range(16)), set(range(16, 32))


@pytest.mark.parametrize(
    ("near", "allowed", "threads", "chosen"),
    [
        ([LEFT, LEFT, RIGHT, RIGHT], LEFT | RIGHT, 8, LEFT),
        ([LEFT, LEFT, LEFT, LEFT], LEFT | RIGHT, 8, set()),  # half of the cores would do nothing
        ([LEFT, LEFT, RIGHT, RIGHT], RIGHT, 4, set()),  # somebody has said where it runs
        ([LEFT, LEFT, RIGHT, RIGHT], {0, 1, 2, 3, 20}, 2, {0, 1, 2, 3}),
        ([set(), set(), RIGHT, RIGHT], LEFT | RIGHT, 8, set()),
    ],
)
def test_a_rank_stays_near_its_accelerator_where_its_threads_have_cores(
    near: list[set[int]], allowed: set[int], threads: int, chosen: set[int]
) -> None:
    assert near_enough(near, 0, allowed, threads) == chosen


def test_memory_of_an_accelerator_is_no_memory_of_the_cpu(tmp_path: Path) -> None:
    """The kernel of a GH200 has the memory of its GPU as a node of its own, which has no cores."""
    make_node(tmp_path, 0, "0-71", 480_000_000)
    make_node(tmp_path, 1, "", 96_000_000)
    assert memory_of_accelerators(tmp_path) == 0  # a node of memory alone, such as a CXL expander
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert memory_of_accelerators(tmp_path) == 96_000_000 * 1024
