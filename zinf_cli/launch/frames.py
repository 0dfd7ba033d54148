"""What a launcher and a relay (relay.py) say to each other: bytes of many hosts on one channel, in frames.

A frame is a head (number of a host, what it is about, how many bytes follow) and these bytes. Number 0 is the relay.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

_HEAD = struct.Struct("!IBI")
_COUNT = struct.Struct("!I")
MOST_BYTES = 1 << 16
"""Bytes in one frame. So no host holds up the others of its group for long."""
WINDOW = 1 << 15
"""Bytes of a host that a relay sends before the launcher has taken them in. Then it does not read the host."""


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
    TAKEN = 6
    """How many more bytes of the supervisor's the launcher has taken in (WINDOW)."""
    HANG_UP = 7
    ABORT = 8
    END = 9
    """The supervisor is gone. The bytes are its side's last words."""


def frame(kind: Kind, number: int = 0, data: bytes = b"") -> bytes:
    return _HEAD.pack(number, kind, len(data)) + data


def frames_of(number: int, data: bytes) -> Iterator[bytes]:
    """Frames that carry any number of bytes for a host, or from it."""
    for start in range(0, len(data), MOST_BYTES):
        yield frame(Kind.DATA, number, data[start : start + MOST_BYTES])


def taken(number: int, num_bytes: int) -> bytes:
    return frame(Kind.TAKEN, number, _COUNT.pack(num_bytes))


def bytes_taken(content: bytes) -> int:
    """What `taken` has packed."""
    return int(_COUNT.unpack(content)[0])


class Frames:
    """Finds frames in bytes as they come."""

    def __init__(self) -> None:
        self._come = b""

    def after(self, data: bytes) -> Iterator[tuple[Kind, int, bytes]]:
        """Take in what has come. Gives the frames that are whole by now, as (kind, number, bytes).

        ValueError if something else has come, such as text.
        """
        self._come += data
        start = 0
        while len(self._come) - start >= _HEAD.size:
            number, kind, size = _HEAD.unpack_from(self._come, start)
            if size > MOST_BYTES:
                raise ValueError(f"{size} bytes are no frame")
            end = start + _HEAD.size + size
            if len(self._come) < end:
                break
            yield Kind(kind), number, self._come[start + _HEAD.size : end]
            start = end
        self._come = self._come[start:]


def language() -> str:
    """A digest of the files that say what frames mean. Both ends need the same."""
    files = (Path(__file__), Path(__file__).with_name("relay.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
