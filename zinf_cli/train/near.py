"""Keeps a rank, its threads and its memory on one node, where the machine has several (NUMA).

That is the node of its accelerator, or without one that of the run's drives. Threads and memory stay where they start:
the kernel gives a thread its parent's cores, and a page a place near the first that touches it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch

from zinf_cli.machine.nodes import cores_near, cores_near_drives


def stay_near(device: torch.device, num_threads: int) -> None:
    """Let this rank run on the cores near its accelerator. To be called before it has threads and buffers."""
    assert device.index is not None
    near = [cores_near(_address(index)) for index in range(torch.cuda.device_count())]
    _stay_on(near_enough(near, device.index, os.sched_getaffinity(0), num_threads))


def stay_near_drives(folders: Sequence[str], num_ranks: int, num_threads: int) -> None:
    """The same for one of `num_ranks` ranks of a host without accelerators, whose state lies in `folders`."""
    near = [cores_near_drives(map(Path, folders))] * num_ranks
    _stay_on(near_enough(near, 0, os.sched_getaffinity(0), num_threads))


def _stay_on(cores: AbstractSet[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


def near_enough(near: Sequence[AbstractSet[int]], index: int, allowed: AbstractSet[int], num_threads: int) -> set[int]:
    """Of the cores `allowed`, those near what rank `index` uses; `near` are those of each rank. None if too few.

    Ranks near one node share its cores, and each has `num_threads` threads. A rank is better far from its accelerator
    than without cores.
    """
    found = set(allowed & near[index])
    sharing = sum(cores == near[index] for cores in near)
    return found if len(found) >= sharing * num_threads else set()


def _address(index: int) -> str:
    """The PCI address of an accelerator; "" where torch does not tell."""
    properties = torch.cuda.get_device_properties(index)
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if not all(isinstance(number, int) for number in numbers):
        return ""
    domain, bus, place = numbers
    return f"{domain:04x}:{bus:02x}:{place:02x}.0"
