"""What the control groups of this process (v1 and v2) let it have: memory and cores.

A group has no more than those above it have. Slurm, containers and systemd each set limits at heights of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Bytes. v1 writes a number beyond for "no limit"."""


def cores_here(root: Path = Path("/")) -> int:
    """Cores that this process may compute on at once: those of its affinity, and of the time that its groups get."""
    quotas = [int(share) for share in _shares(root)]
    return max(1, min(len(os.sched_getaffinity(0)), *quotas)) if quotas else len(os.sched_getaffinity(0))


def memory_left(root: Path = Path("/")) -> list[int]:
    """Bytes left in each group that limits memory. A group's cached files do not count: the kernel takes them back."""
    left = []
    for group, unified in _groups("memory", root):
        limit_file, usage_file = ("max", "current") if unified else ("limit_in_bytes", "usage_in_bytes")
        with suppress(OSError, ValueError, KeyError):
            limit = (group / f"memory.{limit_file}").read_text().strip()
            if limit != "max" and int(limit) < _NO_LIMIT:
                counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = int(counters["inactive_file"]) + int(counters["active_file"])
                left.append(int(limit) - int((group / f"memory.{usage_file}").read_text()) + cached)
    return left


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this process's group were killed for memory. None if that can't be read."""
    for group, unified in _groups("memory", root):
        with suppress(OSError):
            text = (group / f"memory.{'events' if unified else 'oom_control'}").read_text()
            if count := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE):
                return int(count[1])
    return None


def _shares(root: Path) -> Iterator[float]:
    """Cores' worth of time of each group that limits it."""
    for group, unified in _groups("cpu", root):
        with suppress(OSError, ValueError):
            if unified:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                yield int(quota) / int(period)


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of v2) of this process's group and of those above it, the innermost first.

    A container may see only its own group, as the root of what is mounted, while the path is the host's.
    """
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = mounted
        elif controller in controllers.split(","):
            top = mounted / controller
        else:
            continue
        folder = top / path.lstrip("/")
        while folder != top:
            yield folder, controllers == ""
            folder = folder.parent
        yield top, controllers == ""
