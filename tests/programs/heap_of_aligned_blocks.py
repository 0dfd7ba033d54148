"""Prints the largest size of the heap while aligned blocks of 1 to 8 MiB come and go, two at once, as tensors do.

Small blocks come beside them and stay for a while, as the nodes of a graph do.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque


class _Mallinfo2(ctypes.Structure):
    _fields_ = [("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = _Mallinfo2
libc.malloc.restype = libc.aligned_alloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.aligned_alloc.argtypes = [ctypes.c_size_t], [ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

draw = random.Random(0)
large: deque[int] = deque()
small: deque[int] = deque()
most = 0
for _ in range(2_000):
    large.append(libc.aligned_alloc(64, draw.choice((1 << 20, 4 << 20, 8 << 20))))
    small.extend(libc.malloc(draw.choice((24, 56, 88))) for _ in range(3))
    if len(large) == 2:
        libc.free(large.popleft())
    while len(small) > 200:
        libc.free(small.popleft())
    most = max(most, int(libc.mallinfo2().arena))
print(most)
