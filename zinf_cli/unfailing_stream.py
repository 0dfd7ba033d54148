"""Output that ends nobody: a run is not its screen's, nor its log's.

A terminal may be closed, a pipe have no reader, the drive under a file be full, a reader stand still. Whoever prints
goes on all the same; how much was not taken is said as soon as something is taken again.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any

_PATIENCE_S = 1.0
"""For a reader that stands still; after that, what it does not take at once is left out."""
_AT_ONCE = 4096
"""Bytes that a pipe takes whole where it takes any."""


class _Unfailing(io.FileIO):
    """A descriptor that takes all that is written, as far as there is anywhere for it to go."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._left_out = 0

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            try:
                if not self._is_ready():
                    raise BlockingIOError
                if self._left_out:
                    super().write(f"note: {self._left_out} bytes could not be written here\n".encode())
                    self._left_out = 0
                rest = rest[super().write(rest[:_AT_ONCE]) or 0 :]
            except OSError:
                self._left_out += len(rest)
                break
        return len(data)

    def _is_ready(self) -> bool:
        return bool(select.select([], [self.fileno()], [], 0 if self._left_out else _PATIENCE_S)[1])


def make_unfailing(stream: Any) -> Any:
    """In the place of sys.stdout or sys.stderr; a stream without a descriptor stays as it is."""
    try:
        descriptor = stream.fileno()
        stream.flush()
    except (AttributeError, OSError, ValueError):
        return stream
    buffer = io.BufferedWriter(_Unfailing(descriptor))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def stand_on_open_descriptors() -> None:
    """Where a shell has closed 0, 1 or 2, the next file that is opened would be taken for it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stderr = make_unfailing(sys.stderr)
