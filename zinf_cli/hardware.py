"""What this machine has to give: memory the kernel would still hand out, and space on drives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from zinf_cli.errors import PreflightError

ASSUMED_DRIVE_BANDWIDTH = 2e9
"""Bytes per second of one drive, read and write, where nothing was measured."""


@dataclass(frozen=True)
class Space:
    """Free bytes on the file system of `folder`; folders with one `device` share them."""

    folder: Path
    device: int
    free_bytes: int


@dataclass(frozen=True)
class Room:
    """What a run may take of each host, in bytes, and whose limits these are."""

    memory: int
    drives: int
    memory_of: str = "this machine"
    drives_of: str = "this machine"


def room_here(nvme_folders: Sequence[Path]) -> Room:
    """Of this machine."""
    spaces = {space.device: space.free_bytes for space in map(drive_space, nvme_folders)}
    return Room(available_memory(), sum(spaces.values()))


def accelerators_here() -> int:
    """GPUs the kernel's driver knows, whatever this process may see of them."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def available_memory() -> int:
    """Bytes of CPU memory a new process could use: the kernel's estimate, or what the control group leaves."""
    available = int(psutil.virtual_memory().available)
    return min([available, *(limit for limit in _cgroup_headroom() if limit >= 0)])


def _cgroup_headroom() -> list[int]:
    """Bytes left in this process's memory control groups (v2 and v1), as far as they can be read."""
    groups = []
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                groups.append((Path("/sys/fs/cgroup" + path), "memory.max", "memory.current"))
            elif "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory" + path)
                groups.append((root, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    except OSError:
        return []
    headroom = []
    for folder, limit_file, usage_file in groups:
        try:
            limit = (folder / limit_file).read_text().strip()
            if limit != "max" and int(limit) < 1 << 60:
                used = int((folder / usage_file).read_text()) - _page_cache(folder)
                headroom.append(int(limit) - used)
        except (OSError, ValueError, KeyError):
            continue
    return headroom


def _page_cache(group: Path) -> int:
    """Bytes a control group is charged for cached files: the kernel takes them back when memory is wanted."""
    counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(counters["inactive_file"]) + int(counters["active_file"])


def drive_space(folder: Path, key: str = "offload.nvme_path") -> Space:
    """The free space where `folder` (the recipe's `key`) is or will be; PreflightError where nothing can be written."""
    existing = folder
    while not existing.exists():
        if existing.is_symlink():
            what = f"{existing} is a link to {existing.readlink()}, which is not there"
            raise PreflightError(what, where=str(folder), hint=f"mount its drive, or choose another {key}")
        existing = existing.parent
    status = os.statvfs(existing)
    problem = "no drive" if status.f_blocks == 0 else "read-only" if status.f_flag & os.ST_RDONLY else None
    if problem is not None or not existing.is_dir():
        raise PreflightError(
            f"can't create files here: {problem or f'{existing} is a file'}",
            where=str(folder),
            hint=f"choose another {key}",
        )
    return Space(folder, existing.stat().st_dev, status.f_bavail * status.f_frsize)
