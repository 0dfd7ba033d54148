"""Memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_APART = 2**20
"""Bytes."""
LOOK_S = 0.1
REST_S = 2.0


def return_free_memory() -> None:
    """Give freed pages that malloc keeps back to the kernel (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def mapped_apart() -> Iterator[None]:
    """Have glibc map each block of a MiB or more by itself meanwhile, so that a freed one goes back to the kernel.

    In the heap, what building and loading a model frees leaves holes of hundreds of MiB below what stays. Temporaries
    of later steps lie now here and now there in them, and every page that was ever touched stays resident. Nothing is
    done where the environment does not fix the threshold: glibc chooses it then.
    """
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if threshold is None or mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, int(threshold))


@contextmanager
def returning_free_memory(above: int) -> Iterator[None]:
    """Give free memory back meanwhile, as long as this process takes more than `above` bytes.

    Before glibc 2.38 malloc seldom reuses the place of an aligned block, such as a tensor's, for another of its size.
    So a heap in which 30 MiB come and go grows by 100 MiB in a thousand visits of small units, and goes on. To give
    that back takes 7 ms, and what is used again has to be zeroed again: hence once in REST_S at most.
    """
    over = threading.Event()

    def watch() -> None:
        rest = LOOK_S
        while not over.wait(rest):
            rest = LOOK_S
            if process_memory().get("VmRSS", 0) > above:
                return_free_memory()
                rest = REST_S

    thread = threading.Thread(target=watch, name="free-memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
