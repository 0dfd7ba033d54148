"""Memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

_LIBC = ctypes.CDLL(None)
_MALLOPT = getattr(_LIBC, "mallopt", None)
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of mallopt(3)
_APART = 2**20
"""Bytes."""
LOOK_S = 0.02
GROWTH = 24 << 20
"""Bytes that free memory grows by before it goes back to the kernel."""


def return_free_memory() -> None:
    """Give freed pages that malloc keeps back to the kernel (glibc)."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def heap_for_each(threads: int) -> None:
    """Have glibc make a heap for each of the `threads` that compute, and no others. Called before other threads start.

    An operator such as attention in bf16 takes hundreds of small blocks in all these threads at once. In one heap they
    wait for each other then, asleep. All threads that start later share these heaps. MALLOC_ARENA_MAX of the
    environment comes first.
    """
    if "MALLOC_ARENA_MAX" not in os.environ and _MALLOPT is not None:
        _MALLOPT(_M_ARENA_MAX, threads)
        torch.ones(threads << 16).add_(1)  # large enough for all of them, which so have the first heaps


@contextmanager
def mapped_apart() -> Iterator[None]:
    """Have glibc map each block of a MiB or more by itself meanwhile, so that a freed one goes back to the kernel.

    In the heap, what building and loading a model frees leaves holes of hundreds of MiB below what stays. Temporaries
    of later steps lie now here and now there in them, and every page that was ever touched stays resident. Nothing is
    done where the environment does not fix the threshold: glibc chooses it then.
    """
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    if threshold is None or _MALLOPT is None:
        yield
        return
    _MALLOPT(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        _MALLOPT(_M_MMAP_THRESHOLD, int(threshold))


@contextmanager
def returning_free_memory(above: int) -> Iterator[None]:
    """Give free memory back meanwhile, as long as this process takes more than `above` bytes.

    Blocks of many sizes come and go, so the heap has holes, and every page of them that was ever touched stays: it
    grows by some 60 MiB a second, now and then by as much in a tenth of one. To give that back takes 3 ms, and what is
    used again has to be zeroed again. So it is done as soon as there is GROWTH to give back, and not before.
    """
    over = threading.Event()

    def watch() -> None:
        least = _not_in_use(process_memory())
        while not over.wait(LOOK_S):
            memory = process_memory()
            if memory.get("VmRSS", 0) <= above - GROWTH:
                continue
            unused = _not_in_use(memory)
            if unused > least + GROWTH:
                return_free_memory()
                unused = least = _not_in_use(process_memory())
            least = min(least, unused)

    thread = threading.Thread(target=watch, name="free-memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2 of mallinfo(3)."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _not_in_use(memory: Mapping[str, int]) -> int:
    """Bytes of `process_memory` that malloc has not handed out. Without glibc's mallinfo2, all of them."""
    mallinfo = getattr(_LIBC, "mallinfo2", None)
    if mallinfo is None:
        return memory.get("VmRSS", 0)
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return memory.get("VmRSS", 0) - int(info.uordblks) - int(info.hblkhd)


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
