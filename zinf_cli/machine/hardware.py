"""What this machine has to give: memory the kernel would still hand out, and space on drives."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from zinf_cli.errors import PreflightError
from zinf_cli.machine.control_groups import memory_left
from zinf_cli.machine.drive_files import file_system_of, open_nameless
from zinf_cli.machine.nodes import memory_without_cores
from zinf_cli.machine.profiles import DRIVE_SHARE


@dataclass(frozen=True)
class Space:
    """What can lie in `folder`: folders with one `device` share a file system, and its `free_bytes`."""

    folder: str
    device: str
    free_bytes: int
    direct: bool
    """Whether files here are read and written past the page cache."""
    in_memory: bool
    """Whether the file system is memory: tmpfs."""


@dataclass(frozen=True)
class Room:
    """What a run may take of each host, in bytes, and whose limits these are."""

    memory: int
    drives: int
    memory_of: str = "this machine"
    drives_of: str = "this machine"
    drives_in_memory: float = 0.0
    """Which share of the drives' bytes lies in memory: in folders on tmpfs."""


def room_here(nvme_folders: Sequence[Path]) -> Room:
    """Of this machine."""
    spaces = [drive_space(folder) for folder in nvme_folders]
    return Room(available_memory(), room_of(spaces), drives_in_memory=share_in_memory(spaces))


def room_of(spaces: Sequence[Space]) -> int:
    """Bytes that can be laid evenly over folders: as many times the one with the least as there are folders."""
    sharing = Counter(space.device for space in spaces)
    least = min((space.free_bytes // sharing[space.device] for space in spaces), default=0)
    return int(len(spaces) * least * DRIVE_SHARE)


def share_in_memory(spaces: Sequence[Space]) -> float:
    """Of bytes that are laid evenly over folders."""
    return sum(space.in_memory for space in spaces) / max(1, len(spaces))


def accelerators_here(root: Path = Path("/")) -> int:
    """GPUs that are given to this system, whatever this process may see of them. A container may lack one of the signs
    of them: what the driver tells, and their device files."""
    return max(len(list(root.glob(sign))) for sign in ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*"))


def available_memory() -> int:
    """Bytes of CPU memory a new process could use: the kernel's estimate, or what the control groups leave."""
    available = int(psutil.virtual_memory().available) - memory_of_accelerators()
    return min([available, *(left for left in memory_left() if left >= 0)])


def huge_pages(root: Path = Path("/")) -> str:
    """Whether memory that asks for huge pages gets them: "always", "madvise" or "never", or "unknown"."""
    try:
        modes = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    chosen = re.search(r"\[(\w+)\]", modes)  # always [madvise] never
    return chosen[1] if chosen is not None else "unknown"


def memory_of_accelerators(root: Path = Path("/")) -> int:
    """Free bytes that the kernel counts as its own and that are an accelerator's (GH200): on nodes without cores."""
    return memory_without_cores(root) if accelerators_here(root) else 0


def drive_space(folder: Path, key: str = "offload.nvme_path") -> Space:
    """What can lie where `folder` (the recipe's `key`) is or will be; PreflightError where nothing can be written.

    Where a rewrite takes new space before the old is free, that is half of what is free.
    """
    existing = folder
    while not existing.exists():
        if existing.is_symlink():
            what = f"{existing} is a link to {existing.readlink()}, which is not there"
            raise PreflightError(what, where=str(folder), hint=f"mount its drive, or choose another {key}")
        existing = existing.parent
    problem = "no drive" if os.statvfs(existing).f_blocks == 0 else None
    if problem is not None or not existing.is_dir():
        raise PreflightError(
            f"can't create files here: {problem or f'{existing} is a file'}",
            where=str(folder),
            hint=f"choose another {key}",
        )
    file = open_nameless(existing, key, folder)
    try:
        status = os.fstatvfs(file.descriptor)
        free = status.f_bavail * status.f_frsize // (1 if file.in_place else 2)
        return Space(str(folder), file_system_of(file.descriptor), free, file.direct, file.in_memory)
    finally:
        os.close(file.descriptor)
