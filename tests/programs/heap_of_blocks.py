"""Prints by how many bytes the heap grows for 64 blocks of 4 MiB: inside `mapped_apart`, and after it."""

from __future__ import annotations

import ctypes

from zinf_cli.train.process_memory import mapped_apart


class _Mallinfo2(ctypes.Structure):
    _fields_ = [("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = _Mallinfo2
libc.malloc.restype = ctypes.c_void_p


def growth() -> int:
    before = libc.mallinfo2().arena
    for _ in range(64):
        libc.malloc(4 << 20)
    return int(libc.mallinfo2().arena - before)


with mapped_apart():
    apart = growth()
print(apart, growth())
