"""Nodes of memory and cores, from trees as /sys has them. No machine with several was at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from zinf_cli.machine.hardware import memory_of_accelerators
from zinf_cli.machine.nodes import cores_near
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
