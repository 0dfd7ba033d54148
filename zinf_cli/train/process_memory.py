"""Memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path


def return_free_memory() -> None:
    """Give freed pages that malloc keeps back to the kernel (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """The peak resident memory of this process since the last `reset`, in bytes (Linux)."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        return process_memory().get("VmHWM", 0)


def process_memory() -> dict[str, int]:
    """Bytes of this process, by the names of proc_pid_status(5): VmRSS, VmHWM, RssFile and the like."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
