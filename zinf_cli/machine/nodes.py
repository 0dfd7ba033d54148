"""Which memory and which cores lie together (NUMA), and which are near an accelerator or a drive, as /sys tells."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def cores_near(device: str, root: Path = Path("/")) -> frozenset[int]:
    """The cores on the node of a PCI device, such as 0000:3b:00.0. Empty where the kernel knows no node for it."""
    node = _node_of(root / f"sys/bus/pci/devices/{device}")
    return frozenset() if node is None else _cores_on(node, root)


def cores_near_drives(folders: Iterable[Path], root: Path = Path("/")) -> frozenset[int]:
    """The cores on the node of the drives under `folders`. Empty where there are several, or the kernel knows none."""
    nodes = frozenset[int]().union(*(nodes_of_drive(folder, root) for folder in folders))
    return _cores_on(next(iter(nodes)), root) if len(nodes) == 1 else frozenset()


def nodes_of_drive(folder: Path, root: Path = Path("/")) -> frozenset[int]:
    """The nodes that the drives of a folder's file system hang on. Empty for a file system that is not on drives."""
    with suppress(OSError):
        device = next(place for place in (folder, *folder.parents) if place.exists()).stat().st_dev
        return _nodes_of_block((root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve())
    return frozenset()


def nodes_of_accelerators(root: Path = Path("/")) -> frozenset[int]:
    """The nodes that this machine's accelerators hang on, as far as the kernel knows."""
    gpus = root.glob("proc/driver/nvidia/gpus/*")
    nodes = (_node_of(root / f"sys/bus/pci/devices/{gpu.name.lower()}") for gpu in gpus)
    return frozenset(node for node in nodes if node is not None)


def _nodes_of_block(block: Path) -> frozenset[int]:
    """Of a block device: a drive, what is made of several, such as a RAID, or a partition of one of these.

    A drive with several ports lies in the folder of its subsystem, beside links to the controllers (nvme0, nvme1).
    """
    for place in (block, *block.parents):
        if (node := _node_of(place)) is not None:
            return frozenset((node,))
        below = [*place.glob("slaves/*")]
        if place.name.startswith("nvme-subsys"):
            below += [link for link in place.glob("nvme*") if link.is_symlink()]
        if below:
            return frozenset[int]().union(*(_nodes_of_block(part.resolve()) for part in below))
    return frozenset()


def _node_of(device: Path) -> int | None:
    with suppress(OSError, ValueError):
        node = int((device / "numa_node").read_text())
        return node if node >= 0 else None
    return None


def _cores_on(node: int, root: Path) -> frozenset[int]:
    with suppress(OSError, ValueError):
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
