"""Prints how many heaps glibc has after `heap_for_each(2)`, and after 6 more threads have taken memory at once."""

from __future__ import annotations

import ctypes
import os
import threading

import torch

from zinf_cli.train.process_memory import heap_for_each

libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.fclose.argtypes, libc.malloc_info.argtypes = [ctypes.c_void_p], [ctypes.c_int, ctypes.c_void_p]


def heaps() -> int:
    reading, writing = os.pipe()
    stream = libc.fdopen(writing, b"w")
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    with os.fdopen(reading) as told:
        return told.read().count("<heap ")


def take(both: threading.Barrier) -> None:
    block = bytearray(5000)
    both.wait()
    del block


torch.set_num_threads(2)
heap_for_each(2)
print(heaps())
barrier = threading.Barrier(6)
threads = [threading.Thread(target=take, args=(barrier,)) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(heaps())
