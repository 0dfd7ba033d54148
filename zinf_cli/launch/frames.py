"""What a launcher and a relay (relay.py) say to each other: bytes of many hosts on one channel, in frames.

A frame is a head (number of a host, what it is about, how many bytes follow) and these bytes. Number 0 is the relay.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

_HEAD = struct.Struct("!IBI")
MOST_BYTES = 1 << 16
"""Bytes of a host in one frame. So no host holds up the others of its group for long."""


class Kind(IntEnum):
    """What a frame is about."""

    BEAT = 0
    """A heartbeat of the launcher, or of the relay. What a host and the launcher beat to each other is DATA."""
    STOPPING = 1
    """The launcher will be stopped (Ctrl-Z), and is silent until it is continued."""
    OPEN = 2
    """The relay has to start the supervisor of a host, which is in JSON."""
    OPENED = 3
    REFUSED = 4
    """Why it could not: an error in JSON."""
    DATA = 5
    """Bytes for a supervisor, or from it."""
    PAUSE = 6
    """The relay must not read what the supervisor says, until RESUME."""
    RESUME = 7
    HANG_UP = 8
    ABORT = 9
    END = 10
    """The supervisor is gone. The bytes are its side's last words."""


def frame(kind: Kind, number: int = 0, data: bytes = b"") -> bytes:
    return _HEAD.pack(number, kind, len(data)) + data


def frames_of(number: int, data: bytes) -> Iterator[bytes]:
    """Frames that carry any number of bytes for a host, or from it."""
    for start in range(0, len(data), MOST_BYTES):
        yield frame(Kind.DATA, number, data[start : start + MOST_BYTES])


class Frames:
    """Finds frames in bytes as they come."""

    def __init__(self) -> None:
        self._come = b""

    def after(self, data: bytes) -> Iterator[tuple[Kind, int, bytes]]:
        """Take in what has come. Gives the frames that are whole by now, as (kind, number, bytes)."""
        self._come += data
        start = 0
        while len(self._come) - start >= _HEAD.size:
            number, kind, size = _HEAD.unpack_from(self._come, start)
            end = start + _HEAD.size + size
            if len(self._come) < end:
                break
            yield Kind(kind), number, self._come[start + _HEAD.size : end]
            start = end
        self._come = self._come[start:]
