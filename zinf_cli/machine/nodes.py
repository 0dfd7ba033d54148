"""Which memory and which cores lie together (NUMA), and which are near an accelerator, as /sys tells."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path


def cores_near(device: str, root: Path = Path("/")) -> frozenset[int]:
    """The cores on the node of a PCI device, such as 0000:3b:00.0. None where the kernel knows no node for it."""
    with suppress(OSError, ValueError):
        node = int((root / f"sys/bus/pci/devices/{device}/numa_node").read_text())
        if node >= 0:
            return _numbers((root / f"sys/devices/system/node/node{node}/cpulist").read_text())
    return frozenset()


def memory_without_cores(root: Path = Path("/")) -> int:
    """Free bytes on nodes that have no cores."""
    nodes = root.glob("sys/devices/system/node/node[0-9]*")
    return sum(_free_bytes(node) for node in nodes if not _numbers((node / "cpulist").read_text()))


def _numbers(ranges: str) -> frozenset[int]:
    """`0-3,8` and a line end, spelled out."""
    spans = [part.split("-") for part in ranges.strip().split(",") if part]
    return frozenset(number for span in spans for number in range(int(span[0]), int(span[-1]) + 1))


def _free_bytes(node: Path) -> int:
    free = re.search(r"MemFree:\s+(\d+) kB", (node / "meminfo").read_text())
    return 1024 * int(free[1]) if free is not None else 0
